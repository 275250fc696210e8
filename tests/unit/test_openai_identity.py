"""A provider's bytes on their way through, whatever way they come in pieces."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helixflow.core.call import Operation, Progress
from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_identity import Rename, StreamEditor, edit_answer

DONE = b"data: [DONE]\n\n"
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
TRICKY = ['"model":"their"', ',"usage":null', "}\n\n", "data: [DONE]\n\n", '\\"', "\u2028é💥", '"error":', "x" * 300]


def event(delta: Any, *, finish: str | None = None, end: str = "\n\n", spaced: bool = False, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}] if delta is not None else []
    fields = {"id": "their-id", "model": "their", "choices": choices, **more}
    return f"data: {json.dumps(fields, separators=None if spaced else (',', ':'))}{end}".encode()


def edit(pieces: list[bytes], *, include_usage: bool = False) -> tuple[bytes, StreamEditor, Progress]:
    progress = Progress()
    editor = StreamEditor(Rename(b'"ours"', Operation.CHAT, "c1"), include_usage=include_usage, progress=progress)
    return b"".join([editor.feed(piece) for piece in pieces]), editor, progress


def payloads(data: bytes) -> list[dict[str, Any]]:
    events = [e.strip() for e in data.replace(b"\r\n", b"\n").split(b"\n\n") if e.startswith(b"data: {")]
    return [json.loads(e[6:]) for e in events]


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], str]:
    style = {"spaced": draw(st.booleans()), "end": draw(st.sampled_from(["\n\n", "\r\n\r\n"]))}
    texts = draw(st.lists(st.sampled_from(TRICKY) | st.text(min_size=1, max_size=8), min_size=1, max_size=6))
    nulls: dict[str, Any] = {"usage": None} if draw(st.booleans()) else {}
    events = [event({"role": "assistant", "content": ""}, **style, **nulls)]
    for text in texts:
        events.append(event({"content": text}, **style, **nulls))
        if draw(st.booleans()):
            events.append(b": ping\n\n")
    if draw(st.booleans()):
        events.append(event({}, finish="stop", **style, usage=USAGE))
    else:
        events += [event({}, finish="stop", **style, **nulls), event(None, **style, usage=USAGE)]
    return [*events, DONE], "".join(texts)


@given(st.data(), streams(), st.booleans())
def test_the_pieces_do_not_matter(data: st.DataObject, stream: tuple[list[bytes], str], include_usage: bool) -> None:
    events, text = stream
    body = b"".join(events)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=12)))
    pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    expected, _, _ = edit(events, include_usage=include_usage)
    got, editor, progress = edit(pieces, include_usage=include_usage)
    assert got == expected
    assert editor.ended_cleanly
    assert got.endswith(DONE)
    assert (progress.usage.prompt_tokens, progress.usage.completion_tokens) == (3, 2)
    assert progress.finish_reason == "stop"
    chunks = payloads(got)
    assert {c["model"] for c in chunks} == {"ours"}
    assert {c["id"] for c in chunks} == {"chatcmpl-c1"}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == text
    assert all(("usage" in c) == include_usage for c in chunks)
    if include_usage:
        assert [c["usage"] for c in chunks if c["usage"]] == [USAGE]


def test_an_id_with_the_right_prefix_is_kept() -> None:
    body = event({"content": "a"}, id="chatcmpl-theirs") + DONE
    assert payloads(edit([body])[0])[0]["id"] == "chatcmpl-theirs"


def test_nothing_passes_before_the_first_content() -> None:
    role = event({"role": "assistant", "content": "", "tool_calls": None})
    out, editor, progress = edit([b": hello\n\n", role])
    assert out == b""
    assert not editor.started
    assert progress.first_content_at is None
    out = editor.feed(event({"tool_calls": [{"index": 0}]}))
    assert len(payloads(out)) == 2
    assert progress.first_content_at is not None


@pytest.mark.parametrize("bad", [b'data: {"error":{"message":"x"}}\n\n', b"data: {\n\n", b"data: 3\n\n"])
def test_an_error_before_the_first_content_is_raised(bad: bytes) -> None:
    with pytest.raises(HelixError) as caught:
        edit([event({"role": "assistant"}) + bad])
    assert caught.value.kind in (ErrorKind.UPSTREAM_UNAVAILABLE, ErrorKind.UPSTREAM_INVALID)


def test_what_came_before_an_error_is_given_out_first() -> None:
    out, editor, _ = edit([event({"content": "a"}) + b'data: {"error":{"message":"x"}}\n\n' + DONE])
    assert payloads(out)[0]["choices"][0]["delta"] == {"content": "a"}
    assert DONE not in out
    assert editor.failure is not None
    assert not editor.ended_cleanly


def test_a_null_error_is_none() -> None:
    out, editor, _ = edit([event({"content": "a"}, error=None), event({"content": "b"}, error=None), DONE])
    assert editor.failure is None
    assert len(payloads(out)) == 2


@pytest.mark.parametrize("pieces", [[event({"content": "a"})], [event({"content": "a"}), DONE[:-3]], [DONE[:8]]])
def test_a_stream_without_its_end_did_not_end_cleanly(pieces: list[bytes]) -> None:
    assert not edit(pieces)[1].ended_cleanly


def test_tokens_are_counted_where_none_are_reported() -> None:
    _, _, progress = edit([event({"content": "a"}), event({"content": "b"}) + event({"content": "c"}), DONE])
    assert progress.usage.completion_tokens == 3
    assert not progress.usage.reported


@pytest.mark.parametrize("spaced", [True, False])
def test_a_whole_answer_is_edited(spaced: bool) -> None:
    text = 'say "model":"their" or "finish_reason":"length"'
    fields = {"id": "x", "model": "their", "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
              "usage": USAGE}  # fmt: skip
    body = json.dumps(fields, separators=None if spaced else (",", ":")).encode()
    progress = Progress()
    got = json.loads(edit_answer(body, Rename(b'"ours"', Operation.CHAT, "c1"), progress))
    assert got == {**fields, "id": "chatcmpl-c1", "model": "ours"}
    assert progress.usage.prompt_tokens == 3


RUBBISH = [b"{}", b"[]", b"null", b'{"choices":[],"usage":{"prompt_tokens":"x"}}']


@given(st.binary(max_size=40) | st.sampled_from(RUBBISH))
def test_rubbish_is_an_error_and_nothing_else(body: bytes) -> None:
    with pytest.raises(HelixError) as caught:
        edit_answer(body, Rename(b'"ours"', Operation.CHAT, "c1"), Progress())
    assert caught.value.kind is ErrorKind.UPSTREAM_INVALID
