"""What clients send that they should not: refused, or the session's end; nobody else notices."""

from __future__ import annotations

import contextlib
import random
import resource
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from daemons import Daemon, eventually
from session_clients import Clients
from session_world import NPAGES, PAGE, make_vm

from rmem_client import sessionwire as wire
from rmem_client.errors import Exhausted, NotFound
from rmem_client.session import Session
from rmem_client.sessionwire import FRAME, MAGIC, RECORD, VERSION, Kind, Op, Record

FUZZED = 2000


def connect(daemon: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(30)
    sock.connect(str(daemon.socket_dir / "session.sock"))
    return sock


def receive(sock: socket.socket) -> bytes:
    """Return the next datagram, empty at the end; a reset comes before what was said last."""
    with contextlib.suppress(ConnectionError):
        return sock.recv(1 << 18)
    return sock.recv(1 << 18)


def opened(daemon: Daemon) -> socket.socket:
    sock = connect(daemon)
    sock.send(wire.hello("host", b""))
    assert wire.decode(memoryview(receive(sock))).kind == Kind.WELCOME
    return sock


def refusal(data: bytes) -> str:
    datagram = wire.decode(memoryview(data))
    assert datagram.kind == Kind.REFUSED
    return wire.refusal(bytes(datagram.body), 0).message


def usage(daemon: Daemon) -> tuple[int, int]:
    """Return how many descriptors, and threads of sessions, the daemon has."""
    tasks = Path(f"/proc/{daemon.process.pid}/task")
    return len(daemon.fds()), len(list(tasks.iterdir()))


def settled(daemon: Daemon, before: tuple[int, int]) -> bool:
    now = usage(daemon)
    return now[0] <= before[0] and now[1] <= before[1]


@pytest.fixture
def other(daemon: Daemon) -> Iterator[Session]:
    """Somebody else's session, which must go on."""
    with Session.open(daemon.socket_dir) as session:
        yield session
        with pytest.raises(NotFound):
            session.unpin(999)


BROKEN = {
    "no header": b"RM",
    "another magic": FRAME.pack(0, VERSION, Kind.REQUEST, 0, 0, 0, 0),
    "another version": FRAME.pack(MAGIC, 9, Kind.REQUEST, 0, 0, 0, 0),
    "another kind": FRAME.pack(MAGIC, VERSION, Kind.REPLY, 0, 0, 0, 0),
    "unknown flags": FRAME.pack(MAGIC, VERSION, Kind.REQUEST, 0, 4, 0, 0),
    "fewer records": FRAME.pack(MAGIC, VERSION, Kind.REQUEST, 2, 0, 0, 0) + bytes(RECORD.size),
    "more than it says": FRAME.pack(MAGIC, VERSION, Kind.REQUEST, 0, 0, 0, 0) + b"x",
    "too many records": FRAME.pack(MAGIC, VERSION, Kind.REQUEST, 1025, 0, 0, 0),
    "too much payload": FRAME.pack(MAGIC, VERSION, Kind.REQUEST, 0, 0, (128 << 10) + 1, 0),
    "longer than a datagram": bytes(wire.DATAGRAM_MAX + 1),
    "a second HELLO": wire.hello("host", b""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_frame_ends_the_session(daemon: Daemon, other: Session, what: str) -> None:
    sock = opened(daemon)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    sock.send(BROKEN[what])
    assert refusal(receive(sock))
    assert receive(sock) == b""
    sock.close()
    sessions = daemon.client().sessions.list
    assert eventually(lambda: [s.session for s in sessions().sessions] == [other.number])


@pytest.mark.parametrize(
    "hello",
    [
        b"", b"RM", wire.hello("host", b"")[:-1], wire.hello("host", b"") + b"x",
        FRAME.pack(MAGIC, VERSION, Kind.HELLO, 0, 0, 8, 0) + wire.HELLO.pack(9, 0, 0),
        wire.request(0, [Record(Op.UNPIN, 1)], False),
    ],
)  # fmt: skip
def test_a_broken_hello_opens_nothing(daemon: Daemon, hello: bytes) -> None:
    before = daemon.client().host.get().revision
    with connect(daemon) as sock:
        sock.send(hello)
        while receive(sock):
            pass
    assert daemon.client().host.get().revision == before


def test_a_silent_connection_is_hung_up_on(daemon: Daemon) -> None:
    before = usage(daemon)
    silent = [connect(daemon) for _ in range(16)]
    with connect(daemon) as one_more:
        assert "too many connections" in refusal(receive(one_more))
    for sock in silent:
        assert receive(sock) == b""
        sock.close()
    assert eventually(lambda: settled(daemon, before))
    Session.open(daemon.socket_dir).close()


def test_descriptors_that_nobody_asked_for(
    daemon: Daemon, other: Session, clients: Clients
) -> None:
    """253 in one message: none is ever installed, and the session ends; likewise in a HELLO."""
    before = usage(daemon)
    good = wire.request(1, [Record(Op.UNPIN, 1)], False)
    for _ in range(3):
        sender = clients().open(daemon.socket_dir)
        sender.do("send", good, nfds=253)
        number = sender.session
        assert eventually(lambda number=number: _closed(daemon, number)) == "protocol"
        sender.kill()
        sender = clients()
        sender.do("connect", str(daemon.socket_dir))
        sender.do("send", wire.hello("host", b""), nfds=1)
        assert "descriptors" in refusal(sender.do("receive"))
        assert sender.do("receive") == b""
        sender.kill()
    assert eventually(lambda: settled(daemon, before)), usage(daemon)


def _closed(daemon: Daemon, session: int) -> str:
    for line in daemon.log_lines:
        if line["event"] == "session_closed" and line["session"] == session:
            return str(line["why"])
    return ""


def test_anything_on_the_wire(daemon: Daemon, other: Session) -> None:
    """Random records and frames: the daemon lives and says INVALID; others are untouched."""
    dice = random.Random(3)
    vm, file = make_vm(daemon.client(token=other.token))
    other.convert_file(file, 0, PAGE, private=False)
    other.write_shared(file, 0, b"untouched")
    before = usage(daemon)
    sock, seen = opened(daemon), Counter[str]()
    for _ in range(FUZZED):
        try:
            sock.send(_anything(dice))
            reply = wire.decode(memoryview(sock.recv(1 << 18)))
        except (ConnectionError, wire.ProtocolError):
            sock.close()
            sock = opened(daemon)
            continue
        if reply.kind == Kind.REPLY:
            for result in wire.results(reply):
                seen["done" if result.error is None else result.error.reason] += 1
                assert result.error is None or result.error.reason != "INTERNAL", result
        else:
            seen["session ended"] += 1
            sock.close()
            sock = opened(daemon)
    sock.close()
    assert {"BAD_REQUEST", "UNKNOWN_FLAG", "NO_SUCH_PIN", "session ended"} <= seen.keys(), seen
    assert other.read_shared(file, 0, 9) == b"untouched"
    assert not [line for line in daemon.log_lines if line["level"] == "error"]
    assert eventually(lambda: settled(daemon, before)), usage(daemon)
    assert daemon.client().vms.get(vm).vm == vm


def _anything(dice: random.Random) -> bytes:
    numbers = [0, 1, 2, 7, PAGE, NPAGES * PAGE, (1 << 31), (1 << 63) - 1, 1 << 63, (1 << 64) - 1]

    def number() -> int:
        return dice.choice(numbers) if dice.random() < 0.8 else dice.getrandbits(64)

    records = [
        Record(
            dice.randrange(1, len(Op) + 1) if dice.random() < 0.9 else dice.getrandbits(16),
            # nobody's objects: what is fuzzed here is the way to them
            dice.choice([0, 987654, number() | 1 << 32]), number() * dice.randrange(2),
            number() * dice.randrange(2), number() * (dice.random() < 0.2),
            dice.choice([0, 0, 0, 1, 2, 0x8000]), dice.randbytes(dice.choice([0, 0, 8, 100])),
        )
        for _ in range(dice.randrange(4))
    ]  # fmt: skip
    data = bytearray(wire.request(dice.getrandbits(32), records, dice.random() < 0.3))
    if dice.random() < 0.2:
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    if dice.random() < 0.05:
        del data[dice.randrange(len(data)) :]
    return bytes(data) or b"x"


def test_a_full_table_of_descriptors(daemon: Daemon, other: Session) -> None:
    """EMFILE: sessions that are there go on, new ones are told no, and it recovers."""
    pid = daemon.process.pid
    room = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    lowest = max(int(name) for name in daemon.fds()) + 1
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest + 1, room[1]))
    try:
        refused = []
        with contextlib.ExitStack() as stack:
            # there are numbers below the highest that are free again
            while not refused:
                sock = stack.enter_context(connect(daemon))
                with contextlib.suppress(BrokenPipeError):
                    sock.send(wire.hello("host", b""))
                data = receive(sock)
                if wire.decode(memoryview(data)).kind == Kind.REFUSED:
                    refused.append(refusal(data))
            with pytest.raises(NotFound):
                other.unpin(999)
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, room)
    with Session.open(daemon.socket_dir) as again:
        assert again.number > other.number


