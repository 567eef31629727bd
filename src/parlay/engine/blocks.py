"""KV pages: who holds them, and which equal prefixes can be shared. Host only, no torch."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

NULL_PAGE = 0  # never allocated: padding reads and writes land here, so that no request can reach another's pages


def page_digest(previous: bytes, tokens: array[int]) -> bytes:
    """Names a full page by its tokens and everything before them."""
    return hashlib.blake2b(previous + tokens.tobytes(), digest_size=16).digest()


class Blocks:
    """Reference-counted pages with an LRU of free pages that still hold a published prefix.

    Every page is exactly one of: held (count above 0), or free. A free page keeps its contents, and its name if
    it was published, until it is handed out again; free pages are handed out least recently freed first.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 2:
            raise ValueError("kv_cache_memory: too small for a single page")
        self.page_size = page_size
        self.num_pages = num_pages - 1  # without the null page
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_pages))
        self._count: dict[int, int] = {}
        self._page_of: dict[bytes, int] = {}
        self._name_of: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pages that somebody holds, from 0 to 1."""
        return 1 - len(self._free) / self.num_pages

    def pages_for(self, positions: int) -> int:
        """Pages that hold this many positions."""
        return -(-positions // self.page_size)

    def take(self) -> int:
        """One private page; the caller has checked `num_free`."""
        page, _ = self._free.popitem(last=False)
        self.unpublish(page)
        self._count[page] = 1
        return page

    def share(self, pages: Iterable[int]) -> None:
        """One more holder for each page, reviving free ones."""
        for page in pages:
            self._free.pop(page, None)
            self._count[page] = self._count.get(page, 0) + 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder less; the last pages of a prefix are recycled first."""
        for page in reversed(pages):
            self._count[page] -= 1
            if not self._count[page]:
                del self._count[page]
                self._free[page] = None

    def is_shared(self, page: int) -> bool:
        return self._count[page] > 1

    def lookup(self, name: bytes) -> int | None:
        """The page published under this digest, held or free."""
        return self._page_of.get(name)

    def publish(self, page: int, name: bytes) -> None:
        """Makes a full page findable; the first page published under a name keeps it."""
        if name not in self._page_of and page not in self._name_of:
            self._page_of[name] = page
            self._name_of[page] = name

    def unpublish(self, page: int) -> None:
        """Forgets a page's name, because it is about to be written."""
        name = self._name_of.pop(page, None)
        if name is not None:
            del self._page_of[name]

    def name_of(self, page: int) -> bytes | None:
        """The digest that a page is published under."""
        return self._name_of.get(page)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Every page is held exactly as often as the tables say, or free; never both.

        Raises:
            AssertionError: naming the first broken invariant.
        """
        held = Counter(page for table in tables for page in table)
        assert dict(held) == self._count, f"holders {dict(held)} differ from counts {self._count}"
        assert not held.keys() & self._free.keys(), "a held page is free"
        assert len(held) + len(self._free) == self.num_pages, "a page is lost"
        assert NULL_PAGE not in held, "the null page is held"
        assert NULL_PAGE not in self._free, "the null page is free"
        assert {page: name for name, page in self._page_of.items()} == self._name_of, "prefix names are inconsistent"
