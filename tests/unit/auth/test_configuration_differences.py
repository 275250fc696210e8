"""What changes from one serving configuration to another."""

from typing import Any

from helixflow.auth.configuration.differences import Difference, FieldDifference, find_differences, names_of
from helixflow.settings.configuration import Models, read_models


def models(**deployments: list[dict[str, Any]]) -> Models:
    given = [{"name": name, "deployments": [_deployment(**one) for one in some]} for name, some in deployments.items()]
    return read_models({"models": given})


def _deployment(**settings: Any) -> dict[str, Any]:
    return {"engine": "openai", "base_url": "https://a.example/v1", **settings}


def test_nothing_changes_where_defaults_are_spelt_out() -> None:
    assert find_differences(models(a=[{}]), models(a=[{"weight": 1, "tier": 0}])) == []


def test_a_named_deployment_keeps_its_name_wherever_it_stands() -> None:
    before = models(a=[{"name": "east"}, {"name": "west", "weight": 2}])
    after = models(a=[{"name": "west", "weight": 3}, {"name": "east"}])
    assert find_differences(before, after) == [
        Difference("a", "a/west", "changed", (FieldDifference("weight", "2.0", "3.0"),))
    ]


def test_models_come_and_go_with_their_deployments() -> None:
    assert find_differences(models(a=[{}]), models(b=[{}])) == [
        Difference("b", "", "added"),
        Difference("b", "b/openai-0", "added"),
        Difference("a", "", "removed"),
        Difference("a", "a/openai-0", "removed"),
    ]


def test_fields_of_the_model_itself_are_told_apart_from_those_of_its_deployments() -> None:
    (before,) = models(a=[{}])
    after = before.model_copy(update={"aliases": ("x",), "max_cost": "0.5"})
    assert find_differences([before], [after]) == [
        Difference(
            "a",
            "",
            "changed",
            (FieldDifference("aliases", "[]", '["x"]'), FieldDifference("max_cost", "null", '"0.5"')),
        )
    ]
    assert names_of([after]) == {"a", "x"}


def test_what_may_be_secret_is_not_shown() -> None:
    before = models(a=[{"headers": {"x-key": "sk-1", "gone": "sk-2"}, "base_url": "https://u:one@a.example/v1"}])
    after = models(a=[{"headers": {"x-key": "sk-3", "new": "${NEW}"}, "base_url": "https://u:two@a.example/v1"}])
    (difference,) = find_differences(before, after)
    assert {field.name for field in difference.fields} == {"base_url", "headers.x-key", "headers.gone", "headers.new"}
    shown = str(difference)
    assert not any(secret in shown for secret in ("sk-1", "sk-2", "sk-3", "one@", "two@"))
    assert "${NEW}" in shown


def test_a_long_value_is_cut() -> None:
    old, new = ("x" * 5000 + end for end in "ab")
    (before,) = read_models({"models": [{"name": "a", "deployments": [{"engine": "llama_cpp", "chat_template": old}]}]})
    (after,) = read_models({"models": [{"name": "a", "deployments": [{"engine": "llama_cpp", "chat_template": new}]}]})
    (difference,) = find_differences([before], [after])
    assert len(difference.fields[0].after) < 1000
