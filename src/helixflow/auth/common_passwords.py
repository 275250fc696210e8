"""Passwords that are tried first: words, names, keyboard walks and dates, alone or two together, however disguised.

The list is our own (tools/common_passwords.py). It stands for tens of millions of passwords and all their disguises.
"""

import unicodedata
from functools import cached_property
from importlib.resources import files
from typing import Final

_FILE: Final = "common_passwords.txt"
# No two parts are longer.
_MAX_CHARS: Final = 64
_FEW_DIGITS: Final = 4
# What repeats so short a part is no better than the part.
_SHORT_PERIOD: Final = 4
_DIGITS: Final = "0123456789"
_SIGNS: Final = str.maketrans("@$!€+", "asiet")
_LEET: Final = tuple(str.maketrans("0134578", f"o{one}eastb") for one in "il")


class CommonPasswords:
    """Loaded when first asked, in a few milliseconds; then it takes a tenth of one."""

    def __contains__(self, password: str) -> bool:
        return any(self._is_common(form) for form in self._forms(password))

    def __len__(self) -> int:
        """How many passwords it stands for before any disguise: parts, and two parts together."""
        return len(self._parts) * (len(self._parts) + 1)

    def _forms(self, password: str) -> set[str]:
        """What may be meant: with letters for what stands for them, cut at the ends, and backwards."""
        forms = set()
        for text in (password, password.casefold().translate(_SIGNS)):
            plain = fold(text)
            if 0 < len(plain) <= _MAX_CHARS:
                for core in (plain, self._without_digits_around(plain)):
                    forms |= {core, *(core.translate(leet) for leet in _LEET)}
        return forms | {form[::-1] for form in forms}

    def _without_digits_around(self, text: str) -> str:
        """Few digits, or common ones, make nothing better: `123`, `2024`, `19841984`."""
        core = text.rstrip(_DIGITS)
        if not core or not self._counts_for_little(text[len(core) :]):
            core = text
        rest = core.lstrip(_DIGITS)
        return rest if rest and self._counts_for_little(core[: len(core) - len(rest)]) else core

    def _counts_for_little(self, digits: str) -> bool:
        return len(digits) <= _FEW_DIGITS or self._is_common(digits)

    def _is_common(self, text: str) -> bool:
        parts = self._parts
        if text in parts or any(text[:at] in parts and text[at:] in parts for at in range(1, len(text))):
            return True
        unit = _period(text)
        return len(unit) < len(text) and (len(unit) <= _SHORT_PERIOD or unit in parts)

    @cached_property
    def _parts(self) -> frozenset[str]:
        return frozenset((files(__package__) / _FILE).read_text(encoding="utf-8").split())


def fold(text: str) -> str:
    """Letters and digits, without case and accents: the form in which parts are listed."""
    return "".join(sign for sign in unicodedata.normalize("NFKD", text.casefold()) if sign.isalnum())


def _period(text: str) -> str:
    """The shortest beginning that, repeated, gives the text."""
    return text[: (text + text).index(text, 1)]
