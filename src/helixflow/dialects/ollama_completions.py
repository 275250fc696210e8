"""Ollama's own API for what is not chat: `POST /api/generate` and `POST /api/embed`.

https://docs.ollama.com/api/generate and …/api/embed. A prompt is continued as it stands (`raw`), as with OpenAI;
only for filling in the middle (`suffix`) does the model's own template decide how.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import Raw, Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.neutral import unsupported
from helixflow.dialects.ollama_chat import OPTIONS, write_options
from helixflow.dialects.openai_completions import DEFAULT_MAX_TOKENS, CompletionParams
from helixflow.dialects.openai_embeddings import EmbeddingParams

# What would have to change the answer, by the value that asks for nothing.
_UNKNOWN: Final[Mapping[str, frozenset[bytes]]] = {
    "n": frozenset({b"1"}),
    "best_of": frozenset({b"1"}),
    "echo": frozenset({b"false"}),
    "logprobs": frozenset(),
    "logit_bias": frozenset({b"{}"}),
}


def write_generate(params: CompletionParams, fields: Mapping[str, Raw], model: str, context: int) -> bytes:
    """The body of `POST /api/generate`, always streamed.

    Raises `HelixError` UNSUPPORTED for what the API cannot do, naming the parameter.
    """
    for name, nothing in _UNKNOWN.items():
        said = bytes(fields.get(name, b"null"))
        if said != b"null" and said not in nothing:
            raise unsupported(name)
    prompts = params.prompts
    if len(prompts) > 1:
        raise unsupported("prompt", "send one prompt a request")
    prompt = prompts[0]
    if not isinstance(prompt, str):
        raise unsupported("prompt", "send text instead of token ids")
    stop = [params.stop] if isinstance(params.stop, str) else params.stop
    others = {name: value for name, value in fields.items() if name in OPTIONS and bytes(value) != b"null"}
    body: dict[str, Any] = {
        "model": model,
        "prompt": prompt,
        "stream": True,
        "truncate": False,
        "shift": False,
        "options": write_options(
            context,
            others,
            num_predict=DEFAULT_MAX_TOKENS if params.max_tokens is None else params.max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            stop=stop or None,
        ),
    }
    if params.suffix:
        body["suffix"] = params.suffix
    else:
        body["raw"] = True
    return msgspec.json.encode(body)


def write_embed(params: EmbeddingParams, model: str) -> bytes:
    """The body of `POST /api/embed`. Raises `HelixError` UNSUPPORTED for token ids."""
    inputs = params.inputs
    for entry in inputs:
        if not isinstance(entry, str):
            raise unsupported("input", "send text instead of token ids")
    body: dict[str, Any] = {"model": model, "input": inputs, "truncate": False}
    if params.dimensions is not None:
        body["dimensions"] = params.dimensions
    return msgspec.json.encode(body)


class Embeddings(Struct, frozen=True):
    """The answer of `POST /api/embed`."""

    embeddings: list[list[float]]
    prompt_eval_count: int = 0


_EMBEDDINGS: Final = msgspec.json.Decoder(Embeddings)


def read_embed(body: bytes, count: int) -> Embeddings:
    """The answer for `count` inputs. Raises `HelixError` UPSTREAM_INVALID for anything else."""
    try:
        answer = _EMBEDDINGS.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError) as exc:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent embeddings that are not valid.") from exc
    if len(answer.embeddings) != count or len({len(vector) for vector in answer.embeddings}) != 1:
        raise HelixError(ErrorKind.UPSTREAM_INVALID, "The model's server sent other embeddings than it was asked for.")
    return answer
