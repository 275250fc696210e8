"""The converted embedding model under llama.cpp, against the original weights."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helixflow.engines.tokenizer import TextTokenizer
from helixflow.pool.store import StoredModel

TEXTS = {
    "word": "hello",
    "empty": "",
    "sentence": "The quick brown fox jumps over the lazy dog.",
    "question": "What is the capital of France?",
    "korean": "안녕하세요, 오늘 서울의 날씨는 어떻습니까?",
    "hindi": "नमस्ते, आप कैसे हैं? आज मौसम बहुत अच्छा है।",
    "bengali": "আমি বাংলায় গান গাই, আমি বাংলার গান গাই।",
    "japanese": "東京は日本の首都です。今日はいい天気ですね。",
    "arabic": "مرحبا بالعالم، كيف حالك اليوم؟",
    "accents": "Crème brûlée à l'Été: naïve façade, Ångström, Zürich.",
    "emoji": "I love this 🎉🚀 so much 👩‍👩‍👧‍👦!",
    "code": "def f(x: int) -> int:\n    return x ** 2  # squared",
    "numbers": "3.14159, 2.71828 and 1,000,000 € on 2026-11-22",
    "spaces": "  many   spaces\tand\n\nnew lines  ",
    "long": "A gateway admits a request, reserves its budget and forwards it to an engine that is ready. " * 26,
}

SERVER = """
import sys, threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.n_ctx, params.n_parallel, params.n_batch, params.n_ubatch = 512, 1, 512, 512
params.embedding, params.pooling_type = True, xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
params.ui, params.verbosity, params.cache_ram_mib, params.port = False, 1, 0, 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""

Embed = Callable[[list[int]], Any]


@pytest.fixture(scope="module")
def embed(embedding_model: StoredModel) -> Iterator[Embed]:
    child = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(embedding_model.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdin is not None and child.stdout is not None
    address = child.stdout.readline().decode().strip()

    def post(ids: list[int]) -> Any:
        body = json.dumps({"input": ids, "model": "any"}).encode()
        request = urllib.request.Request(f"{address}/v1/embeddings", body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
            return json.load(response)

    yield post
    child.kill()
    child.wait(60)
    child.stdin.close()
    child.stdout.close()


@pytest.fixture(scope="module")
def tokenizer(embedding_model: StoredModel) -> TextTokenizer:
    assert embedding_model.tokenizer_path is not None
    return TextTokenizer(str(embedding_model.tokenizer_path))


@pytest.fixture(scope="module")
def reference(original_model: Path) -> Any:
    spec = util.spec_from_file_location("reference_bert", Path(__file__).with_name("reference_bert.py"))
    assert spec is not None and spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.ReferenceBert(original_model)


@pytest.mark.parametrize("name", TEXTS)
def test_vectors_are_those_of_the_original_weights(
    name: str, embed: Embed, tokenizer: TextTokenizer, reference: Any
) -> None:
    ids = tokenizer.encode(TEXTS[name])
    answer = embed(ids)
    vector = np.array(answer["data"][0]["embedding"])
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert vector.shape == (384,)
    assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-4)
    assert float(vector @ reference.embed(ids)) / np.linalg.norm(vector) >= 0.9999


def test_meaning_is_kept(embed: Embed, tokenizer: TextTokenizer) -> None:
    def vector(text: str) -> Any:
        return np.array(embed(tokenizer.encode(text))["data"][0]["embedding"])

    cat, kitten, tax = vector("a cat sleeps"), vector("a kitten is napping"), vector("the tax law of 1986")
    assert cat @ kitten > 0.5 > cat @ tax


def test_the_full_context_fits_and_one_token_more_does_not(embed: Embed, tokenizer: TextTokenizer) -> None:
    full = tokenizer.encode("word " * 510)
    assert len(full) == 512
    assert embed(full)["usage"]["prompt_tokens"] == 512
    with pytest.raises(urllib.error.HTTPError):
        embed([*full, full[-1]])
