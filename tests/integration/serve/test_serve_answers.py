"""What `helixflow serve` answers without any configuration: chat, and real embeddings from the first use on."""

import base64
import struct
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helixflow.engines.tokenizer import TextTokenizer
from helixflow.pool.manifest import StoredModel
from tests.harness.node import CHAT, CHAT_MODEL, EMBEDDING_MODEL, EMBEDDINGS, Node

TEXTS = [
    "What is the capital of France?",
    "서울은 대한민국의 수도이며 가장 큰 도시이다.",
    "दिल्ली भारत की राजधानी है।",
    "def f(x: int) -> int: return x ** 2  # 🎉",
]


@pytest.fixture(scope="module")
def tokenizer(embedding_model: StoredModel) -> TextTokenizer:
    return TextTokenizer(str(embedding_model.tokenizer_path))


@pytest.fixture(scope="module")
def reference() -> Any:
    """A plain BERT over the original weights."""
    path = Path(__file__).parents[1] / "pool" / "reference_bert.py"
    spec = util.spec_from_file_location("reference_bert", path)
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ReferenceBert(Path.home() / ".cache" / "helixflow-tests" / "all-minilm-l6-v2")


async def embed(node: Node, content: Any, **fields: Any) -> list[Any]:
    """The embeddings, checked to be complete and in order."""
    answer = await node.ask("POST", EMBEDDINGS, {"model": EMBEDDING_MODEL, "input": content, **fields})
    assert answer.status == 200, answer.body
    assert answer.json["model"] == EMBEDDING_MODEL
    assert [entry["index"] for entry in answer.json["data"]] == list(range(len(answer.json["data"])))
    return [entry["embedding"] for entry in answer.json["data"]]


async def test_both_models_are_served_and_the_second_is_loaded_on_first_use(node: Node) -> None:
    """First in this folder: the embedding model must not have been asked yet."""
    states = (await node.ask("GET", "/health")).json["deployments"]
    assert states == {f"{CHAT_MODEL}/llama_cpp-0": "ready", f"{EMBEDDING_MODEL}/llama_cpp-0": "idle"}
    (vector,) = await embed(node, "hello")
    assert len(vector) == 384
    await node.until_states(dict.fromkeys(states, "ready"))
    assert [model["id"] for model in (await node.ask("GET", "/v1/models")).json["data"]] == [
        CHAT_MODEL,
        EMBEDDING_MODEL,
    ]


async def test_the_capital_of_france(node: Node) -> None:
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
    ]
    body = {"model": CHAT_MODEL, "messages": messages, "temperature": 0, "max_tokens": 32}
    answer = await node.ask("POST", CHAT, body)
    assert answer.status == 200
    assert "Paris" in answer.json["choices"][0]["message"]["content"]
    assert answer.headers["x-helixflow-deployment"] == f"{CHAT_MODEL}/llama_cpp-0"


async def test_vectors_through_the_gateway_are_those_of_the_original_weights(
    node: Node, tokenizer: TextTokenizer, reference: Any
) -> None:
    for text, vector in zip(TEXTS, await embed(node, TEXTS), strict=True):
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-4)
        assert float(np.array(vector) @ reference.embed(tokenizer.encode(text))) >= 0.999, text


async def test_base64_is_the_same_vector(node: Node) -> None:
    (plain,) = await embed(node, TEXTS[0], encoding_format="float")
    (packed,) = await embed(node, TEXTS[0], encoding_format="base64")
    assert np.array(plain) == pytest.approx(np.array(struct.unpack("<384f", base64.b64decode(packed))), abs=1e-7)


async def test_arrays_keep_their_order_and_token_ids_are_the_same_text(node: Node, tokenizer: TextTokenizer) -> None:
    texts = [f"{word} is what this text is about" for word in ("rain", "tax", "music", "iron", "cats", "law", "bread")]
    together = await embed(node, texts)
    ids = [tokenizer.encode(text) for text in texts]
    assert np.array(await embed(node, ids)) == pytest.approx(np.array(together), abs=1e-4)
    for text, vector in list(zip(texts, together, strict=True))[::3]:
        (alone,) = await embed(node, text)
        assert np.array(alone) @ np.array(vector) >= 0.9999
    (one,) = await embed(node, ids[0])
    assert np.array(one) == pytest.approx(np.array(together[0]), abs=1e-4)


@pytest.mark.parametrize(
    ("fields", "code", "param", "words"),
    [
        ({"input": "x", "dimensions": 256}, "unsupported_parameter", "dimensions", ["384", "dimensions"]),
        ({"input": "word " * 511}, "context_length_exceeded", "input", ["512", "513"]),
        ({"input": ["x", "word " * 600]}, "context_length_exceeded", "input[1]", ["512", "602"]),
        ({"input": ""}, None, "input", []),
        ({"input": []}, None, "input", []),
        ({"input": ["x", ""]}, None, "input[1]", []),
        ({"input": [10**6]}, None, "input", ["30521"]),
        ({"input": {"text": "x"}}, None, "input", []),
        ({"input": "x", "encoding_format": "hex"}, None, "encoding_format", []),
        ({"input": "x", "model": CHAT_MODEL}, "unsupported_parameter", "model", [CHAT_MODEL, "chat/completions"]),
    ],
)
async def test_bad_embedding_requests_are_400(
    node: Node, fields: dict[str, Any], code: str | None, param: str, words: list[str]
) -> None:
    answer = await node.ask("POST", EMBEDDINGS, {"model": EMBEDDING_MODEL, **fields})
    assert answer.status == 400, answer.body
    assert answer.error["param"] == param
    assert code in (None, answer.error["code"])
    assert all(word in answer.error["message"] for word in words), answer.error


async def test_chat_with_the_embedding_model_is_400(node: Node) -> None:
    answer = await node.chat(model=EMBEDDING_MODEL)
    assert answer.status == 400
    assert answer.error["param"] == "model"
    assert "embeddings" in answer.error["message"]
