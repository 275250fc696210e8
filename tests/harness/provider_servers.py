"""The dialects of `model_server`: OpenAI, Anthropic, Ollama."""

import json
from collections.abc import Sequence
from typing import Any

from tests.harness.model_server import (
    KEY,
    Asked,
    ModelServer,
    Refusal,
    Usage,
    Writer,
    halves,
    sse,
    texts_of,
)


class OpenAIServer(ModelServer):
    """`/chat/completions`, `/completions`, `/embeddings`, `/models`."""

    base_path = "/v1"

    def check_key(self, headers: dict[str, str]) -> None:
        if headers.get("authorization") != f"Bearer {KEY}":
            raise Refusal(401, {"error": {"message": "Incorrect API key", "code": "invalid_api_key"}})

    def ask(self, path: str, body: Any) -> Asked | bytes:
        if path == "/models":
            return b'{"object":"list","data":[]}'
        if path == "/embeddings":
            inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
            words = sum(len(text.split()) for text in inputs)
            data = [{"object": "embedding", "index": i, "embedding": [1.0, 0.0]} for i in range(len(inputs))]
            usage = {"prompt_tokens": words, "total_tokens": words}
            return json.dumps({"object": "list", "data": data, "model": body["model"], "usage": usage}).encode()
        if path not in ("/chat/completions", "/completions"):
            raise Refusal(404, {"error": {"message": "Unknown request URL", "code": "unknown_url"}})
        stop = body.get("stop") or []
        texts = [texts_of(message["content"]) for message in body["messages"]] if path == "/chat/completions" else []
        return Asked(
            prompt=" ".join(texts) if texts else body["prompt"],
            max_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
            stop=[stop] if isinstance(stop, str) else stop,
            tools=[tool["function"]["name"] for tool in body.get("tools") or ()],
            stream=bool(body.get("stream")),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        )

    def too_long(self, needed: int) -> Refusal:
        message = f"This model's maximum context length is {self.context} tokens. However, you requested {needed}."
        error = {"message": message, "type": "invalid_request_error", "code": "context_length_exceeded"}
        return Refusal(400, {"error": {**error, "param": "messages"}})

    def overloaded(self) -> Refusal:
        return Refusal(503, {"error": {"message": "The server is overloaded"}}, {"retry-after": "7"})

    def open(self, path: str, asked: Asked) -> Writer:
        return OpenAIWriter(asked, chat=path == "/chat/completions")


class OpenAIWriter(Writer):
    def __init__(self, asked: Asked, *, chat: bool) -> None:
        self._asked = asked
        self._chat = chat
        self._text: list[str] = []
        self._thoughts: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self.media_type = "text/event-stream" if asked.stream else "application/json"
        self._common = {"id": "chatcmpl-upstream" if chat else "cmpl-upstream", "created": 1, "model": "upstream"}

    def begin(self, usage: Usage) -> bytes:
        return self._delta({"role": "assistant", "content": ""}) if self._chat else b""

    def think(self, text: str) -> bytes:
        self._thoughts.append(text)
        return self._delta({"reasoning_content": text})

    def word(self, text: str) -> bytes:
        self._text.append(text)
        return self._delta({"content": text})

    def call(self, index: int, name: str, arguments: str) -> Sequence[bytes]:
        call = {"id": f"call_{index}", "type": "function"}
        self._calls.append({**call, "function": {"name": name, "arguments": arguments}})
        start = {"index": index, **call, "function": {"name": name, "arguments": ""}}
        pieces = [{"index": index, "function": {"arguments": half}} for half in halves(arguments)]
        return [self._delta({"tool_calls": [piece]}) for piece in (start, *pieces)]

    def end(self, reason: str, usage: Usage) -> bytes:
        used = {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
        }
        if self._asked.stream:
            last = self._delta({}, reason)
            if self._asked.include_usage:
                last += sse({**self._common, "object": "chat.completion.chunk", "choices": [], "usage": used})
            return last + b"data: [DONE]\n\n"
        text = "".join(self._text)
        message = {"role": "assistant", "content": text or None, "tool_calls": self._calls or None}
        if self._thoughts:
            message["reasoning_content"] = "".join(self._thoughts)
        shown = {"message": message} if self._chat else {"text": text}
        choice = {"index": 0, **shown, "finish_reason": reason, "logprobs": None}
        kind = "chat.completion" if self._chat else "text_completion"
        return json.dumps({**self._common, "object": kind, "choices": [choice], "usage": used}).encode()

    def _delta(self, delta: dict[str, Any], reason: str | None = None) -> bytes:
        if not self._asked.stream:
            return b""
        shown = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice = {"index": 0, **shown, "finish_reason": reason, "logprobs": None}
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return sse({**self._common, "object": kind, "choices": [choice]})


