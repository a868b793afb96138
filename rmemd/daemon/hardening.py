"""What the process gives up before it serves: reliability.md §6, as far as it needs no other user.

Owns no-new-privs, dumpability and core dumps, whose contents would be guests' plaintext. All of it
is of the whole process and cannot be taken back, so it is the command that asks for it, and not a
``Daemon`` that a test runs in its own process.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable

import structlog

PR_SET_DUMPABLE = 4
PR_SET_NO_NEW_PRIVS = 38

log = structlog.get_logger("rmemd")


def harden(debuggable: bool) -> None:
    """Give up privileges and dumps; what fails is a warning. ``debuggable`` keeps the dumps.

    Not dumpable also means that /proc/PID/{fd,mem,maps} are root's: nobody of the same user can
    attach a debugger, read our memory or open our memfds anew.
    """
    done = {"no_new_privs": _try("no_new_privs", lambda: _prctl(PR_SET_NO_NEW_PRIVS, 1))}
    if not debuggable:
        done["undumpable"] = _try("undumpable", lambda: _prctl(PR_SET_DUMPABLE, 0))
        done["no_core"] = _try("no_core", lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)))
    log.info("hardened", debuggable=debuggable, **done)


def _try(what: str, do: Callable[[], None]) -> bool:
    try:
        do()
    except (OSError, ValueError) as error:
        log.warning("not_hardened", what=what, error=str(error))
        return False
    return True


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
