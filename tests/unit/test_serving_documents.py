"""Documents of the serving configuration: the same for what says the same, and clear about what is wrong."""

import json
from pathlib import Path

import pytest

from helixflow.core.errors import UserError
from helixflow.settings.configuration import Refused, complete_document_of, document_of, parse_document, read_document
from helixflow.settings.load import load_settings
from helixflow.settings.masking import HIDDEN, hide_secrets, restore_secrets

TEXT = """
[[models]]
name = "gpt"
aliases = ["g"]
[[models.deployments]]
engine = "openai"
base_url = "https://user:word@models.example/v1"
headers = { "x-key" = "sk-1", "x-place" = "${PLACE}" }
weight = 2
[[models]]
name = "smollm2-135m-instruct"
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "helixflow.toml"
    file.write_text(text)
    return file


def test_a_document_says_what_was_given_and_reads_back_the_same(tmp_path: Path) -> None:
    models = load_settings(write(tmp_path, TEXT), environ={}).models
    document = document_of(models)
    assert json.loads(document)["models"][1] == {"name": "smollm2-135m-instruct"}
    assert json.loads(document)["models"][0]["deployments"][0]["weight"] == 2
    read = read_document(document)
    assert (read, document_of(read)) == (models, document)
    assert read_document(complete_document_of(models)) == models


def test_how_a_file_is_written_makes_no_difference(tmp_path: Path) -> None:
    one = write(tmp_path, '[[models]]\nname = "a"\naliases = ["b", "c"]\n')
    first = document_of(load_settings(one, environ={}).models)
    other = write(tmp_path, 'models = [{ aliases = ["b", "c"], name = "a" }] # the same\n')
    assert document_of(load_settings(other, environ={}).models) == first


def test_what_was_hidden_is_found_again_by_the_names_of_model_and_deployment(tmp_path: Path) -> None:
    tree = parse_document(document_of(load_settings(write(tmp_path, TEXT), environ={}).models))
    shown = hide_secrets(json.loads(json.dumps(tree)))
    assert shown["models"][0]["deployments"][0]["headers"] == {"x-key": HIDDEN, "x-place": "${PLACE}"}
    assert shown["models"][0]["deployments"][0]["base_url"] == f"https://{HIDDEN}@models.example/v1"
    assert restore_secrets(json.loads(json.dumps(shown)), tree) == tree
    # Of another model nothing is known: what is hidden stays so, and is refused.
    moved = json.loads(json.dumps(shown))
    moved["models"][0]["name"] = "gpt-2"
    with pytest.raises(Refused) as caught:
        read_document(json.dumps(restore_secrets(moved, tree)))
    assert [problem.path for problem in caught.value.problems] == [
        "models[0].deployments[0].headers.x-key",
        "models[0].deployments[0].base_url",
    ]


@pytest.mark.parametrize(
    "shown", [None, [], {"models": 3}, {"models": [None, {"deployments": 1}, {"deployments": [0]}]}]
)
def test_restoring_takes_anything(shown: object) -> None:
    tree = {"models": shown}
    assert restore_secrets(tree, {"models": []}) == {"models": shown}


@pytest.mark.parametrize("document", [b"\xff", "[" * 100_000, "null", '"text"', "{"])
def test_what_is_no_document_is_refused(document: str | bytes) -> None:
    with pytest.raises(Refused):
        read_document(document)


def test_a_wrong_setting_of_any_engine_is_named_without_its_kind(tmp_path: Path) -> None:
    for engine in ("llama_cpp", "vllm", "openai", "anthropic", "ollama"):
        text = f'[[models]]\nname = "a"\n[[models.deployments]]\nengine = "{engine}"\nweight = -1\n'
        with pytest.raises(UserError) as caught:
            load_settings(write(tmp_path, text), environ={})
        assert f"{tmp_path}/helixflow.toml:5: models[0].deployments[0].weight: " in caught.value.message


@pytest.mark.parametrize("setting", ["balance = 'cost'", "affinity = false", "hedge_after_s = 1", "api_key_file = 'k'"])
def test_a_split_does_not_say_what_its_ways_say(setting: str, tmp_path: Path) -> None:
    ways = "[[models]]\nname = 'a'\n[[models]]\nname = 's'\nsplit = [{ model = 'a', weight = 1 }]\n"
    with pytest.raises(UserError, match=rf"{setting.split()[0]}: the split 's' has no deployments of its own"):
        load_settings(write(tmp_path, f"{ways}{setting}"), environ={})
    split = load_settings(
        write(tmp_path, f"{ways}residency = 'eu'\nmax_cost = '1'\naffinity = true"), environ={}
    ).models
    assert read_document(complete_document_of(split)) == split, "written defaults do no harm"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[[models.deployments]]\nengine = "openai"\n', "each model begins with [[models]] and its name"),
        ('[[models]]\nname = "m"\n[models.deployments]\nengine = "openai"\n', "begins with [[models.deployments]]"),
        (TEXT.replace("https://", "ftp://"), "base_url: must begin with http:// or https://"),
        ('[[models]]\nname = "m"\nmax_cost = "1,50"\n', 'max_cost: must be dollars as text, such as "0.05"'),
        ('[[models]]\nname = "m"\nresidency = "EU West"\n', "residency: must be lower-case letters, digits"),
    ],
)
def test_usual_slips_are_explained_in_words(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_settings(write(tmp_path, text), environ={})
    assert said in caught.value.message
