"""What a call can use at most is never more than what is reserved for it."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.call import Call, Operation, Plan
from helixflow.core.principal import Principal, PrincipalKind
from helixflow.dialects.openai_chat import parse_chat
from helixflow.dialects.openai_completions import parse_completion
from helixflow.dialects.openai_embeddings import parse_embedding
from helixflow.dialects.validation import decode_fields
from helixflow.metering.demand import Bounds, Estimator, estimate_prompt
from helixflow.routing.table import Route

CONTEXT = 8192
MEDIA = 1000
ESTIMATOR = Estimator(expected_completion=50, media_tokens=MEDIA)
ROUTE = Route("m", plan=Plan(("m/openai-0",), CONTEXT))
PRINCIPAL = Principal(PrincipalKind.KEY, "key", "key", "org", "proj")
PARSERS = {
    Operation.CHAT: parse_chat,
    Operation.COMPLETIONS: parse_completion,
    Operation.EMBEDDINGS: parse_embedding,
}


def call(operation: Operation, body: bytes) -> Call:
    params = PARSERS[operation](body)
    fields = decode_fields(body)
    return Call("c", "r", PRINCIPAL, operation, "m", fields, params, False, False, 0, len(body), route=ROUTE)


def chat(content: Any, **fields: Any) -> Call:
    message = {"role": "user", "content": content}
    return call(Operation.CHAT, msgspec.json.encode({"model": "m", "messages": [message], **fields}))


def bounds(asked: Call) -> Bounds:
    return ESTIMATOR.bounds(asked)


@given(st.text(max_size=300))
def test_a_token_has_at_least_a_byte(text: str) -> None:
    assert bounds(chat(text)).prompt >= len(text.encode())


def test_answers_are_bounded_by_what_was_asked_or_by_the_context() -> None:
    assert bounds(chat("hi", max_tokens=7, n=3)).completion == 21
    assert bounds(chat("hi", max_completion_tokens=7)).completion == 7
    assert bounds(chat("hi", n=2)).completion == 2 * CONTEXT
    body = msgspec.json.encode({"model": "m", "prompt": ["a", "b"], "best_of": 3, "max_tokens": 5})
    assert bounds(call(Operation.COMPLETIONS, body)).completion == 2 * 3 * 5
    body = msgspec.json.encode({"model": "m", "prompt": "a"})
    assert bounds(call(Operation.COMPLETIONS, body)).completion == 16, "the API reference's default"
    body = msgspec.json.encode({"model": "m", "input": ["a", "b"]})
    assert bounds(call(Operation.EMBEDDINGS, body)).completion == 0


IMAGES = [
    '{"type":"image_url","image_url":{"url":"https://example.org/a.png"}}',
    r'{"type":"image_url","image_url":{"url":"\u0068ttps://example.org/a.png"}}',
    r'{"type":"image\u005furl","image_url":{"url":"HTTPS://example.org/a.png"}}',
    '{"type":"image_url","image_url":{"url":"data:image/png;base64,AAAA"}}',
    '{"type":"file","file":{"file_id":"file-1"}}',
    '{"type":"input_audio","input_audio":{"data":"AAAA","format":"wav"}}',
]


@pytest.mark.parametrize("part", IMAGES)
def test_what_is_no_text_reserves_its_allowance_however_it_is_spelt(part: str) -> None:
    body = f'{{"model":"m","messages":[{{"role":"user","content":[{part}]}}]}}'.encode()
    assert MEDIA < bounds(call(Operation.CHAT, body)).prompt < MEDIA + len(body) + 100


def test_the_bytes_of_an_image_are_no_text() -> None:
    asked = chat([{"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4_000_000}}])
    assert bounds(asked).expected < MEDIA + 100
    assert estimate_prompt(asked) < 100
