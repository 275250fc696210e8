"""BERT sentence encoders from safetensors to GGUF: `python -m helixflow.pool.convert_bert FOLDER OUTPUT`.

Runs as a process of its own, so that numpy stays out of the control plane. FOLDER holds `config.json`,
`tokenizer.json` and `model.safetensors` (F32). The output is the same bytes for the same input: no times, paths or
library versions enter it. Names and types follow llama.cpp's own converter: matrices in F16 (half the size, cosine to
F32 above 0.99999), position and type embeddings, biases and norms in F32.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]

MAX_HEADER_BYTES: Final = 16 * 2**20
_LAYER: Final = re.compile(r"encoder\.layer\.(\d+)\.(.+)\.(weight|bias)")
_LAYER_NAMES: Final = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}
_EMBEDDING_NAMES: Final = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm.weight": "token_embd_norm.weight",
    "embeddings.LayerNorm.bias": "token_embd_norm.bias",
}
_UNUSED: Final = frozenset({"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"})
_ALWAYS_F32: Final = frozenset({"position_embd.weight", "token_types.weight"})
_SPECIAL: Final = {"unknown": "[UNK]", "seperator": "[SEP]", "padding": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}


def read_safetensors(path: Path) -> dict[str, Array]:
    """Name → F32 array, mapped from the file (nothing is read until it is used).

    Raises `ValueError` for a header that does not fit the file. https://huggingface.co/docs/safetensors#format
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ValueError("not a safetensors file: bad header length")
        header = json.loads(file.read(length))
    data_start, tensors = 8 + length, {}
    for name, entry in header.items():
        if name == "__metadata__" or name in _UNUSED:
            continue
        shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
        if entry["dtype"] != "F32":
            raise ValueError(f"tensor {name!r} is {entry['dtype']}, only F32 is converted")
        if not 0 <= start <= end <= size - data_start or end - start != 4 * int(np.prod(shape, dtype=np.int64)):
            raise ValueError(f"tensor {name!r} does not fit the file")
        tensors[name] = np.memmap(path, dtype="<f4", mode="r", offset=data_start + start, shape=shape)
    return tensors  # type: ignore[return-value]


def rename_tensor(name: str) -> str:
    """GGUF's name of a BERT tensor. Raises `ValueError` for one that BERT does not have."""
    if name in _EMBEDDING_NAMES:
        return _EMBEDDING_NAMES[name]
    match = _LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise ValueError(f"unknown tensor {name!r}")
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def read_vocabulary(tokenizer: dict[str, Any], size: int) -> list[str]:
    """Tokens by id. Raises `ValueError` unless this is a WordPiece vocabulary of `size` tokens without gaps."""
    model = tokenizer["model"]
    if model["type"] != "WordPiece" or model.get("continuing_subword_prefix") != "##":
        raise ValueError("the tokenizer is not WordPiece")
    by_id = {index: token for token, index in model["vocab"].items()}
    if sorted(by_id) != list(range(size)):
        raise ValueError(f"the tokenizer has {len(by_id)} tokens, the model {size}")
    return [by_id[index] for index in range(size)]


def phantom_space(token: str) -> str:
    """WordPiece's marks turned round, as llama.cpp wants them: the start of a word is marked, not its rest."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token[2:] if token.startswith("##") else "\u2581" + token


def convert(folder: Path, output: Path) -> None:
    """Writes `output`. Raises `ValueError`, `KeyError` or `OSError` when the folder does not hold such a model."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "bert" or config["hidden_act"] != "gelu":
        raise ValueError("only BERT with GELU is converted")
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError("only absolute position embeddings are converted")
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = read_vocabulary(tokenizer, config["vocab_size"])
    tensors = dict(_arrays(read_safetensors(folder / "model.safetensors"), config["num_hidden_layers"]))

    writer = gguf.GGUFWriter(output, "bert")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_token_list([phantom_space(token) for token in tokens])
    kinds = [gguf.TokenType.CONTROL if token in _SPECIAL.values() else gguf.TokenType.NORMAL for token in tokens]
    writer.add_token_types(kinds)
    for role, token in _SPECIAL.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", tokens.index(token))

    for name, array in tensors.items():
        dtype = _stored_type(name, array)
        writer.add_tensor_info(name, array.shape, dtype, array.size * dtype.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # One tensor at a time: converting all of them first would hold the model in memory twice.
    for name, array in tensors.items():
        writer.write_tensor_data(np.ascontiguousarray(array, dtype=_stored_type(name, array)))
    writer.close()


def _arrays(tensors: dict[str, Array], layers: int) -> Iterator[tuple[str, Array]]:
    renamed = {rename_tensor(name): array for name, array in tensors.items()}
    expected = [*_EMBEDDING_NAMES.values()]
    for layer in range(layers):
        expected += [f"blk.{layer}.{part}.{kind}" for part in _LAYER_NAMES.values() for kind in ("weight", "bias")]
    if set(renamed) != set(expected):
        raise ValueError(f"tensors missing or too many: {sorted(set(renamed) ^ set(expected))[:3]}")
    return ((name, renamed[name]) for name in expected)


def _stored_type(name: str, array: Array) -> np.dtype[Any]:
    return np.dtype(np.float16 if array.ndim == 2 and name not in _ALWAYS_F32 else np.float32)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
