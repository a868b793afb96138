"""Restricted files: guest_memfd's inode (pages, attributes) and file (one VM's bindings).

Owns the ``file/*`` tables. A page of the file is a pgoff; the private half is ``frames``, the
shared half of an `attributes` VM is ``shared``. In place, one frame in ``frames`` serves either
state, and ``attributes`` (of the file, as in Linux) says which. Most files are bound to nothing and
have no policy: those tables come with what is first written to them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import BINDING_OVERLAP, NO_SUCH_FILE
from rmemd.hooks.tables import Records, Space, Sparse, TableSpec
from rmemd.hooks.tx import Tx
from rmemd.model.sessions import NOBODY, Owner
from rmemd.units import I64

FLAG_MMAP = 1
FLAG_INIT_SHARED = 2
# rmemd's own: the memory behind a slot that has no restricted file, made with the slot
FLAG_ANONYMOUS = 1 << 63
FLAGS_ADVERTISED = FLAG_MMAP | FLAG_INIT_SHARED
PRIVATE = 1
SHARED = 0
# stand for the tables that a file has not
_NO_VALUES = Sparse(TableSpec("", "sparse"))
_NO_RECORDS = Records(TableSpec("", "records"))


class FileInfo(Struct, frozen=True):
    """A file's fixed facts."""

    file: int
    vm: int
    size_pages: int
    flags: int
    in_place: bool
    owner: Owner = NOBODY

    @property
    def mappable(self) -> bool:
        """Return whether the host may map it."""
        return bool(self.flags & FLAG_MMAP)


class Binding(Struct, frozen=True):
    """A range of a file that a slot of a VM has: pgoff..pgoff+npages is gfn..gfn+npages."""

    pgoff: int
    npages: int
    vm: int
    slot: int
    gfn: int


class Policy(Struct, frozen=True):
    """A NUMA policy: 0 default, 2 bind, 3 interleave, as MPOL_* are numbered."""

    policy: int
    nodes: tuple[int, ...]


class RestrictedFile:
    """A view of one file's tables."""

    def __init__(self, space: Space, info: FileInfo) -> None:
        self.info = info
        self._space = space
        self._bindings = _bindings_of(info.file)
        self.frames = space.sparse(f"file/{info.file}/frames")
        self.shared = _NO_VALUES if info.in_place else space.sparse(f"file/{info.file}/shared")
        self.attributes = space.sparse(f"file/{info.file}/attributes")

    @property
    def bindings(self) -> Records:
        """Return the ranges of it that slots have, by VM and slot; ``Files.bindings`` makes it."""
        return _records_of(self._space, self._bindings)

    @property
    def policy(self) -> Sparse:
        """Return the number of each page's policy, 0 the default; ``Files.policies`` makes it."""
        name = f"file/{self.info.file}/policy"
        return self._space.sparse(name) if name in self._space.tables else _NO_VALUES

    @property
    def policies(self) -> Records:
        """Return what the numbers of policies mean; ``Files.policies`` makes it."""
        return _records_of(self._space, f"file/{self.info.file}/policies")

    def half(self, private: bool) -> Sparse:
        """Return the table of frames that serves pages of this state."""
        return self.frames if private or self.info.in_place else self.shared

    def bound(self, pgoff: int, npages: int) -> list[tuple[Binding, int, int]]:
        """Return the bindings that meet a range, each with the (pgoff, npages) they share."""
        found = []
        for _, binding in self.bindings.items():
            lo = max(binding.pgoff, pgoff)
            hi = min(binding.pgoff + binding.npages, pgoff + npages)
            if lo < hi:
                found.append((binding, lo, hi - lo))
        return found

    def binding_at(self, pgoff: int) -> Binding | None:
        """Return the binding that has a page, None if no slot has it."""
        table: Any = self._space.tables.get(self._bindings)
        if table is None:
            return None
        found: Binding
        for found in table.values():
            if found.pgoff <= pgoff < found.pgoff + found.npages:
                return found
        return None

    def policy_at(self, pgoffs: I64) -> tuple[I64, dict[int, Policy]]:
        """Return the policy number per page, and what the numbers mean (0 is the default)."""
        return self.policy.get(pgoffs).astype(np.int64), dict(self.policies.items())


def bindings_of(space: Space, file: int) -> Records:
    """Return the ranges of a file that slots have in a state, by VM and slot."""
    return _records_of(space, _bindings_of(file))


