"""The memory controller: the only one who touches private bytes.

Owns what a frame's bytes are (``host/stored``, ``host/key``, ``host/mac``, the ARENA flag), the
keys at work and sticky poison. Consumers only name bytes to it (``ByteOp``); it writes into frames
that nobody owns yet before a transaction is recorded, and destroys only after.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from msgspec import Struct

from rmemd.errors import HW_POISON
from rmemd.hooks.tx import ByteOp, Tx
from rmemd.hooks.types import KeySpec
from rmemd.model.host import ARENA, Host, Stored
from rmemd.store.keys import FrameKey
from rmemd.store.memfd import Memfd
from rmemd.store.system import SYSTEM, System
from rmemd.units import I64, PAGE_SIZE, U8, U32, U64, Bools, distinct

_PLAIN = KeySpec(0, "host", plain=True)
_SCRAMBLER = KeySpec(-1, "host")
_MULTIPLIERS = np.frombuffer(
    hashlib.shake_256(b"rmemd page sums").digest(PAGE_SIZE), dtype="<u8"
) | np.uint64(1)


class Contents(Struct, frozen=True):
    """What frames hold from now on: columns of the host tables, by pfn."""

    pfns: I64
    stored: U8
    key: int
    mac: U32


class MemoryController:
    """Bytes of frames: raw on the bus, plain for the owner of the key."""

    def __init__(
        self, host: Host, seed: int, kept: int | None = None, system: System = SYSTEM
    ) -> None:
        self._host = host
        self._seed = seed
        self._arena = Memfd("rmemd-arena", host.nframes, kept, system)
        self._keys: dict[int, FrameKey] = {0: FrameKey(seed, _PLAIN)}

    @cached_property
    def scrambler(self) -> FrameKey:
        """Return what makes the bytes that "destroyed" content reads as."""
        # made when it is asked for: OpenSSL sets itself up with its first key
        return FrameKey(self._seed, _SCRAMBLER)

    # --- reading -----------------------------------------------------------------------------
    def raw(self, pfns: I64) -> U8:
        """Return what the bus sees, uint8 (n, 4096): ciphertext for frames under a key.

        Raises:
            Poisoned: HW_POISON; a frame failed its integrity check before.
        """
        stored = self._host.stored.get(pfns)
        bad = np.flatnonzero(stored == Stored.TAINTED)
        if bad.size:
            raise HW_POISON(
                f"pfn {int(pfns[bad[0]]):#x} failed its integrity check", state="tainted",
                page=f"pfn {int(pfns[bad[0]]):#x}", rule="tdx.md §6: poison is sticky",
            )  # fmt: skip
        there = np.flatnonzero(stored == Stored.BYTES)
        if there.size == pfns.size:
            return self._arena.read(pfns)
        out = np.zeros((pfns.size, PAGE_SIZE), dtype=np.uint8)
        if there.size:
            out[there] = self._arena.read(pfns[there])
        zeros = np.flatnonzero(stored == Stored.KEY_ZERO)
        for key_id in distinct(self._host.key.get(pfns[zeros])).tolist():
            mask = zeros[self._host.key.get(pfns[zeros]) == key_id]
            out[mask] = self.key(key_id).encrypt(pfns[mask], out[mask])
        return out

    def read(self, pfns: I64, key_id: int) -> tuple[U8, Bools]:
        """Return what the owner of a key reads, uint8 (n, 4096), and which pages failed.

        Pages fail under a key with integrity, when they were written under another key or
        changed on the bus. They read as zeros.
        """
        key = self.key(key_id)
        stored, keys = self._host.stored.get(pfns), self._host.key.get(pfns)
        failed = stored == Stored.TAINTED
        if key.spec.integrity:
            failed |= keys != key_id
        rest = ~failed & ~((stored == Stored.KEY_ZERO) & (keys == key_id))
        at = np.flatnonzero(rest)
        if at.size == pfns.size and not key.spec.integrity:
            return key.decrypt(pfns, self.raw(pfns)), failed
        out = np.zeros((pfns.size, PAGE_SIZE), dtype=np.uint8)
        if at.size:
            raw = self.raw(pfns[at])
            if key.spec.integrity:
                broken = key.mac(pfns[at], raw) != self._host.mac.get(pfns[at])
                failed[at] |= broken
                at, raw = at[~broken], raw[~broken]
            out[at] = key.decrypt(pfns[at], raw)
        return out, failed

    def zeros(self, pfns: I64, key_id: int) -> Bools:
        """Return which frames the owner of a key is known to read zeros of, without a look.

        Of the others some may hold zeros as well.
        """
        stored, keys = self._host.stored.get(pfns), self._host.key.get(pfns)
        spec = self.key(key_id).spec
        zeros: Bools = (stored == Stored.KEY_ZERO) & (keys == key_id)
        if spec.plain and not spec.integrity:
            zeros |= stored == Stored.RAW_ZERO
        return zeros

    # --- named byte operations ---------------------------------------------------------------
    def perform(self, ops: list[ByteOp]) -> list[Contents]:
        """Do the byte work of a transaction that is not recorded yet.

        Only frames that nobody owns are written, so failing half-way loses nothing.

        Raises:
            Poisoned: HW_POISON; a source must not be copied from.
            OSError: the system has no memory left.
        """
        return [contents for op in ops for contents in self._perform(op)]

    def apply(self, tx: Tx, contents: list[Contents]) -> None:
        """Write down what frames hold."""
        host = self._host
        for c in contents:
            tx.put(host.stored, c.pfns, c.stored)
            tx.put(host.key, c.pfns, c.key)
            tx.put(host.mac, c.pfns, c.mac)
            written = c.pfns[c.stored == Stored.BYTES]
            tx.put(host.flags, written, host.flags.get(written) | ARENA)

    def write_plan(self, pfns: I64, rows: U8, key_id: int) -> tuple[Contents, U8]:
        """Return what whole-page writes under a key make of frames, and the bytes for the bus."""
        key = self.key(key_id)
        raw = key.encrypt(pfns, rows)
        return Contents(pfns, _all(pfns, Stored.BYTES), key_id, key.mac(pfns, raw)), raw

    def store_raw(self, pfns: I64, raw: U8) -> None:
        """Put bytes on the bus, after their record is written."""
        self._arena.write(pfns, raw)

    def sums(self, pfns: I64) -> U64:
        """Return sums of what the arena holds at frames, to tell whether a write reached them."""
        return page_sums(self._arena.read(pfns))

    def strays(self) -> tuple[I64, I64]:
        """Return the frames that the arena holds a page of and should not, and the reverse."""
        there = self._arena.present(0, self._host.nframes)
        meant = np.flatnonzero(self._host.flags.view & ARENA)
        unmeant = np.setdiff1d(there, meant, assume_unique=True)
        return unmeant, np.setdiff1d(meant, there, assume_unique=True)

    def taint(self, tx: Tx, pfns: I64) -> None:
        """Make failed frames fail from now on, until a full-line write."""
        tx.put(self._host.stored, pfns, int(Stored.TAINTED))

    @property
    def arena_fd(self) -> int:
        """Return the arena's descriptor, for whoever keeps it."""
        return self._arena.fd

    def punch(self, pfns: I64) -> None:
        """Free the arena's memory of frames whose content no longer counts."""
        self._arena.punch(pfns)

    def key(self, key_id: int) -> FrameKey:
        """Return a key at work."""
        key = self._keys.get(key_id)
        if key is None:
            spec: Any = self._host.keys[key_id]
            key = self._keys[key_id] = FrameKey(self._seed, spec)
        return key

    def forget(self, key_ids: Iterable[int]) -> None:
        """Let go of keys that no bytes are under; one that is asked for again is derived anew."""
        for key_id in key_ids:
            self._keys.pop(key_id, None)

    def close(self) -> None:
        """Let go of the arena and everything in it."""
        self._arena.close()

    def _perform(self, op: ByteOp) -> list[Contents]:
        none = np.zeros(op.pfns.size, dtype=np.uint32)
        if op.kind == "zero":
            return [Contents(op.pfns, _all(op.pfns, Stored.KEY_ZERO), op.key_id, none)]
        if op.kind == "scrub":
            return [Contents(op.pfns, _all(op.pfns, Stored.RAW_ZERO), 0, none)]
        if op.kind == "copy_in":
            assert op.rows is not None
            contents, raw = self.write_plan(op.pfns, op.rows, op.key_id)
            self._arena.write(op.pfns, raw)
            return [contents]
        assert op.src is not None
        return self._relocate(op.src, op.pfns, op.key_id)

    def _relocate(self, src: I64, dst: I64, key_id: int) -> list[Contents]:
        stored, keys = self._host.stored.get(src), self._host.key.get(src)
        raw_zero = (stored == Stored.RAW_ZERO) & (key_id == 0)
        shared = stored == Stored.SHARED
        key_zero = (stored == Stored.KEY_ZERO) & (keys == key_id)
        done = []
        for mask, state, key in (
            (raw_zero, Stored.RAW_ZERO, 0),
            (shared, Stored.SHARED, 0),
            (key_zero, Stored.KEY_ZERO, key_id),
        ):
            pfns = dst[mask]
            done.append(Contents(pfns, _all(pfns, state), key, np.zeros(pfns.size, np.uint32)))
        rest = ~(raw_zero | shared | key_zero)
        if rest.any():
            rows, failed = self.read(src[rest], key_id)
            if failed.any():
                pfn = int(src[rest][failed][0])
                raise HW_POISON(
                    f"pfn {pfn:#x} fails its integrity check and is not copied from",
                    page=f"pfn {pfn:#x}", rule="reliability.md I13",
                )  # fmt: skip
            contents, raw = self.write_plan(dst[rest], rows, key_id)
            self._arena.write(dst[rest], raw)
            done.append(contents)
        return [c for c in done if c.pfns.size]


def zeros_of(pfns: I64, key_id: int) -> Contents:
    """Return what makes frames read as zeros to the owner of a key; 0: on the bus."""
    state = Stored.KEY_ZERO if key_id else Stored.RAW_ZERO
    return Contents(pfns, _all(pfns, state), key_id, np.zeros(pfns.size, dtype=np.uint32))


def page_sums(rows: U8) -> U64:
    """Return a 64-bit sum of each page, uint8 (n, 4096): equal bytes have equal ones."""
    # odd multipliers: any one word's change shows
    sums: U64 = rows.view("<u8") @ _MULTIPLIERS
    return sums


def _all(pfns: I64, state: Stored) -> U8:
    return np.full(pfns.size, int(state), dtype=np.uint8)