class AnthropicServer(ModelServer):
    """`/messages`, `/models`."""

    base_path = "/v1"

    def check_key(self, headers: dict[str, str]) -> None:
        if headers.get("x-api-key") != KEY:
            raise Refusal(401, _anthropic_error("authentication_error", "invalid x-api-key"))
        if "anthropic-version" not in headers:
            raise Refusal(400, _anthropic_error("invalid_request_error", "anthropic-version: header is required"))

    def ask(self, path: str, body: Any) -> Asked | bytes:
        if path == "/models":
            return b'{"data":[],"has_more":false}'
        if path != "/messages":
            raise Refusal(404, _anthropic_error("not_found_error", "Not found"))
        if "max_tokens" not in body:
            raise Refusal(400, _anthropic_error("invalid_request_error", "max_tokens: Field required"))
        for message in body["messages"]:
            if message["role"] not in ("user", "assistant"):
                raise Refusal(400, _anthropic_error("invalid_request_error", "messages: Unexpected role"))
        texts = [body.get("system", ""), *(texts_of(message["content"]) for message in body["messages"])]
        return Asked(
            prompt=" ".join(texts),
            max_tokens=body["max_tokens"],
            stop=body.get("stop_sequences") or [],
            tools=[tool["name"] for tool in body.get("tools") or ()],
            stream=True,
        )

    def too_long(self, needed: int) -> Refusal:
        message = f"prompt is too long: {needed} tokens > {self.context} maximum"
        return Refusal(400, _anthropic_error("invalid_request_error", message))

    def overloaded(self) -> Refusal:
        return Refusal(529, _anthropic_error("overloaded_error", "Overloaded"), {"retry-after": "7"})

    def open(self, path: str, asked: Asked) -> Writer:
        return _AnthropicWriter()


def _anthropic_error(kind: str, message: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}


class _AnthropicWriter(Writer):
    """Blocks are numbered; one ends where another begins."""

    def __init__(self) -> None:
        self._block = -1
        self._kind = ""

    def begin(self, usage: Usage) -> bytes:
        used = {"input_tokens": usage.prompt, "cache_read_input_tokens": 0, "output_tokens": 1}
        message = {"id": "msg_1", "type": "message", "role": "assistant", "content": [], "usage": used}
        return self._event("message_start", message=message) + self._event("ping")

    def think(self, text: str) -> bytes:
        start = self._switch("thinking", {"type": "thinking", "thinking": ""})
        signature = self._event("content_block_delta", delta={"type": "signature_delta", "signature": "c2ln"})
        return (
            start + self._event("content_block_delta", delta={"type": "thinking_delta", "thinking": text}) + signature
        )

    def word(self, text: str) -> bytes:
        start = self._switch("text", {"type": "text", "text": ""})
        return start + self._event("content_block_delta", delta={"type": "text_delta", "text": text})

    def call(self, index: int, name: str, arguments: str) -> Sequence[bytes]:
        block = {"type": "tool_use", "id": f"toolu_{index}", "name": name, "input": {}}
        pieces = ("", *halves(arguments))
        return [
            self._switch(f"tool {index}", block),
            *(
                self._event("content_block_delta", delta={"type": "input_json_delta", "partial_json": piece})
                for piece in pieces
            ),
        ]

    def end(self, reason: str, usage: Usage) -> bytes:
        said = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}[reason]
        return (
            self._switch("", None)
            + self._event(
                "message_delta",
                delta={"stop_reason": said, "stop_sequence": None},
                usage={"output_tokens": usage.completion},
            )
            + self._event("message_stop")
        )

    def _switch(self, kind: str, block: dict[str, Any] | None) -> bytes:
        if kind == self._kind:
            return b""
        out = self._event("content_block_stop") if self._kind else b""
        self._kind = kind
        if block is None:
            return out
        self._block += 1
        return out + self._event("content_block_start", content_block=block)

    def _event(self, kind: str, **fields: Any) -> bytes:
        where = {"index": self._block} if kind.startswith("content_block") else {}
        return sse({"type": kind, **where, **fields}, kind)


