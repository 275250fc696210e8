import json

import pytest

from helixflow.engines.vllm.token_ids import TokenEvents


def event(text: str | None, ids: list[int], **more: object) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None, "token_ids": ids}
    body = {"id": "chatcmpl-1", "choices": [{**choice, **more}]}
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


ROLE = (
    b'data: {"id":"chatcmpl-1","choices":[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
    b'"finish_reason":null}],"prompt_token_ids":[1,22,333],"prompt_text":null}\n\n'
)


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_ids_are_taken_out_however_the_bytes_were_split(size: int) -> None:
    read = TokenEvents()
    body = ROLE + event("Hi", [5]) + event(" you", [6, 7]) + b"data: [DONE]\n\n"
    out = b"".join(b"".join(read.feed(body[at : at + size])) for at in range(0, len(body), size))
    assert (read.prompt, read.prompt_tokens, read.ids, read.made) == ([1, 22, 333], 3, [5, 6, 7], 3)
    assert b"token_ids" not in out
    assert b"prompt_text" not in out
    chunks = [json.loads(line[6:]) for line in out.split(b"\n\n")[:-2]]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "Hi", " you"]
    assert read.done


def test_text_that_looks_like_a_field_is_text() -> None:
    read = TokenEvents()
    text = ',"token_ids":[9,9],"finish_reason":"stop","prompt_text":null'
    (out,) = read.feed(event(text, [5]))
    assert json.loads(out[6:])["choices"][0]["delta"]["content"] == text
    assert read.ids == [5]
    assert not read.finished


def test_a_character_that_is_not_complete_is_not_settled() -> None:
    read = TokenEvents()
    for one in (event("a", [1]), event("", [2]), event("", [3])):
        read.feed(one)
    assert read.ids == [1]
    assert read.made == 3
    read.feed(event("🐉", [4]))
    assert read.ids == [1, 2, 3, 4]
    read.feed(event("", [0], finish_reason="stop"))
    assert read.finished
    assert read.ids == [1, 2, 3, 4, 0], "the end of the answer has no text, and is there"


def test_an_error_ends_it_and_is_not_passed_on() -> None:
    read = TokenEvents()
    out = read.feed(event("a", [1]) + b'data: {"error":{"message":"EngineCore encountered an issue"}}\n\n')
    assert len(out) == 1
    assert b"EngineCore" in read.failure
