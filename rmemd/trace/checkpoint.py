"""Where a recording begins: a fresh host, or the state of one that has been at work.

Owns the header, and the way from it to an engine. The state is written as the log writes it
(``engine.reopen``) and read back by the same way, save for the integrity codes, which depend on
bytes that nobody has: what frames held is made up (``values.stand_in_rows``), and sealed anew.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Any

import numpy as np
from msgspec.structs import asdict, replace

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Core, Options
from rmemd.engine.engine import Engine
from rmemd.engine.faultrules import Rule
from rmemd.engine.quotas import Limits
from rmemd.errors import RmemError
from rmemd.hooks.ops import NotifierOps
from rmemd.hooks.tx import Tx
from rmemd.hooks.writes import Write
from rmemd.model.files import RestrictedFile
from rmemd.model.host import ARENA
from rmemd.store.codec import JournalUnreadable, Record, decode, encode_record
from rmemd.store.keeping import ARENA as ARENA_NAME
from rmemd.store.keeping import JOURNALS, Keeping, file_name
from rmemd.store.log import Log
from rmemd.store.memfd import Memfd
from rmemd.trace.format import NAME, VERSION, Line, TraceError
from rmemd.trace.state import MACS
from rmemd.trace.values import numbers_of, runs_of, stand_in_rows
from rmemd.units import I64

# the revision of a host at which nothing has been done yet but that plugins were loaded
FRESH = 1
# what an engine's answers depend on
OPTIONS = ("nframes", "nnodes", "seed", "binding_overlap_errno", "inline_pages")
LINUX_RELEASES = {"6.18": 22, "7.2": 17}


def options_of(core: Core) -> dict[str, int]:
    """Return the options of an engine that its answers depend on."""
    return {name: getattr(core.options, name) for name in OPTIONS}


def ops_of(ops: NotifierOps) -> list[str]:
    """Return the names of the ops that are implemented."""
    return [name for name, there in ops.implemented().items() if there]


# --- writing -------------------------------------------------------------------------------------
def header(core: Core) -> Line:
    """Return the header of a recording that begins now, under the lock."""
    releases = {number: release for release, number in LINUX_RELEASES.items()}
    line: Line = {
        "format": NAME, "version": VERSION, "rmemd": version("rmemd"),
        "options": options_of(core),
        "linux_release": releases.get(core.options.binding_overlap_errno, ""),
        "plugins": [asdict(found) for found in core.registry.found],
        "consumers": {
            name: {"platform": offer.platform, "ops": ops_of(offer.ops)}
            for name, offer in sorted(core.registry.offers.items())
        },
        "revision": core.journal.revision,
    }  # fmt: skip
    if core.hold is not None:
        line["every_step"] = True
    if core.journal.revision != FRESH or core.rules.last:
        line["checkpoint"] = _checkpoint(core)
    return line


def _checkpoint(core: Core) -> dict[str, Any]:
    files = [file for file in core.files.all() if core.has_shared_memory(file)]
    return {
        "state": _packed(b"".join(_entries(core))),
        "arena": runs_of(np.flatnonzero(core.host.flags.view & ARENA)),
        "shared": {str(file.info.file): _present(core, file) for file in files},
        "rules": [asdict(rule) for rule in core.rules.all()], "last_rule": core.rules.last,
        "running": sorted(map(list, core.running)), "leaving": sorted(core.leaving),
    }  # fmt: skip


def _present(core: Core, file: RestrictedFile) -> list[list[int]]:
    return runs_of(core.shared_memory(file).present(0, file.info.size_pages))


def _entries(core: Core) -> Iterator[bytes]:
    for name, table in core.space.tables.items():
        writes = table.content()
        kept = tuple(write for write in writes if name != MACS or not write.table)
        yield encode_record(Record(core.journal.revision, "checkpoint", kept))


def written(revision: int, tx: Tx) -> Line:
    """Return the line of a transaction of an operation that is not in the trace."""
    writes = tuple(write for write in tx.redo if write.table != MACS)
    record = Record(revision, tx.label, writes)
    line: Line = {"wrote": revision, "record": _packed(encode_record(record))}
    if tx.freed:
        line["freed"] = runs_of(np.concatenate(tx.freed))
    return line


def _packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


# --- reading -------------------------------------------------------------------------------------
def writes_of(line: Mapping[str, Any]) -> tuple[str, tuple[Write, ...]]:
    """Return what an operation that is not in the trace wrote: its label, and the writes."""
    [record] = [entry for entry in decode(_unpacked(line["record"])) if isinstance(entry, Record)]
    return record.label, record.writes


def _unpacked(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def open_engine(head: Mapping[str, Any], changes: Mapping[str, int]) -> Engine:
    """Return an engine as it was when the recording began; ``changes`` are to its options.

    Raises:
        TraceError: a plugin that is needed is missing, or the state cannot be read.
    """
    options = Options(**{**{name: head["options"][name] for name in OPTIONS}, **changes})
    guard = Guard(clock=lambda: 0.0)
    begun = head.get("checkpoint")
    if begun is None:
        return Engine(options, guard)
    try:
        engine = Engine(options, guard, _kept(begun, options))
    except (JournalUnreadable, RmemError) as error:
        raise TraceError(
            f"the state at the recording's begin cannot be had back: {error}"
        ) from error
    core = engine.core
    core.rules.restore([Rule(**rule) for rule in begun["rules"]], begun["last_rule"])
    core.running |= {(vm, vcpu) for vm, vcpu in begun["running"]}
    core.leaving |= set(begun["leaving"])
    return engine


def _kept(begun: Mapping[str, Any], options: Options) -> Keeping:
    """Return descriptors as a process leaves them that ended where the recording begins."""
    log = Log()
    checkpoint = log.begin_checkpoint({"life": "trace", "facts": replace(options).facts})
    checkpoint.write(_unpacked(begun["state"]))
    checkpoint.commit()
    arena = Memfd("rmemd-arena", options.nframes)
    filled = numbers_of(begun["arena"])
    arena.write(filled, stand_in_rows(filled))
    found = {ARENA_NAME: arena.fd, **dict(zip(JOURNALS, log.fds, strict=True))}
    for number, runs in begun["shared"].items():
        found[file_name(int(number))] = _shared(int(number), numbers_of(runs), begun)
    return Keeping(found)


def _shared(number: int, present: I64, begun: Mapping[str, Any]) -> int:
    sizes = _sizes(begun)
    memfd = Memfd(f"rmemd-file-{number}", sizes[number])
    memfd.allocate(present)
    return memfd.fd


def _sizes(begun: Mapping[str, Any]) -> dict[int, int]:
    """Return the files' sizes in pages, as the state says them."""
    return {
        write.args[0]: write.args[1].size_pages
        for entry in decode(_unpacked(begun["state"]))
        if isinstance(entry, Record)
        for write in entry.writes
        if write.table == "files" and write.op == "set"
    }


def limits_of(line: Mapping[str, Any]) -> tuple[Limits, dict[str, Limits]]:
    """Return the quotas that a line puts in force."""
    return Limits(**line["quotas"]), {name: Limits(**one) for name, one in line["tenants"].items()}