class OllamaServer(ModelServer):
    """`/api/chat`, `/api/generate`, `/api/embed`, `/api/version`."""

    def check_key(self, headers: dict[str, str]) -> None:
        if headers.get("authorization") != f"Bearer {KEY}":
            raise Refusal(401, {"error": "unauthorized"})

    def ask(self, path: str, body: Any) -> Asked | bytes:
        if path == "/api/version":
            return b'{"version":"0.12.9"}'
        if path == "/api/embed":
            words = sum(len(text.split()) for text in body["input"])
            vectors = [[1.0, 0.0] for _ in body["input"]]
            return json.dumps({"model": "m", "embeddings": vectors, "prompt_eval_count": words}).encode()
        if path not in ("/api/chat", "/api/generate"):
            raise Refusal(404, {"error": "page not found"})
        options = body["options"]
        self.context = options["num_ctx"]
        for message in body.get("messages") or ():
            assert isinstance(message["content"], str), "parts are not known here"
        texts = [message["content"] for message in body.get("messages") or ()]
        return Asked(
            prompt=" ".join(texts) if texts else body["prompt"],
            max_tokens=options.get("num_predict"),
            stop=options.get("stop") or [],
            tools=[tool["function"]["name"] for tool in body.get("tools") or ()],
            stream=True,
        )

    def too_long(self, needed: int) -> Refusal:
        return Refusal(400, {"error": "the input length exceeds the context length"})

    def overloaded(self) -> Refusal:
        return Refusal(503, {"error": "server busy, please try again.  maximum pending requests exceeded"})

    def open(self, path: str, asked: Asked) -> Writer:
        return _OllamaWriter(chat=path == "/api/chat")


class _OllamaWriter(Writer):
    media_type = "application/x-ndjson"

    def __init__(self, *, chat: bool) -> None:
        self._chat = chat

    def begin(self, usage: Usage) -> bytes:
        return b""

    def think(self, text: str) -> bytes:
        return self._line("", thinking=text)

    def word(self, text: str) -> bytes:
        return self._line(text)

    def call(self, index: int, name: str, arguments: str) -> Sequence[bytes]:
        function = {"index": index, "name": name, "arguments": json.loads(arguments)}
        return [self._line("", tool_calls=[{"function": function}])]

    def end(self, reason: str, usage: Usage) -> bytes:
        counts = {"prompt_eval_count": usage.prompt, "eval_count": usage.completion, "total_duration": 1}
        return self._line("", done_reason="length" if reason == "length" else "stop", done=True, **counts)

    def _line(self, text: str, *, done: bool = False, **fields: Any) -> bytes:
        own = {name: fields.pop(name) for name in ("thinking", "tool_calls") if name in fields}
        shown = {"message": {"role": "assistant", "content": text, **own}} if self._chat else {"response": text, **own}
        line = {"model": "m", "created_at": "2026-11-23T08:00:00Z", **shown, "done": done, **fields}
        return json.dumps(line).encode() + b"\n"
