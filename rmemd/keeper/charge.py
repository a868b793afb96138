"""What a keeper is told by whoever starts it, as its one argument."""

from __future__ import annotations

import marshal

from rmemd.keeper.tuples import NamedTuple


class Charge(NamedTuple):
    """A daemon to keep.

    Attributes:
        command: how to start it again: the executable's path, then its arguments.
        socket: number of the notification socket, bound.
        path: where that is bound; the keeper removes it at its end.
        pid: the daemon's process; ``pidfd`` is the number of its pidfd.
        is_child: whether it is the keeper's own child.
        limits: its RLIMIT_NOFILE.
        delay_max_seconds: the longest pause before a restart.
        log_json: whether the log is JSON lines.
        log_level: the least that is logged.
        debuggable: whether the process stays open to debuggers.
        has_served: whether it has said that it serves.
        kept: what it has deposited so far: names, and numbers of descriptors.
    """

    command: tuple[str, ...]
    socket: int
    path: str
    pid: int
    pidfd: int
    is_child: bool
    limits: tuple[int, int]
    delay_max_seconds: float
    log_json: bool
    log_level: str
    debuggable: bool
    has_served: bool = False
    kept: tuple[tuple[str, int], ...] = ()

    def encode(self) -> str:
        """Return it as an argument."""
        # for the same interpreter, and smaller than JSON's reader
        return marshal.dumps(tuple(self)).hex()

    @classmethod
    def decode(cls, text: str) -> Charge:
        """Return what an argument says."""
        return cls(*marshal.loads(bytes.fromhex(text)))
