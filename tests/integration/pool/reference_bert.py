"""A plain BERT sentence encoder in numpy, from the original F32 weights: the yardstick for what llama.cpp answers."""

import json
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


class ReferenceBert:
    """Mean-pooled, L2-normalised sentence vectors. Exact erf-GELU, float64 throughout, one text at a time."""

    def __init__(self, folder: Path) -> None:
        self._config = json.loads((folder / "config.json").read_text())
        raw = (folder / "model.safetensors").read_bytes()
        length = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + length])
        self._weights = {
            name: np.frombuffer(
                raw[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]], "<f4"
            )
            .reshape(entry["shape"])
            .astype(np.float64)
            for name, entry in header.items()
            if name != "__metadata__" and entry["dtype"] == "F32"
        }

    def embed(self, ids: list[int]) -> Vector:
        """The vector of one sequence of token ids, special tokens included."""
        weights = self._weights
        x = weights["embeddings.word_embeddings.weight"][ids]
        x = x + weights["embeddings.position_embeddings.weight"][: len(ids)]
        x = x + weights["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for layer in range(self._config["num_hidden_layers"]):
            prefix = f"encoder.layer.{layer}"
            attended = self._linear(self._attention(x, prefix), f"{prefix}.attention.output.dense")
            x = self._norm(x + attended, f"{prefix}.attention.output.LayerNorm")
            inner = gelu(self._linear(x, f"{prefix}.intermediate.dense"))
            x = self._norm(x + self._linear(inner, f"{prefix}.output.dense"), f"{prefix}.output.LayerNorm")
        pooled: Vector = x.mean(axis=0)
        return pooled / np.linalg.norm(pooled)

    def _attention(self, x: Vector, prefix: str) -> Vector:
        heads = self._config["num_attention_heads"]
        query, key, value = (
            self._linear(x, f"{prefix}.attention.self.{part}").reshape(len(x), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = query @ key.transpose(0, 2, 1) / math.sqrt(query.shape[-1])
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed: Vector = (scores / scores.sum(axis=-1, keepdims=True)) @ value
        return mixed.transpose(1, 0, 2).reshape(len(x), -1)

    def _linear(self, x: Vector, name: str) -> Vector:
        result: Vector = x @ self._weights[f"{name}.weight"].T + self._weights[f"{name}.bias"]
        return result

    def _norm(self, x: Vector, name: str) -> Vector:
        centred = x - x.mean(axis=-1, keepdims=True)
        scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + self._config["layer_norm_eps"])
        result: Vector = centred / scale * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return result


def gelu(x: Vector) -> Vector:
    """The exact form, by the error function."""
    result: Vector = 0.5 * x * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2.0)))
    return result
