"""Where each document of a corpus stands, by its id, in as few bytes as numbers take: a corpus may have many millions."""

from array import array

PAIRS = 2  # places of the table for each entry, at least


class Places:
    """A table from the hash of an id to the file and line of its document; it takes 32 to 64 bytes for each.

    A dictionary would take some 250.

    Example:
        >>> places = Places()
        >>> places.setdefault(content_hash(b"a"), (0, 1))
        (0, 1)
        >>> places.setdefault(content_hash(b"a"), (0, 7))
        (0, 1)
    """

    def __init__(self) -> None:
        self._count = 0
        self._make(1 << 10)

    def _make(self, size: int) -> None:
        self._keys, self._places = (array("Q", bytes(8 * size)) for _ in range(2))  # a place of 0: nothing stands there

    def setdefault(self, key: int, place: tuple[int, int]) -> tuple[int, int]:
        """Return the file and line (from 1) that are known for a hash of 64 bits; those given where there are none yet."""
        if PAIRS * self._count >= len(self._keys):
            keys, places = self._keys, self._places
            self._make(2 * len(keys))
            for old, there in zip(keys, places, strict=True):
                if there:
                    at = self._find(old)
                    self._keys[at], self._places[at] = old, there
        at = self._find(key)
        if not self._places[at]:
            self._keys[at], self._places[at] = key, place[0] << 40 | place[1]
            self._count += 1
        return self._places[at] >> 40, self._places[at] & (1 << 40) - 1

    def _find(self, key: int) -> int:
        """The index of a hash in the table, or that of the empty place where it belongs."""
        last = len(self._keys) - 1
        at = key & last
        while self._places[at] and self._keys[at] != key:
            at = (at + 1) & last
        return at
