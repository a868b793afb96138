"""MRTD while a TD is built: what goes into the stream, in which order, and how it is resumed.

Owns the records that PAGE.ADD and MR.EXTEND measure, and the order of the pages (``Td.order``). A
hash context cannot be journalled; its digest, the order, and the pages themselves can, and are: so
a daemon that was killed measures them once more and goes on where it was.

Source: tdx.md §8.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import numpy as np

from rmemd.hooks import HookTx
from rmemd.units import I64, MAX_GFN, PAGE_SHIFT, U8, pages
from rmemd_tdx import tables as t
from rmemd_tdx.leaves import CHUNK_BYTES, Td

# pages measured at a time when a stream is taken up again: 4 MiB of plaintext
BATCH = 1024


def chunk_gpas(gfns: I64) -> I64:
    """Return the GPA in bytes of each page's 16 chunks, shape (n * 16,)."""
    gpas: I64 = (gfns[:, None] << PAGE_SHIFT) + pages(0, 16) * CHUNK_BYTES
    return gpas.ravel()


def measure(tx: HookTx, td: Td, gfns: I64, source: U8 | None) -> None:
    """Append pages to the stream in the order given: each one's ADD and, with its bytes, EXTENDs.

    ``source`` is uint8 of shape (n, 4096), ``None`` where only the GPAs are measured.

    Raises:
        Refused: TDX_MEASUREMENT_LOST; the stream is not there to go on with.
    """
    running = td.streams.get(td.fields["MRTD"])
    if running is None:
        raise t.MEASUREMENT_LOST(f"vm/{td.vm} cannot be measured any further")
    running = running.copy()
    running.update(_records(gfns, source))
    td.streams[running.digest()] = running
    tx.set(td.fields, "MRTD", running.digest())
    added = td.fields["ADDED"]
    turns = np.arange(added + 1, added + 1 + gfns.size, dtype=np.int64)
    tx.put(td.order, gfns, turns << 1 | int(source is not None))
    tx.set(td.fields, "ADDED", added + gfns.size)


def resume(td: Td, read: Callable[[I64], U8]) -> str:
    """Take the stream up again in a process that does not have it; "" if it can go on.

    ``read`` gives the plaintext of the TD's own pages, uint8 of shape (n, 4096), by gfn. Nothing
    but ``td.streams`` is changed. There is nothing to do once the TD is finalized.

    Returns:
        Why it cannot: pages whose bytes were measured are gone, or are not what was measured. The
        TD can still be finalized and run; only what is populated next is TDX_MEASUREMENT_LOST.

    Differs: on hardware the stream lies in the TD's own control structure, and cannot be lost.
    """
    mrtd: bytes = td.fields["MRTD"]
    if td.fields["OP_STATE"] != "INITIALIZED" or mrtd in td.streams:
        return ""
    gfns = td.order.touched(0, MAX_GFN)
    entries = td.order.get(gfns)
    in_turn = np.argsort(entries)
    gfns, entries = gfns[in_turn], entries[in_turn]
    with_bytes = (entries & 1).astype(np.bool_)
    again = td.fields["ADDED"] - gfns.size
    if again:
        return f"{again} pages were removed and added again before FINALIZE: MRTD has them twice"
    gone = with_bytes & np.isin(td.sept.get(gfns), (t.FREE, t.REMOVED))
    if gone.any():
        return f"gfn {int(gfns[gone][0]):#x} was measured and removed before FINALIZE"
    running = hashlib.sha384()
    for lo, hi in _batches(with_bytes):
        running.update(_records(gfns[lo:hi], read(gfns[lo:hi]) if with_bytes[lo] else None))
    if running.digest() != mrtd:
        return "the TD's initial pages are not what was measured"
    td.streams[mrtd] = running
    return ""


def _batches(with_bytes: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Iterator[tuple[int, int]]:
    """Yield [lo, hi) of at most ``BATCH`` pages that were measured alike."""
    changes = np.flatnonzero(np.diff(with_bytes)) + 1
    edges = np.union1d(changes, np.arange(0, with_bytes.size + 1, BATCH))
    edges = np.union1d(edges, [0, with_bytes.size])
    yield from zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)


def _records(gfns: I64, source: U8 | None) -> bytes:
    """Return what PAGE.ADD measures, its name and the GPA, and what MR.EXTEND does per chunk."""
    records = _named(b"MEM.PAGE.ADD", gfns << PAGE_SHIFT)
    if source is not None:
        heads = _named(b"MR.EXTEND", chunk_gpas(gfns))
        chunks = np.hstack([heads, source.reshape(-1, CHUNK_BYTES)])
        # one row per page: its ADD, then its EXTENDs; so the whole batch is hashed at once
        records = np.hstack([records, chunks.reshape(gfns.size, -1)])
    return records.tobytes()


def _named(name: bytes, gpas: I64) -> U8:
    out = np.zeros((gpas.size, 128), dtype=np.uint8)
    out[:, : len(name)] = np.frombuffer(name, dtype=np.uint8)
    out[:, 16:24] = gpas.astype("<u8").view(np.uint8).reshape(-1, 8)
    return out
