"""Faults that a handler resolves: found at a hole of a registered range, and waited for.

Owns where a fault turns into one that waits, and how it waits. A look-up asks ``require_present``
before it allocates; what meets a hole there gives up its transaction, is told to the handler, and
begins again when the page is there, the registration is gone, or the guest's memory has changed
under it (``unit``). Source: Linux fs/userfaultfd.c, handle_userfault; the guest_memfd series of
March 2026 (restrictedmem.md §4).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np

from rmemd.engine.core import Core
from rmemd.engine.driver import Step, Steps
from rmemd.engine.pendingfaults import NO_PAGES, Missing
from rmemd.engine.waits import WaitFor, pages_text
from rmemd.errors import INTERRUPTED, RmemError
from rmemd.model.files import RestrictedFile
from rmemd.units import I64

T = TypeVar("T")
RULE = "Linux handle_userfault: wait, then fault again"
HANDLER = "page fault handler"


def require_present(
    core: Core,
    file: RestrictedFile,
    pgoffs: I64,
    private: bool,
    *,
    write: bool,
    vm: int = 0,
    shift: int = 0,
    unchanged: Callable[[], bool] = lambda: True,
) -> None:
    """Have a fault wait for its handler if it meets holes of registered ranges.

    Args:
        core: the engine's core.
        file: the file.
        pgoffs: the pages that are looked up.
        private: which half.
        write: whether the access writes.
        vm: whose access it is, 0 if the host's.
        shift: gfn less pgoff, of a guest's.
        unchanged: whether the fault is still what it was; otherwise it looks again.

    Raises:
        Missing: caught by ``unit``.
    """
    if not core.userfaults:
        return
    number = file.info.file
    holes = missing(core, file, pgoffs, private)
    if not holes.size:
        return

    def still() -> I64:
        if not core.files.exists(number) or not unchanged():
            return NO_PAGES
        return missing(core, core.files.get(number), found.pgoffs, private)

    found = Missing(number, holes, private, write, vm, shift, still)
    raise found


def missing(core: Core, file: RestrictedFile, pgoffs: I64, private: bool) -> I64:
    """Return those pages that are holes of registered ranges."""
    covered = pgoffs[core.userfaults.covers(file.info.file, pgoffs)]
    holes: I64 = covered[file.half(private).get(covered) == 0]
    return holes


def alike(core: Core, file: RestrictedFile, pgoffs: I64, private: bool) -> int:
    """Count the pages at the front that are all there, or all to be waited for.

    A guest gets as far as it can before it waits, as it does with a fault per page.
    """
    absent = np.isin(pgoffs, missing(core, file, pgoffs, private))
    return int(np.argmax(np.append(absent != absent[0], True)))


def unit(core: Core, make: Callable[[], Steps[T]]) -> Steps[T]:
    """Run one transaction's steps as ``Core.unit`` does, and wait for handlers in between.

    Raises:
        Unavailable: INTERRUPTED; the caller went away, or the VM or the daemon goes.
    """
    return _waited_for(core, partial(core.unit, make))


def at_once(core: Core, act: Callable[[], T]) -> Steps[T]:
    """Do what never lets the lock go as ``Core.at_once`` does, and wait for handlers in between.

    Raises:
        Unavailable: INTERRUPTED; the caller went away, or the VM or the daemon goes.
    """
    return _waited_for(core, partial(core.at_once, act))


def _waited_for(core: Core, make: Callable[[], Steps[T]]) -> Steps[T]:
    while True:
        try:
            return (yield from make())
        except Missing as met:
            # without its frames, which hold the transaction that was given up
            fault = met.with_traceback(None)
        yield from _wait(core, fault)


def _wait(core: Core, fault: Missing) -> Steps[None]:
    core.pending_faults.add(fault)
    try:
        while fault.pgoffs.size:
            waiting = Step("userfault", wait=True, on=_on(core, fault), interruptible=True)
            if not (core.draining or fault.vm in core.leaving):
                yield waiting
                if not waiting.cancelled or not fault.pgoffs.size:
                    continue
            raise _interrupted(fault)
    finally:
        core.pending_faults.leave(fault)


def _on(core: Core, fault: Missing) -> WaitFor:
    first = int(fault.pgoffs[0])
    holders = [one.holder for one in core.userfaults.of_file(fault.file) if one.end > first]
    npages = int(fault.pgoffs[-1]) + 1 - first
    return WaitFor(holders[0], HANDLER, pages_text("file", fault.file, first, npages))


def _interrupted(fault: Missing) -> RmemError:
    first = int(fault.pgoffs[0])
    return INTERRUPTED(
        f"pgoff {first:#x} of file/{fault.file} was not there yet", page=f"pgoff {first:#x}",
        state="waits for its page fault handler", rule=RULE,
    )  # fmt: skip
