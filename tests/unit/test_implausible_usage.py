"""What a server says of its usage is believed only as far as it can be."""

import pytest

from helixflow.core.call import Usage
from helixflow.dialects.openai_events import USAGE


def read(text: str) -> Usage:
    usage = Usage(completion_tokens=3)
    USAGE.decode(text).copy_to(usage)
    return usage


def test_a_report_replaces_what_was_counted() -> None:
    usage = read('{"prompt_tokens":5,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":4}}')
    assert usage == Usage(5, 7, 4, 0, reported=True)


@pytest.mark.parametrize(
    "text",
    [
        '{"prompt_tokens":-5,"completion_tokens":7}',
        '{"prompt_tokens":5,"completion_tokens":-1}',
        '{"prompt_tokens":1000000001,"completion_tokens":7}',
        '{"prompt_tokens":5,"completion_tokens":18446744073709551616}',
    ],
)
def test_what_cannot_be_is_not_taken(text: str) -> None:
    assert read(text) == Usage(completion_tokens=3)


def test_parts_are_no_more_than_the_whole() -> None:
    usage = read(
        '{"prompt_tokens":5,"completion_tokens":7,"prompt_tokens_details":{"cached_tokens":50},'
        '"completion_tokens_details":{"reasoning_tokens":-2}}'
    )
    assert (usage.cached_tokens, usage.reasoning_tokens) == (5, 0)


@pytest.mark.parametrize(
    "text", ["{}", '{"prompt_tokens":0,"completion_tokens":0}', '{"total_tokens":30}', '{"completion_tokens":9}']
)
def test_a_report_without_a_prompt_is_none(text: str) -> None:
    assert read(text) == Usage(completion_tokens=3)


def test_what_came_is_not_taken_back() -> None:
    usage = read('{"prompt_tokens":5,"completion_tokens":0}')
    assert usage == Usage(5, 3)