def test_a_slow_reader_loses_its_session(daemon: Daemon, other: Session) -> None:
    """Notices that nobody reads are not kept for ever."""
    slow = opened(daemon)
    client = daemon.client()
    _, file = make_vm(client)
    # each page that is punched from its ranges is a notice
    register = [Record(Op.USERFAULT_REGISTER, file, 0, NPAGES * PAGE)]
    slow.send(wire.request(1, register, False))
    assert wire.results(wire.decode(memoryview(receive(slow))))[0].error is None
    session = max(s.session for s in client.sessions.list().sessions)
    ended = threading.Event()

    def punch() -> None:
        with Session.open(daemon.socket_dir, role="admin") as admin:
            while not ended.is_set():
                with admin.batch() as batch:
                    got = [batch.get(file, n * PAGE, PAGE) for n in range(0, NPAGES, 2)]
                admin.put(pfn for pages in got for pfn in pages.result())
                client.files.punch(file, 0, NPAGES * PAGE)

    thread = threading.Thread(target=punch)
    thread.start()
    try:
        assert eventually(lambda: _closed(daemon, session)) == "slow reader"
    finally:
        ended.set()
        thread.join(30)
    slow.close()


# --- limits --------------------------------------------------------------------------------------
def test_every_quota_is_checked_before_anything_is_made(daemons: object) -> None:
    daemon = daemons(  # type: ignore[operator]
        "--set", "limits.frames=8", "--set", "limits.pinned_pages=4", "--set", "limits.sessions=2",
        "--set", "limits.fds=2", "--set", "limits.watches=1",
    )  # fmt: skip
    with Session.open(daemon.socket_dir) as session:
        client = daemon.client(token=session.token)
        _, file = make_vm(client)
        session.convert_file(file, 0, NPAGES * PAGE, private=False)

        def refused(call: object, what: str) -> None:
            before = client.host.get()
            with pytest.raises(Exhausted, match="QUOTA") as found:
                call()  # type: ignore[operator]
            assert (found.value.where, found.value.errno_name) == (what, "EDQUOT")
            after = client.host.get()
            assert (after.revision, after.free_pages) == (before.revision, before.free_pages)

        session.pin(file, 0, 3 * PAGE)
        refused(lambda: session.pin(file, 0, 2 * PAGE), "pinned_pages")
        refused(lambda: session.get(file, 0, 2 * PAGE), "pinned_pages")
        session.get(file, 0, PAGE)
        refused(lambda: session.pin(file, 0, PAGE), "pinned_pages")
        session.write_shared(file, 0, bytes(8 * PAGE))
        refused(lambda: session.write_shared(file, 0, bytes(9 * PAGE)), "frames")
        maps = [session.shared_memory(file) for _ in range(2)]
        refused(lambda: session.fd(file), "fds")
        used = {x.what: x.used for x in client.sessions.whoami().limits}
        assert (used["fds"], used["frames"], used["pinned_pages"]) == (2, 8, 4)
        with Session.open(daemon.socket_dir):
            refused(lambda: Session.open(daemon.socket_dir), "sessions")
        with client.watch() as watch:
            watch.start()
            with pytest.raises(Exhausted, match="QUOTA"), client.watch() as second:
                second.start()
        for one in maps:
            one.close()
    # what was passed counts until the session ends, however often it is closed
    admin = daemon.client()
    assert eventually(lambda: not admin.sessions.list().sessions)
    # counted until its thread is through, a moment after the session is gone
    used_fds = lambda: {x.what: x.used for x in admin.sessions.whoami().limits}["fds"]  # noqa: E731
    assert eventually(lambda: not used_fds())
