"""The client: one connection, one attribute per service. Start reading here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .connection import DEFAULT_DEADLINE_S, Connection
from .consumers import Consumers
from .files import Files
from .host import Host
from .vcpus import Vcpus
from .vms import Vms
from .watch import Watch, open_watch


class Client:
    """A client of one daemon; safe to use from many threads.

    It connects when it first calls, so making one never fails; ``wait_ready`` waits for a daemon
    that is starting. Every refusal is an ``RmemError``, and a missing daemon ``DaemonUnreachable``.

    Args:
        socket_dir: the directory of the daemon's socket; default: ``default_socket_dir()``.
        deadline_s: seconds that a call may take.

    Attributes:
        socket: path of the socket.
        host: frames, nodes, physical access and the jobs that move pages.
        files: restricted files.
        vms: virtual machines.
        vcpus: virtual CPUs.
        consumers: vendor back ends and their ops tables.
    """

    def __init__(
        self, socket_dir: str | Path | None = None, *, deadline_s: float = DEFAULT_DEADLINE_S
    ) -> None:
        self._connection = Connection(socket_dir, deadline_s)
        self.socket = self._connection.socket
        self.host = Host(self._connection)
        self.files = Files(self._connection)
        self.vms = Vms(self._connection)
        self.vcpus = Vcpus(self._connection)
        self.consumers = Consumers(self._connection)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; calls and watches under way end."""
        self._connection.close()

    @property
    def last_revision(self) -> int:
        """The newest revision that any reply told: a watch from here sees all that follows."""
        return self._connection.last_revision

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Wait until the daemon listens and its health is SERVING.

        Raises:
            DaemonUnreachable: it does not within ``timeout_s`` seconds.
        """
        self._connection.wait_ready(timeout_s)

    def watch(self, *, start_revision: int = 0, kinds: Iterable[str] = (), vm: int = 0) -> Watch:
        """Watch what happens; the returned iterator can be closed.

        Args:
            start_revision: events after this revision; 0: from now on.
            kinds: only these kinds; none: all.
            vm: only this VM; 0: all.
        """
        return open_watch(self._connection, start_revision, kinds, vm)
