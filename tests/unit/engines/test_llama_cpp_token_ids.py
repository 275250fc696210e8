"""Token ids in the bytes of llama.cpp's events (as version 2026.10 writes them)."""

import json

import pytest

from helixflow.engines.llama_cpp.generation import EVENT
from helixflow.engines.llama_cpp.token_ids import ChatTokens, CompletionTokens, chat_event, completion_event
from helixflow.engines.resuming import TokenLog

TEXTS = [" poet", '"},"logprobs":{"content":[{"id":9', "back\\slash\n", "🌌", "\\u0000 \u2028", '","bytes":[1]']
TAIL = ',"created":1,"id":"chatcmpl-x","model":"tiny","system_fingerprint":"b0","object":"chat.completion.chunk"'
TIMINGS = ',"timings":{"cache_n":0,"prompt_ms":9.5,"predicted_n":%d,"predicted_ms":118.0,"predicted_per_second":25.4}}'


def inside(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def chat(text: str, token: int, made: int, raw: str | None = None) -> bytes:
    entry = f'{{"id":{token},"token":"{inside(text if raw is None else raw)}","bytes":[32,112],"prob":1.0'
    return (
        f'{{"choices":[{{"finish_reason":null,"index":0,"delta":{{"content":"{inside(text)}"}},"logprobs":{{"content":['
        f'{entry},"top_probs":[{entry}}}]}}]}}}}]' + TAIL + TIMINGS % made
    ).encode()


def completion(text: str, token: int, made: int) -> bytes:
    verbose = (
        f'{{"index":0,"content":"{inside(text)}","tokens":[{token}],"stop":false,"id_slot":-1,'
        f'"tokens_predicted":{made},"tokens_evaluated":50}}'
    )
    return (
        f'{{"choices":[{{"text":"{inside(text)}","index":0,"logprobs":null,"finish_reason":null}}],"created":1,'
        f'"model":"tiny","object":"text_completion","id":"x","__verbose":{verbose}}}'
    ).encode()


@pytest.mark.parametrize("text", TEXTS)
def test_text_id_and_count_are_read_and_the_event_becomes_short(text: str) -> None:
    for make, reader_of, event_of in (
        (chat, ChatTokens, chat_event),
        (completion, CompletionTokens, completion_event),
    ):
        log = TokenLog()
        reader = reader_of(log)
        event = make(text, 5720, 4)
        json.loads(event)
        read = reader.read(event)
        assert read is not None
        assert json.loads(b'"' + read + b'"', strict=False) == text
        assert reader.is_readable
        (piece,) = log.pieces()
        assert (piece.text, piece.last, log.made) == (text, 5720, 4)
        (choice,) = EVENT.decode(event_of(read)).choices
        assert text in (choice.text, (choice.delta or {}).get("content"))


def test_text_that_is_not_what_the_model_wrote_ends_the_reading() -> None:
    """A template's parser may strip or hold back: ids and text do not fit any more."""
    reader = ChatTokens(TokenLog())
    assert reader.read(chat("Hello", 1, 1, raw="\n\nHello")) is None
    assert not reader.is_readable


@pytest.mark.parametrize(
    ("event", "is_readable", "finished"),
    [
        (b'{"choices":[{"finish_reason":null,"index":0,"delta":{"role":"assistant","content":null}}]}', True, False),
        (b'{"choices":[{"finish_reason":null,"index":0,"delta":{"reasoning_content":"Hm"}}]}', False, False),
        (b'{"choices":[{"finish_reason":null,"index":0,"delta":{"tool_calls":[]}}]}', False, False),
        (b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":"x"}}],"created":1}', False, False),
        (b'{"choices":[{"finish_reason":"stop","index":0,"delta":{}}],"created":1}', True, True),
        (b'{"choices":[],"usage":{"prompt_tokens":1}}', True, False),
    ],
)
def test_other_chat_events_pass_as_they_are(event: bytes, is_readable: bool, finished: bool) -> None:
    reader = ChatTokens(TokenLog())
    assert reader.read(event) is None
    assert (reader.is_readable, reader.finished) == (is_readable, finished)


def test_completions_that_do_not_name_their_tokens_are_noticed() -> None:
    reader = CompletionTokens(TokenLog())
    event = b'{"choices":[{"text":"x","index":0,"logprobs":null,"finish_reason":null}],"created":1}'
    assert reader.read(event) == b"x"
    assert not reader.is_readable
    end = b'{"choices":[{"text":"","index":0,"logprobs":null,"finish_reason":"length"}],"usage":{}}'
    assert reader.read(end) is None
    assert reader.finished
