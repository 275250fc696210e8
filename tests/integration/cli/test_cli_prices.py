"""`helixflow prices`, `helixflow usage rerate` and `usage journals` against a real node."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.harness.node import WAIT_S, Node, run_node, write_idle_config
from tests.integration.cli.conftest import Run

MODEL = "idle"


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folder = tmp_path_factory.mktemp("prices")
    with run_node(folder / "data", HELIXFLOW_CONFIG=str(write_idle_config(folder))) as running:
        yield running


@pytest.fixture
def at_node(node: Node, run: Run, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name, value in node.environment.items():
        monkeypatch.setenv(name, value)
    return run


def shown(run: Run, *words: str) -> Any:
    done = run(*words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_prices_are_listed_set_and_shown(at_node: Run) -> None:
    listed = shown(at_node, "prices", "list")["prices"]
    assert [price["source"] for price in listed] == ["default"] * len(listed) and listed
    unset = shown(at_node, "prices", "show", MODEL)
    assert (unset["rates"]["input"], unset["source"], unset["valid_from"]) == ("10.00", "default", None)
    options = ["--input", "2.5", "--cached-input", "0.25", "--output", "10", "--request", "0.001"]
    options += ["--engine-second", "0.000000001", "--tier", "200001:5:0.5:15", "--tier", "400001:6::16"]
    made = shown(at_node, "prices", "set", "--model", MODEL, *options, "--to", "2w")
    assert made["rates"] == {
        "input": "2.50",
        "cached_input": "0.25",
        "output": "10.00",
        "request": "0.001",
        "engine_second": "0.000000001",
        "tiers": [
            {"from_prompt_tokens": 200_001, "input": "5.00", "cached_input": "0.50", "output": "15.00"},
            {"from_prompt_tokens": 400_001, "input": "6.00", "cached_input": "6.00", "output": "16.00"},
        ],
    }
    assert shown(at_node, "prices", "show", MODEL + "/openai-0") == made
    by_version = shown(at_node, "prices", "show", made["price_version"])
    assert by_version["rates"] == made["rates"] and by_version["subject"] is None
    text = at_node("prices", "show", MODEL).out
    assert text.startswith(MODEL + "\n") and "2.50 for a million prompt tokens, 0.25 where cached" in text
    assert "from 200001 tokens" in text and made["price_version"] in text
    assert shown(at_node, "prices", "show", MODEL, "--at", made["valid_to"]) == unset
    table = at_node("prices", "list", "--subject", MODEL).out
    assert "0.001 a request, 0.000000001 a second, 2 tiers" in table
    overlapping = at_node("prices", "set", "--model", MODEL, "--input", "1", "--from", "1d")
    assert (overlapping.code, overlapping.out) == (1, "") and "Another price holds until" in overlapping.err


def test_prices_are_ended_and_withdrawn(at_node: Run) -> None:
    planned = shown(at_node, "prices", "set", "--deployment", "other/openai-0", "--input", "1", "--from", "30d")
    assert planned["id"] in at_node("prices", "list", "--subject", "other/openai-0").out
    shortened = at_node("prices", "end", planned["id"], "--at", "60d")
    assert shortened.code == 0 and f"{planned['id']}, the price of other/openai-0, ends " in shortened.out
    withdrawn = at_node("prices", "end", planned["id"])
    assert withdrawn.code == 0 and f"withdrew {planned['id']}" in withdrawn.out
    gone = at_node("prices", "end", planned["id"])
    assert (gone.code, gone.out) == (1, "") and "There is no price" in gone.err
    past = at_node("prices", "end", planned["id"], "--at", "2020-01-01")
    assert past.code == 2 and "lies in the past" in past.err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--input", "1"), "give either --model or --deployment"),
        (("--model", "a", "--deployment", "a/b-0", "--input", "1"), "give either --model or --deployment"),
        (("--model", "a"), "say what it costs"),
        (("--model", "a", "--tier", "5:1:1"), "TOKENS:INPUT:CACHED:OUTPUT"),
        (("--model", "a", "--tier", "x:1:1:1"), "TOKENS:INPUT:CACHED:OUTPUT"),
        (("--model", "a", "--input", "1", "--from", "2020-01-01"), "--from '2020-01-01': lies in the past"),
        (("--model", "a", "--input", "1", "--to", "soon"), "--to 'soon'"),
    ],
)
def test_a_wrong_command_line_is_told(run: Run, options: tuple[str, ...], reason: str) -> None:
    done = run("prices", "set", *options)
    assert (done.code, done.out) == (2, "") and reason in done.err


def test_what_the_server_refuses_names_the_field(at_node: Run) -> None:
    refused = at_node("prices", "set", "--deployment", "a/openai-0", "--input=-1")
    assert refused.code == 1 and "rates.input" in refused.err
    unknown = at_node("prices", "show", "no-such-model")
    assert unknown.code == 1 and "No model, deployment or version" in unknown.err


def test_the_ledger_is_rated_again_only_as_a_dry_run(at_node: Run) -> None:
    wet = at_node("usage", "rerate")
    assert (wet.code, wet.out) == (2, "") and "--dry-run" in wet.err
    found = shown(at_node, "usage", "rerate", "--dry-run", "--from", "30d", "--current")
    assert (found["rows"], found["differing"], found["recorded"], found["done"]) == (0, 0, "0.00", True)
    assert at_node("usage", "rerate", "--dry-run").out == "0 requests, 0 differ; recorded 0.00, rated 0.00 US dollars\n"
    backwards = at_node("usage", "rerate", "--dry-run", "--from", "1d", "--to", "2d")
    assert backwards.code == 1 and "ends after it has begun" in backwards.err


def test_open_journals_are_listed_and_those_of_living_nodes_are_not_given_up(at_node: Run) -> None:
    deadline = time.monotonic() + WAIT_S
    while not (journals := shown(at_node, "usage", "journals")["journals"]) or not journals[0]["shipped_at"]:
        assert time.monotonic() < deadline, journals
        # Gateways announce them soon after they have begun to serve.
        time.sleep(0.05)
    (journal, *_) = journals
    assert journal["node_id"]
    table = at_node("usage", "journals").out
    assert table.startswith("id ") and journal["id"] in table
    living = at_node("usage", "close-journal", journal["id"])
    assert (living.code, living.out) == (1, "") and "its node is there" in living.err
    unknown = at_node("usage", "close-journal", "f" * 24)
    assert unknown.code == 1 and "There is no journal" in unknown.err
