"""vLLM's API over the toy model of `model_server`: compact events that name token ids, prompts of ids, metrics.

Words of the count are their positions as ids, so a prompt of ids is gone on from where it ends.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tests.harness.model_server import KEY, PACE_S, WORDS, Asked, Died, Refusal, Usage
from tests.harness.provider_servers import OpenAIServer, OpenAIWriter

PROMPT_ID = 1000


class VllmServer(OpenAIServer):
    """`OpenAIServer` with vLLM's further fields and paths; `models` are the names it serves, `adapters` the folders of
    the LoRA adapters that it has, by their names. A folder that ends in `missing` cannot be loaded.
    """

    def __init__(
        self,
        *,
        context: int = 512,
        key: str = KEY,
        models: Sequence[str] = ("m",),
        pace_s: float = PACE_S,
        port: int = 0,
    ) -> None:
        super().__init__(context=context, port=port)
        self._key = key
        self._models = models
        self.adapters: dict[str, str] = {}
        self.is_sleeping = False
        self._pace_s = pace_s

    def check_key(self, headers: dict[str, str]) -> None:
        if headers.get("authorization") != f"Bearer {self._key}":
            raise Refusal(401, {"error": "Unauthorized"})

    def ask(self, path: str, body: Any) -> Asked | bytes:
        if path == "/health":
            return b""
        if path == "/metrics":
            labels = '{engine="0",model_name="m"}'
            lines = (f"vllm:num_requests_running{labels} {self.running}.0", f"vllm:num_requests_waiting{labels} 0.0")
            return ("# HELP\n" + "\n".join(lines) + "\n").encode()
        if path == "/models":
            entries: list[dict[str, Any]] = [
                {"id": name, "object": "model", "parent": None, "max_model_len": self.context} for name in self._models
            ]
            entries += [{"id": name, "root": path, "parent": "m"} for name, path in self.adapters.items()]
            return json.dumps({"object": "list", "data": entries}).encode()
        if path == "/is_sleeping":
            return json.dumps({"is_sleeping": self.is_sleeping}).encode()
        if path in ("/sleep?level=1", "/wake_up"):
            self.is_sleeping = path != "/wake_up"
            return b"{}"
        if path == "/load_lora_adapter":
            return self._load(body["lora_name"], body["lora_path"])
        if path == "/unload_lora_adapter":
            if self.adapters.pop(body["lora_name"], None) is None:
                raise Refusal(404, _error("The lora adapter cannot be found.", 404, "lora_name"))
            return b"Success"
        if body["model"] not in (*self._models, *self.adapters):
            raise Refusal(404, _error(f"The model `{body['model']}` does not exist.", 404, "model"))
        ids = body.get("prompt") if path == "/completions" and isinstance(body.get("prompt"), list) else None
        if ids is not None:
            body = {**body, "prompt": " ".join(_word(number).strip() for number in ids)}
        if path == "/chat/completions" and (body.get("max_tokens") or 0) > self.context:
            raise Refusal(400, _error("max_tokens=… cannot be greater than max_model_len=….", 400, "max_tokens"))
        asked = super().ask(path, body)
        if isinstance(asked, Asked):
            asked.position = ids[-1] + 1 if ids and ids[-1] < PROMPT_ID else 0
            asked.ids = bool(body.get("return_token_ids"))
        return asked

    def _load(self, name: str, path: str) -> bytes:
        if name in self.adapters:
            raise Refusal(400, _error(f"The lora adapter '{name}' has already been loaded.", 400, "lora_name"))
        if path.endswith("missing"):
            raise Refusal(404, _error(f"Loading lora {name} failed: No adapter found for {path}", 404, "lora_path"))
        self.adapters[name] = path
        return b"Success"

    def too_long(self, needed: int) -> Refusal:
        return Refusal(
            400,
            _error(
                f"This model's maximum context length is {self.context} tokens. However, your prompt contains at least "
                f"{needed} input tokens. (parameter=input_tokens, value={needed})",
                400,
                "input_tokens",
            ),
        )

    def open(self, path: str, asked: Asked) -> "_VllmWriter":
        return _VllmWriter(asked, chat=path == "/chat/completions")

    async def _count(self, asked: Asked, writer: Any) -> AsyncIterator[bytes | str]:
        position = asked.position
        while "for ever" in asked.prompt or position < len(WORDS):
            if asked.max_tokens is not None and self.usage.completion >= asked.max_tokens:
                yield "length"
                return
            word = WORDS[position % len(WORDS)]
            if any(stop in word for stop in asked.stop):
                break
            if "die late" in asked.prompt and position == 3:
                raise Died
            self.usage.completion += 1
            yield writer.word(word)
            position += 1
            await asyncio.sleep(self._pace_s)
        yield "stop"


class _VllmWriter(OpenAIWriter):
    def __init__(self, asked: Asked, *, chat: bool) -> None:
        super().__init__(asked, chat=chat)
        self._position = asked.position
        self._prompt: list[int] | None = None
        self._common = {**self._common, "model": "m"}

    def begin(self, usage: Usage) -> bytes:
        self._prompt = [PROMPT_ID + number for number in range(usage.prompt)]
        return super().begin(usage)

    def word(self, text: str) -> bytes:
        self._text.append(text)
        number, self._position = self._position, self._position + 1
        return self._delta({"content": text}, token=number % len(WORDS))

    def _delta(self, delta: dict[str, Any], reason: str | None = None, token: int | None = None) -> bytes:
        if not self._asked.stream:
            return b""
        shown = {"delta": delta} if self._chat else {"text": delta.get("content", "")}
        choice: dict[str, Any] = {"index": 0, **shown, "logprobs": None, "finish_reason": reason}
        event = {**self._common, "object": "chat.completion.chunk" if self._chat else "text_completion"}
        event["choices"] = [choice]
        if self._asked.ids:
            prompt, self._prompt = self._prompt, None
            if self._chat and prompt is not None:
                event |= {"prompt_token_ids": prompt, "prompt_text": None}
            elif not self._chat:
                choice["prompt_token_ids"] = prompt
            if token is not None:
                choice["token_ids"] = [token]
        return b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"


def _word(number: int) -> str:
    return "p" if number >= PROMPT_ID else WORDS[number]


def _error(message: str, status: int, param: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": param, "code": status}}
