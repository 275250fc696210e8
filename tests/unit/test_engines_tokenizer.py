"""Embedding input as token ids: special tokens in, truncation and padding out."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from helixflow.engines.tokenizer import TextTokenizer


@pytest.fixture
def path(tmp_path: Path) -> str:
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "hello": 4, "world": 5, "##s": 6}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return str(file)


def test_special_tokens_surround_the_text(path: str) -> None:
    assert TextTokenizer(path).encode("Hello worlds") == [2, 4, 5, 6, 3]
    assert TextTokenizer(path).encode("") == [2, 3]


def test_nothing_is_cut_or_filled_up(path: str) -> None:
    tokenizer = TextTokenizer(path)
    assert len(tokenizer.encode("hello " * 1000)) == tokenizer.count("hello " * 1000) == 1002


def test_a_file_that_is_no_tokenizer(tmp_path: Path) -> None:
    for content in ("", "{}", "not json"):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="cannot read the tokenizer"):
            TextTokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="cannot read the tokenizer"):
        TextTokenizer(str(tmp_path / "missing.json"))
