"""A pager's process (``python -m rmem_vmm.pager``): faults of a guest, resolved by another process.

Owns the handler's end. It has a session of its own and a file of bytes. Faults on shared holes it
fills from that file (UFFDIO_COPY), since the host may know those bytes; a private page's are the
guest's own, so that such a fault can only be let go on (UFFDIO_CONTINUE). Nothing of it is needed
for the guest to live: when it dies, its registrations go, and faults allocate pages as ever.
"""

from __future__ import annotations

import os
import select
import sys
from typing import Any

from rmem_client import RmemError
from rmem_client.constants import PAGE_BYTES
from rmem_client.session import Session
from rmem_client.sessionwire import Notice

from .channel import Channel, Hangup, Message, be_child

# what one record of the session socket carries at most
PIECE_BYTES = 128 * 1024


class Pager:
    """Resolves faults of registered ranges.

    Args:
        session: the pager's session.
        channel: to the VMM.
        source: the file whose bytes shared pages are made of.
    """

    def __init__(self, session: Session, channel: Channel, source: int) -> None:
        self._session = session
        self._channel = channel
        self._source = source
        self._holding = False

    def serve(self) -> None:
        """Serve until the VMM hangs up.

        Raises:
            Hangup: it has.
        """
        sources: list[Any] = [self._session, self._channel]
        while True:
            ready, _, _ = select.select(sources, [], [])
            if self._channel in ready:
                self._ordered(self._channel.receive()[0])
            # a call may have read a notice while it waited for its answer
            while (notice := self._session.next_notice(0)) is not None:
                self._noticed(notice)

    def _noticed(self, notice: Notice) -> None:
        if notice.kind == "closed":
            raise Hangup
        if notice.kind == "fault":
            if self._holding:
                self._channel.send({"event": "holds", **_where(notice)})
                return
            self._resolve(notice)
        else:
            self._channel.send({"event": notice.kind, **_where(notice)})

    def _resolve(self, fault: Notice) -> None:
        file, offset, length = fault.file, fault.offset_bytes, fault.length_bytes
        if fault.private:
            self._session.resolve_continue(file, offset, length, private=True)
            how = "continued"
        else:
            for at in range(offset, offset + length, PIECE_BYTES):
                size = min(PIECE_BYTES, offset + length - at)
                data = os.pread(self._source, size, at)
                self._session.resolve_copy(file, at, data.ljust(size, b"\0"))
            how = "copied"
        self._channel.send({"event": "resolved", "how": how, **_where(fault)})

    def _ordered(self, order: Message) -> None:
        if order["do"] == "register":
            userfault = self._session.register_faults(
                order["file"], order["offset"], order["length"]
            )
            self._channel.send({"event": "registered", "userfault": userfault})
        elif order["do"] == "hold":
            self._holding = True
            self._channel.send({"event": "holding"})


def _where(notice: Notice) -> Message:
    return {
        "file": notice.file, "offset": notice.offset_bytes,
        "pages": notice.length_bytes // PAGE_BYTES, "private": notice.private,
    }  # fmt: skip


def _serve(channel: Channel) -> None:
    spec, fds = channel.receive()
    with Session.open(spec["socket_dir"], role="host") as session:
        channel.send({"event": "ready", "session": session.number})
        Pager(session, channel, fds[0]).serve()


def main() -> int:
    """Be a pager; return the exit status."""
    return be_child(_serve, RmemError, OSError)


if __name__ == "__main__":
    sys.exit(main())
