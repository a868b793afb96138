"""What guests must read: what they wrote, wherever it was moved to and whoever crashed meanwhile.

A page is known from the end of a write until anything begins that may change it. An operation that
others overlap proves nothing about the pages that they share: each page counts what touched it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

Page = tuple[int, int, bool]


@dataclass(frozen=True)
class Expected:
    """Pages that an access must find with their seeds, unless something touches them meanwhile."""

    values: dict[Page, int]
    touched: dict[Page, tuple[int, int]]


@dataclass
class Writing:
    """A write under way; ``done`` once the guest came to its end."""

    done: bool = False


class Contents:
    """The seeds that pages were written with, by (vm, gfn, half)."""

    def __init__(self) -> None:
        self._values: dict[Page, int] = {}
        self._touched: Counter[Page] = Counter()
        self._vms: Counter[int] = Counter()
        # what goes on now and may change pages: by page, by VM
        self._open: Counter[Page] = Counter()
        self._losing: Counter[int] = Counter()
        self.verified = 0

    @contextmanager
    def touching(self, pages: Sequence[Page]) -> Iterator[None]:
        """Know nothing of pages that an operation may change, from its begin to its end."""
        self._touch(pages)
        self._open.update(pages)
        try:
            yield
        finally:
            self._open.subtract(pages)
            self._touch(pages)

    @contextmanager
    def losing(self, *vms: int) -> Iterator[None]:
        """Know nothing of any page of VMs while an operation goes on that may take them."""
        self._lose(vms)
        self._losing.update(vms)
        try:
            yield
        finally:
            self._losing.subtract(vms)
            self._lose(vms)

    @contextmanager
    def writing(self, pages: Sequence[Page], seed: int) -> Iterator[Writing]:
        """Know pages that are written, if that says it is done and nobody else touched them."""
        self._touch(pages)
        stamps = {page: self._stamp(page) for page in pages}
        self._open.update(pages)
        writing = Writing()
        try:
            yield writing
        finally:
            self._open.subtract(pages)
            sure = [page for page, stamp in stamps.items() if self._is_sure(page, stamp)]
            self._touch(pages)
            if writing.done:
                self._values.update(dict.fromkeys(sure, seed))

    def begin_check(self, pages: list[Page]) -> Expected:
        """Return what is known of pages."""
        known = {page: self._values[page] for page in pages if page in self._values}
        return Expected(known, {page: self._stamp(page) for page in known})

    def undisturbed(self, expected: Expected) -> list[Page]:
        """Return the pages that nothing else has touched since."""
        return [page for page, stamp in expected.touched.items() if self._stamp(page) == stamp]

    def of_vm(self, vm: int) -> list[Page]:
        """Return the known pages of a VM."""
        return [page for page in self._values if page[0] == vm]

    def _stamp(self, page: Page) -> tuple[int, int]:
        return self._touched[page], self._vms[page[0]]

    def _is_sure(self, page: Page, stamp: tuple[int, int]) -> bool:
        others = self._open[page] or self._losing[page[0]]
        return not others and self._stamp(page) == stamp

    def _touch(self, pages: Sequence[Page]) -> None:
        for page in pages:
            self._touched[page] += 1
            self._values.pop(page, None)

    def _lose(self, vms: Sequence[int]) -> None:
        for vm in vms:
            self._vms[vm] += 1
            for page in self.of_vm(vm):
                del self._values[page]
