"""Which cached keys belong to an owner, a project, an organisation: what a change of one of them concerns."""

from collections.abc import Collection


class Belonging:
    """Keys (hashes) by what they belong to.

    A lone key stands without a collection around it: most owners have one, and a collection takes 200 bytes. They are
    dictionaries for their order, that of the cache: 100,000 are dropped in half the time.
    """

    def __init__(self) -> None:
        self._keys: dict[str, bytes | dict[bytes, None]] = {}

    def add(self, subject: str, key_hash: bytes) -> None:
        """An empty `subject` is nobody's."""
        if not subject:
            return
        kept = self._keys.setdefault(subject, key_hash)
        if isinstance(kept, dict):
            kept[key_hash] = None
        elif kept != key_hash:
            self._keys[subject] = {kept: None, key_hash: None}

    def discard(self, subject: str, key_hash: bytes) -> None:
        kept = self._keys.get(subject)
        if isinstance(kept, dict):
            kept.pop(key_hash, None)
            if not kept:
                del self._keys[subject]
        elif kept == key_hash:
            del self._keys[subject]

    def take(self, subject: str) -> Collection[bytes]:
        """The keys of `subject`, which from now on has none."""
        kept = self._keys.pop(subject, ())
        return (kept,) if isinstance(kept, bytes) else kept

    def clear(self) -> None:
        self._keys.clear()

    def __len__(self) -> int:
        """How many have keys."""
        return len(self._keys)
