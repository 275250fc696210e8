"""Where an answer broke off, sans-I/O: from what was passed on to the token ids that another replica goes on from.

The seam is exact: the next replica reads the ids that the first one made. Engines name one id a piece of text, its
last: text is held back while a character or a possible stop string is incomplete, and then a piece stands for several
tokens. Such a gap is closed by tokenising text between two known borders, and believed where the number of tokens and
the last id are those that the engine named. Where not, the newest piece is made again, and not passed on again.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import msgspec


class Token(NamedTuple):
    """A token of a text: its id and how many bytes of the text it is."""

    id: int
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that came at once, and where it lies in the bytes of all; the last of its `count` tokens is known."""

    text: str
    start: int
    end: int
    last: int
    count: int


class TokenLog:
    """What one answer has passed on. `ids` are those of earlier replicas, settled; pieces are the present one's.

    `exact` until a gap far back could only be closed by the tokeniser's own choice of tokens for the same text.
    """

    __slots__ = ("_ends", "_lasts", "_made", "_text", "exact", "ids")

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.exact = True
        self._clear()

    def note(self, text: bytes, token: int, made: int) -> None:
        """A piece as it stands inside a JSON string, its last token, and how many this replica has made with it."""
        self._text += text
        self._ends.append(len(self._text))
        self._lasts.append(token)
        self._made.append(made)

    @property
    def made(self) -> int:
        """Tokens of the answer up to the newest piece."""
        return len(self.ids) + (self._made[-1] if self._made else 0)

    @property
    def text(self) -> str:
        """What the present replica has made."""
        return "".join([piece.text for piece in self.pieces()])

    def pieces(self) -> Iterator[Piece]:
        before = start = made = 0
        for end, last, count in zip(self._ends, self._lasts, self._made, strict=True):
            text = msgspec.json.decode(b'"' + self._text[before:end] + b'"', type=str)
            size = len(text.encode())
            yield Piece(text, start, start + size, last, count - made)
            before, start, made = end, start + size, count

    def gaps(self, whole: Sequence[Token]) -> dict[int, str]:
        """Positions and texts of the pieces whose tokens are not known, given the tokens of `text` as a whole."""
        borders = _borders(whole, self.text)
        return {
            position: piece.text
            for position, piece in enumerate(self.pieces())
            if piece.text and _known(piece, whole, borders) is None
        }

    def settle(self, whole: Sequence[Token], apart: Mapping[int, Sequence[Token]]) -> str:
        """Makes what the present replica has made part of `ids`; returns the text at its end that has to be made again.

        `apart` has the tokens of each of the `gaps` tokenised alone.
        """
        borders = _borders(whole, self.text)
        pieces = list(self.pieces())
        again = ""
        for position, piece in enumerate(pieces):
            tokens = apart.get(position, ())
            known = _known(piece, whole, borders)
            if known is None and _matches(piece, tokens):
                known = [token.id for token in tokens]
            if known is None:
                if position == len(pieces) - 1:
                    again = piece.text
                    break
                self.exact = False
                known = [token.id for token in tokens] or [piece.last]
            self.ids += known
        self._clear()
        return again

    def _clear(self) -> None:
        self._text = bytearray()
        self._ends = array("Q")
        self._lasts = array("q")
        self._made = array("q")


class CatchUp:
    """Text that is being made again: passed on is only what goes beyond it."""

    __slots__ = ("left",)

    def __init__(self, left: str = "") -> None:
        self.left = left

    def pass_on(self, text: str) -> str | None:
        """What of `text` is new; None when it is not what was passed on before."""
        if self.left.startswith(text):
            self.left = self.left[len(text) :]
            return ""
        if text.startswith(self.left):
            new, self.left = text[len(self.left) :], ""
            return new
        return None


def _borders(whole: Sequence[Token], text: str) -> dict[int, int]:
    """Where tokens begin in the bytes of `text`, and their positions. Empty for tokens that are not those of the text.

    Some tokenisers put a space before every text.
    """
    added = sum(token.size for token in whole) - len(text.encode())
    if added not in (0, 1):
        return {}
    borders = {}
    at = -added
    for position, token in enumerate(whole):
        borders[at] = position
        at += token.size
    borders[at] = len(whole)
    return borders


def _known(piece: Piece, whole: Sequence[Token], borders: Mapping[int, int]) -> list[int] | None:
    if piece.count == 1:
        return [piece.last]
    first, end = borders.get(piece.start), borders.get(piece.end)
    if first is None or end is None:
        return None
    tokens = whole[first:end]
    return [token.id for token in tokens] if _matches(piece, tokens) else None


def _matches(piece: Piece, tokens: Sequence[Token]) -> bool:
    return (
        len(tokens) == piece.count > 0
        and tokens[-1].id == piece.last
        and sum(token.size for token in tokens) == piece.end - piece.start
    )