def _bindings_of(file: int) -> str:
    return f"file/{file}/bindings"


def _records_of(space: Space, name: str) -> Records:
    table = space.tables.get(name, _NO_RECORDS)
    assert isinstance(table, Records), name
    return table


class Files:
    """All restricted files.

    Attributes:
        exists: returns whether a file, by its number, is there.
    """

    def __init__(self, space: Space, tx: Tx) -> None:
        self._space = space
        self._info: Records = tx.create(TableSpec("files", "records"))
        self._info.group_by(lambda _, info: info.owner.session)
        self.exists: Callable[[int], bool] = self._info.has
        #: shared pages still to be emptied by a punch: (file, pgoff) -> pages
        self.discards: Records = tx.create(TableSpec("discards", "records"))
        self._views: dict[int, RestrictedFile] = {}

    def create(
        self, tx: Tx, vm: int, size_pages: int, flags: int, in_place: bool, owner: Owner = NOBODY
    ) -> RestrictedFile:
        """Make a file; its pages start as holes."""
        file = tx.next_id("file")
        info = FileInfo(file, vm, size_pages, flags, in_place, owner)
        initially = SHARED if flags & (FLAG_INIT_SHARED | FLAG_ANONYMOUS) else PRIVATE
        tx.create(TableSpec(f"file/{file}/frames", "sparse", "i8"))
        if not in_place:
            tx.create(TableSpec(f"file/{file}/shared", "sparse", "i8"))
        tx.create(TableSpec(f"file/{file}/attributes", "sparse", "u1", initially))
        tx.set(self._info, file, info)
        view = self._views[file] = RestrictedFile(self._space, info)
        return view

    def destroy(self, tx: Tx, file: int) -> None:
        """Forget a file whose pages are gone."""
        for table in self._space.below(f"file/{file}"):
            tx.destroy(table)
        tx.drop(self._info, file)
        self._views.pop(file, None)

    def get(self, file: int) -> RestrictedFile:
        """Return a file.

        Raises:
            NotFound: NO_SUCH_FILE.
        """
        info = self._info.get(file)
        if info is None:
            raise NO_SUCH_FILE(f"file/{file} does not exist", field="file")
        view = self._views.get(file)
        # facts that were written, or written back, are another object, and may be another file's
        if view is None or view.info is not info:
            view = self._views[file] = RestrictedFile(self._space, info)
        return view

    def of_session(self, session: int) -> list[int]:
        """Return a session's files, oldest first."""
        return self._info.grouped(session)

    def all(self) -> list[RestrictedFile]:
        """Return every file, oldest first."""
        return [RestrictedFile(self._space, info) for _, info in self._info.items()]

    def bind(self, tx: Tx, file: RestrictedFile, binding: Binding, overlap_errno: int) -> None:
        """Give a range of the file to a slot.

        Raises:
            AlreadyExists: BINDING_OVERLAP, with the errno of the Linux release asked for.
        """
        taken = file.bound(binding.pgoff, binding.npages)
        if taken:
            other, pgoff, _ = taken[0]
            raise BINDING_OVERLAP(
                f"pgoff {pgoff:#x} of file/{file.info.file} is bound to slot {other.slot}",
                errno=overlap_errno, field="file_offset_bytes", page=f"pgoff {pgoff:#x}",
                state=f"bound to vm/{other.vm} slot {other.slot}",
                rule="restrictedmem.md §2: bind, last check",
            )  # fmt: skip
        tx.set(self.bindings(tx, file), (binding.vm, binding.slot), binding)

    def unbind(self, tx: Tx, file: RestrictedFile, vm: int, slot: int) -> None:
        """Take a slot's range back."""
        tx.drop(file.bindings, (vm, slot))

    def bindings(self, tx: Tx, file: RestrictedFile) -> Records:
        """Return the table of a file's bindings, to be written: it is made if need be."""
        if file.bindings is _NO_RECORDS:
            tx.create(TableSpec(_bindings_of(file.info.file), "records"))
        return file.bindings

    def policies(self, tx: Tx, file: RestrictedFile) -> tuple[Sparse, Records]:
        """Return the tables of a file's policies, to be written: they are made if need be."""
        if file.policies is _NO_RECORDS:
            tx.create(TableSpec(f"file/{file.info.file}/policy", "sparse", "u1"))
            tx.create(TableSpec(f"file/{file.info.file}/policies", "records"))
        return file.policy, file.policies
