"""OpenAI embeddings: request and answer. https://platform.openai.com/docs/api-reference/embeddings/create"""

import base64
import struct
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from helixflow.core.errors import ErrorKind, HelixError
from helixflow.dialects.openai_chat import ModelName
from helixflow.dialects.openai_completions import TokenId
from helixflow.dialects.validation import decode_params

MAX_INPUTS = 2048


class EmbeddingParams(Struct, frozen=True):
    """What we check and act upon. `input` is resolved by `inputs`."""

    model: ModelName
    input: str | list[str | TokenId | list[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    user: str | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """One entry an input: text or token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [[token for token in self.input if isinstance(token, int)]]
        return [entry for entry in self.input if not isinstance(entry, int)]


_DECODER = msgspec.json.Decoder(EmbeddingParams)
_ELEMENTS: dict[str, msgspec.json.Decoder[Any]] = {"input": msgspec.json.Decoder(str | TokenId | list[TokenId])}


def parse_embedding(body: bytes) -> EmbeddingParams:
    """The validated request. Raises `HelixError` with `param` naming the field."""
    params = decode_params(body, _DECODER, _ELEMENTS)
    if isinstance(params.input, list) and len({type(entry) for entry in params.input}) > 1:
        raise _invalid("input", "'input' must not mix strings, token ids and arrays")
    inputs = params.inputs
    if not inputs:
        raise _invalid("input", "'input' must not be an empty array")
    if len(inputs) > MAX_INPUTS:
        raise _invalid("input", f"'input' has {len(inputs)} entries; at most {MAX_INPUTS} are allowed in one request")
    for index, entry in enumerate(inputs):
        if not entry:
            name = "input" if len(inputs) == 1 else f"input[{index}]"
            raise _invalid(name, f"'{name}' must not be empty")
    return params


def encode_embeddings(
    model: str,
    vectors: Sequence[Sequence[float]],
    prompt_tokens: int,
    encoding_format: Literal["float", "base64"] | None,
) -> bytes:
    """The answer's JSON. base64 is little-endian float32, as the official SDKs expect."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
            if encoding_format == "base64"
            else vector,
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return msgspec.json.encode({"object": "list", "data": data, "model": model, "usage": usage})


def _invalid(param: str, message: str) -> HelixError:
    return HelixError(ErrorKind.INVALID_VALUE, f"Invalid request: {message}.", param=param)
