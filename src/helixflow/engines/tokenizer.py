"""Text to token ids, for embedding models. The only module that imports `tokenizers`: import it when one is needed."""

from tokenizers import Tokenizer


class TextTokenizer:
    """A model's own tokenizer, read from its `tokenizer.json`.

    Truncation and padding, which that file may ask for, are off: the caller refuses what is too long.
    Raises `ValueError` when the file is missing or not a tokenizer. Costs about 7 MB at import and 10 MB a tokenizer.
    """

    def __init__(self, path: str) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(path)
        except Exception as exc:
            raise ValueError(f"cannot read the tokenizer {path}") from exc
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def encode(self, text: str) -> list[int]:
        """Token ids with the model's special tokens around them ([CLS] … [SEP]). Takes 1 to 2 µs a byte."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def count(self, text: str) -> int:
        """How many ids `encode` gives."""
        return len(self._tokenizer.encode(text))

    @property
    def size(self) -> int:
        """Number of token ids; the largest is one less."""
        return int(self._tokenizer.get_vocab_size())
