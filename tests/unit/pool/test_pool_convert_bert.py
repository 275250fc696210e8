"""The converter on a model of a few numbers, and on files that are none."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from helixflow.pool.convert_bert import convert, phantom_space, read_safetensors, read_vocabulary, rename_tensor

CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 4,
    "intermediate_size": 8,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "type_vocab_size": 2,
    "vocab_size": 7,
}
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word", "##s"]
TOKENIZER = {
    "model": {
        "type": "WordPiece",
        "continuing_subword_prefix": "##",
        "vocab": {token: index for index, token in enumerate(TOKENS)},
    }
}
SHAPES = {
    "embeddings.word_embeddings.weight": (7, 4),
    "embeddings.position_embeddings.weight": (16, 4),
    "embeddings.token_type_embeddings.weight": (2, 4),
    "embeddings.LayerNorm.weight": (4,),
    "embeddings.LayerNorm.bias": (4,),
    **{
        f"encoder.layer.0.{part}.{kind}": shape if kind == "weight" else shape[:1]
        for part, shape in {
            "attention.self.query": (4, 4),
            "attention.self.key": (4, 4),
            "attention.self.value": (4, 4),
            "attention.output.dense": (4, 4),
            "attention.output.LayerNorm": (4,),
            "intermediate.dense": (8, 4),
            "output.dense": (4, 8),
            "output.LayerNorm": (4,),
        }.items()
        for kind in ("weight", "bias")
    },
    "pooler.dense.bias": (4,),
}


def write_model(folder: Path, **changes: Any) -> Path:
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for index, (name, shape) in enumerate(SHAPES.items()):
        raw = np.full(shape, index, dtype="<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}  # type: ignore[dict-item]
        data += raw
    header.update(changes.get("header", {}))
    head = json.dumps({name: entry for name, entry in header.items() if entry is not None}).encode()
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + data)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes.get("config", {})}))
    (folder / "tokenizer.json").write_text(json.dumps(changes.get("tokenizer", TOKENIZER)))
    return folder


def test_a_small_model(tmp_path: Path) -> None:
    convert(write_model(tmp_path), tmp_path / "a.gguf")
    convert(tmp_path, tmp_path / "b.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == len(SHAPES) - 1
    query = tensors["blk.0.attn_q.weight"]
    assert query.tensor_type == gguf.GGMLQuantizationType.F16
    assert np.all(query.data == list(SHAPES).index("encoder.layer.0.attention.self.query.weight"))
    assert tensors["position_embd.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    assert list(tensors["blk.0.ffn_up.weight"].shape) == [4, 8]
    assert reader.fields["bert.context_length"].contents() == 16
    assert reader.fields["bert.attention.causal"].contents() is False
    assert reader.fields["bert.pooling_type"].contents() == gguf.PoolingType.MEAN
    assert reader.fields["tokenizer.ggml.tokens"].contents()[-2:] == ["\u2581word", "s"]
    assert reader.fields["tokenizer.ggml.seperator_token_id"].contents() == 3


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": {"model_type": "gpt2"}}, "only BERT"),
        ({"config": {"position_embedding_type": "relative_key"}}, "only absolute"),
        ({"config": {"num_hidden_layers": 2}}, "missing or too many"),
        ({"config": {"vocab_size": 8}}, "7 tokens, the model 8"),
        ({"tokenizer": {"model": {"type": "BPE"}}}, "not WordPiece"),
        ({"header": {"embeddings.LayerNorm.bias": None}}, "missing or too many"),
        ({"header": {"strange": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}, "unknown tensor"),
        ({"header": {"x": {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]}}}, "only F32"),
        ({"header": {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}}, "does not fit"),
        ({"header": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [1 << 40, (1 << 40) + 4]}}}, "does not fit"),
        ({"header": {"x": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}}, "does not fit"),
    ],
)
def test_what_it_cannot_convert_it_refuses(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        convert(write_model(tmp_path, **changes), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("data", [b"", b"\x01", b"\xff" * 8 + b"{}", b"\x40" + b"\0" * 7 + b"{}"])
def test_a_file_that_is_no_safetensors(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match="bad header length"):
        read_safetensors(tmp_path / "m.safetensors")


def test_names_and_tokens() -> None:
    assert rename_tensor("encoder.layer.3.output.dense.weight") == "blk.3.ffn_down.weight"
    assert rename_tensor("encoder.layer.3.attention.output.LayerNorm.bias") == "blk.3.attn_output_norm.bias"
    assert [phantom_space(token) for token in ("[CLS]", "##ing", "hi")] == ["[CLS]", "ing", "\u2581hi"]
    with pytest.raises(ValueError, match="tokens"):
        read_vocabulary({"model": {**TOKENIZER["model"], "vocab": {"a": 0, "b": 2}}}, 2)
