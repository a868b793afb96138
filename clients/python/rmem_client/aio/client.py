"""The client: one connection, one attribute per service. Start reading here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ..address import Tls, Token, find_address, find_token
from ..calls import DEFAULT_DEADLINE_S
from ..pauses import DEFAULT_RECONNECT_S
from .connection import Connection
from .consumers import Consumers
from .files import Files
from .host import Host
from .jobs import Jobs
from .sessions import Sessions
from .traces import Traces
from .vcpus import Vcpus
from .vms import Vms
from .watch import Watch, open_watch


class Client:
    """A client of one daemon; calls may be made at the same time, as many as one likes.

    It connects when it first calls, so making one never fails for want of a daemon; ``wait_ready``
    waits for one that is starting. Every refusal is an ``RmemError``, and a missing daemon
    ``DaemonUnreachable``. A call whose connection is lost is sent again once there is another; the
    daemon recognises it by its request id and does it once.

    Where the daemon is, in this order: ``socket_dir`` or ``address``; ``$RMEMD_ADDRESS``;
    ``default_socket_dir()``. The variables ``$RMEMD_CA``, ``$RMEMD_CERTIFICATE`` and ``$RMEMD_KEY``
    stand in for ``tls``, ``$RMEMD_INSECURE=1`` for ``insecure`` and ``$RMEMD_TOKEN`` for ``token``.

    Args:
        socket_dir: the directory of the daemon's socket.
        deadline_s: seconds that a call may take.
        address: "unix:/path/of/the/socket", or "host:port" for TCP.
        tls: keys for mutual TLS, which TCP needs.
        insecure: TCP without TLS, on loopback only.
        token: what every call carries to say whose it is; a callable is asked at each call.
        reconnect_s: seconds that a call may try to get a lost connection back, within its
            deadline; 0: a lost connection is an error at once.

    Raises:
        InvalidArgument: the address is none, or the arguments contradict each other.

    Attributes:
        address: where the daemon is: the socket's path, or "host:port".
        socket: path of the socket; over TCP, which has none, the address.
        host: frames, nodes, physical access and the jobs that move pages.
        files: restricted files.
        vms: virtual machines.
        vcpus: virtual CPUs.
        consumers: vendor back ends and their ops tables.
        jobs: long jobs, on the daemon's own threads.
        sessions: who calls.
        traces: recordings of what the daemon is asked.
    """

    def __init__(
        self,
        socket_dir: str | Path | None = None,
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        address: str | None = None,
        tls: Tls | None = None,
        insecure: bool = False,
        token: Token | None = None,
        reconnect_s: float = DEFAULT_RECONNECT_S,
    ) -> None:
        found = find_address(socket_dir, address, tls, insecure)
        self._connection = Connection(found, find_token(token), deadline_s, reconnect_s)
        self.address = found.text
        self.socket = Path(found.text)
        self.host = Host(self._connection)
        self.files = Files(self._connection)
        self.vms = Vms(self._connection)
        self.vcpus = Vcpus(self._connection)
        self.consumers = Consumers(self._connection)
        self.jobs = Jobs(self._connection)
        self.sessions = Sessions(self._connection)
        self.traces = Traces(self._connection)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; calls and watches under way end."""
        await self._connection.close()

    @property
    def last_revision(self) -> int:
        """The newest revision that any reply told: a watch from here sees all that follows."""
        return self._connection.last_revision

    async def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Wait until the daemon listens and its health is SERVING.

        Raises:
            DaemonUnreachable: it does not within ``timeout_s`` seconds.
        """
        await self._connection.wait_ready(timeout_s)

    def watch(self, *, start_revision: int = 0, kinds: Iterable[str] = (), vm: int = 0) -> Watch:
        """Watch what happens; the returned iterator can be closed.

        Args:
            start_revision: events after this revision; 0: from now on.
            kinds: only these kinds; none: all.
            vm: only this VM; 0: all.
        """
        return open_watch(self._connection, start_revision, kinds, vm)
