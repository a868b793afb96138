"""The session socket: who comes in, every op there and back, batches, what is refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from daemons import Daemon, eventually
from session_clients import ClientProcess, ClientRefused, Clients
from session_world import DEVICE, GUEST, HOST, NPAGES, PAGE, grant, make_vm

from rmem_client import vcpus
from rmem_client.errors import (
    Busy,
    DaemonUnreachable,
    Denied,
    Exhausted,
    InvalidArgument,
    NotFound,
    RmemError,
    Unsupported,
)
from rmem_client.session import Batch, Session


@pytest.fixture
def host(daemon: Daemon) -> Iterator[Session]:
    """A host session of this process."""
    with Session.open(daemon.socket_dir) as session:
        yield session


# --- coming in -----------------------------------------------------------------------------------
def test_a_session_is_its_process_user(daemon: Daemon, clients: Clients) -> None:
    one = clients().open(daemon.socket_dir)
    listed = daemon.client().sessions.list().sessions
    assert [(s.session, s.pid, s.tenant, s.role, s.door, s.parent) for s in listed] == [
        (one.session, one.pid, "uid:0", HOST, "socket", 0)
    ]
    who = daemon.client(token=one.token).sessions.whoami()
    assert (who.session, who.role, who.tenant) == (one.session, HOST, "uid:0")
    assert {x.what: x.used for x in who.limits}["sessions"] == 1
    one.kill()
    assert eventually(lambda: not daemon.client().sessions.list().sessions)


def test_the_client_needs_no_grpc(daemon: Daemon) -> None:
    script = (
        "import sys; from rmem_client.session import Session\n"
        f"with Session.open({str(daemon.socket_dir)!r}, role='admin') as s:\n"
        "    assert s.role == 'admin' and s.number == 1\n"
        "assert not [m for m in sys.modules if m.split('.')[0] in ('grpc', 'numpy')]\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_roles_and_tickets(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    vm, file = make_vm(client)
    guest_ticket = client.sessions.create_ticket(GUEST, vm=vm)
    with Session.open(daemon.socket_dir, ticket=guest_ticket) as guest:
        assert (guest.role, guest.vm, guest.tenant) == ("guest", vm, host.tenant)
        # a ticket is good once
        with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
            Session.open(daemon.socket_dir, ticket=guest_ticket)
    device_ticket = client.sessions.create_ticket(DEVICE, grants=[grant(file, 0, 1)])
    with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
        Session.open(daemon.socket_dir, ticket=bytes(len(device_ticket)))
    with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
        Session.open(daemon.socket_dir, ticket=device_ticket[:-1])
    with Session.open(daemon.socket_dir, role="device", ticket=device_ticket) as device:
        assert device.role == "device"
    # asking for another role than the ticket's uses it up
    other = client.sessions.create_ticket(DEVICE, grants=[grant(file, 0, 1)])
    with pytest.raises(InvalidArgument, match="role"):
        Session.open(daemon.socket_dir, role="guest", ticket=other)
    with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
        Session.open(daemon.socket_dir, ticket=other)
    for role in ("guest", "device"):
        with pytest.raises(InvalidArgument, match="needs a ticket"):
            Session.open(daemon.socket_dir, role=role)


def test_a_token_ends_with_its_session(daemon: Daemon) -> None:
    with Session.open(daemon.socket_dir) as session:
        token = session.token
        client = daemon.client(token=token)
        assert client.sessions.whoami().session == session.number
        for guessed in (token[:-1], token.upper(), "0" * len(token), token + "0"):
            with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
                daemon.client(token=guessed).sessions.whoami()
    assert eventually(lambda: not daemon.client().sessions.list().sessions)
    with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
        client.sessions.whoami()


def test_a_ticket_ends_with_its_makers_session(daemon: Daemon) -> None:
    with Session.open(daemon.socket_dir) as session:
        client = daemon.client(token=session.token)
        vm, _ = make_vm(client)
        ticket = client.sessions.create_ticket(GUEST, vm=vm)
    assert eventually(lambda: not daemon.client().sessions.list().sessions)
    with pytest.raises(Denied, match="TOKEN_UNKNOWN"):
        Session.open(daemon.socket_dir, ticket=ticket)


@pytest.mark.parametrize("reconnect_s", [0.0, 0.1])
def test_nobody_answers(daemon: Daemon, reconnect_s: float) -> None:
    host = Session.open(daemon.socket_dir, reconnect_s=reconnect_s)
    daemon.stop()
    for _ in range(2):
        with pytest.raises(DaemonUnreachable):
            host.unpin(1)
    host.close()
    with pytest.raises(DaemonUnreachable):
        Session.open(daemon.socket_dir)


# --- every op ------------------------------------------------------------------------------------
def test_shared_bytes_and_descriptors(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    _, file = make_vm(client)
    host.convert_file(file, 0, NPAGES * PAGE, private=False)
    host.write_shared(file, 10, b"by record")
    with host.shared_memory(file) as memory:
        assert bytes(memory.view[10:19]) == b"by record"
        memory.view[PAGE : PAGE + 6] = b"mapped"
    assert host.read_shared(file, PAGE, 6) == b"mapped"
    with host.shared_memory(file, PAGE, PAGE, read_only=True) as part:
        assert bytes(part.view[:6]) == b"mapped"
        assert len(part.view) == PAGE
        assert part.view.readonly
    with pytest.raises(RmemError, match="HOST_SIGBUS"):
        host.read_shared(file, NPAGES * PAGE, 1)
    with pytest.raises(Exhausted, match="MESSAGE_TOO_BIG"):
        host.read_shared(file, 0, (128 << 10) + 1)


def test_pages_got_and_pinned(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    _, file = make_vm(client)
    host.convert_file(file, 0, 4 * PAGE, private=False)
    handle = host.pin(file, 0, 2 * PAGE, "ring")
    (pin,) = client.files.pins(file).pins
    assert (pin.pin, pin.session, pin.purpose) == (handle, host.number, "ring")
    with pytest.raises(Busy, match="FOLIO_BUSY") as refused:
        host.convert_file(file, 0, PAGE, private=True)
    assert refused.value.errno_name == "EAGAIN"
    assert [holder.name for holder in refused.value.holders] == [f"session {host.number} pin 1"]
    host.unpin(handle)
    host.convert_file(file, 0, PAGE, private=True)
    with pytest.raises(NotFound, match="NO_SUCH_PIN"):
        host.unpin(handle)
    pfns = host.get(file, 8 * PAGE, 3 * PAGE)
    assert len(set(pfns)) == 3
    page = daemon.client().host.page(pfn=pfns[0])
    assert [(h.name, h.purpose) for h in page.holders] == [(f"session {host.number}", "get")]
    assert host.put(pfns[:1]) == 1
    with pytest.raises(RmemError, match="NOT_HELD"):
        host.put(pfns)
    assert host.put(pfns[1:]) == 2


def test_guest_memory(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    vm, file = make_vm(client)
    assert host.fault(vm, 0, 4 * PAGE) == 4
    ticket = client.sessions.create_ticket(GUEST, vm=vm)
    with Session.open(daemon.socket_dir, ticket=ticket) as guest:
        guest.write_guest(vm, 0, 100, b"the guest's own")
        assert guest.read_guest(vm, 0, 100, 15) == b"the guest's own"
        assert guest.fault(vm, 4 * PAGE, PAGE) == 1
        for call in (
            lambda: guest.fd(file), lambda: guest.read_shared(file, 0, 1),
            lambda: guest.get(file, 0, PAGE), lambda: guest.pin(file, 0, PAGE),
        ):  # fmt: skip
            with pytest.raises(Denied, match="ROLE_DENIED"):
                call()
    with Session.open(daemon.socket_dir, role="admin") as admin:
        for session in (host, admin):
            with pytest.raises(Denied, match="ROLE_DENIED"):
                session.read_guest(vm, 0, 100, 15)
            with pytest.raises(Denied, match="ROLE_DENIED"):
                session.write_guest(vm, 0, 100, b"x")


def test_conversion_of_both_kinds(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    vm, file = make_vm(client)
    host.convert_file(file, 0, 4 * PAGE, private=False)
    done = host.convert_file(file, 0, 2 * PAGE, private=True)
    assert done.changed_pages == 2
    with pytest.raises(Unsupported, match="WRONG_PERSONALITY"):
        host.convert(vm, 0, PAGE, private=True)
    other, _ = make_vm(client, "tdx-relocate", flags=0)
    assert host.convert(other, 0, 4 * PAGE, private=False) is True
    assert host.convert(other, 0, 4 * PAGE, private=False) is False
    with pytest.raises(InvalidArgument, match="NOT_PAGE_ALIGNED"):
        host.convert(other, 1, PAGE, private=True)


def test_a_page_fault_handler_in_another_process(daemon: Daemon, clients: Clients) -> None:
    """A vCPU waits for a page; another process is told, and gives it."""
    vmm, handler = (clients().open(daemon.socket_dir) for _ in range(2))
    client = daemon.client(token=vmm.token)
    vm, file = make_vm(client, "tdx-relocate", flags=0)
    client.vms.set_memory_attributes(vm, [(0, NPAGES * PAGE, 0)])
    client.vms.finalize(vm)
    userfault = handler.do("register_faults", file, 0, NPAGES * PAGE)
    programme = [vcpus.check(2 * PAGE, PAGE, byte=7, private=False)]
    client.vcpus.set_programme(vm, 0, programme)
    handler.begin("notice")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.vcpus.run, vm, 0)
        told = handler.end()
        assert (told["kind"], told["file"], told["userfault"]) == ("fault", file, userfault)
        assert (told["vm"], told["gpa"], told["offset_bytes"]) == (vm, 2 * PAGE, 2 * PAGE)
        assert not told["private"]
        with pytest.raises(ClientRefused, match="NO_SUCH_USERFAULT"):
            vmm.do("resolve_zero", file, 2 * PAGE, PAGE)
        assert handler.do("resolve_copy", file, 2 * PAGE, b"\x07" * PAGE) == 1
        exited = running.result(30)
    assert exited.mismatched_pages == 0
    assert handler.do("resolve_zero", file, 3 * PAGE, PAGE) == 1
    assert handler.do("resolve_continue", file, 4 * PAGE, PAGE) == 1
    handler.do("wake_faults", file, 0, PAGE)
    handler.do("unregister_faults", userfault)
    for one in (vmm, handler):
        one.kill()


# --- batches -------------------------------------------------------------------------------------
def test_a_batch_is_many_operations(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    _, file = make_vm(client)
    host.convert_file(file, 0, NPAGES * PAGE, private=False)
    with host.batch() as batch:
        pins = [batch.pin(file, n * PAGE, PAGE) for n in range(NPAGES)]
        bad = batch.pin(file, 1, PAGE)
        written = batch.write_shared(file, 0, b"one")
        read = batch.read_shared(file, 0, 3)
    assert len({pin.result() for pin in pins}) == NPAGES
    assert written.error is None
    assert read.result() == b"one"
    with pytest.raises(InvalidArgument, match="NOT_PAGE_ALIGNED"):
        bad.result()
    with host.batch() as batch:
        gone = [batch.unpin(pin.result()) for pin in pins]
    assert not any(one.error for one in gone)
    assert not client.files.pins(file).pins


def test_stop_leaves_out_what_comes_after_a_refusal(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    _, file = make_vm(client)
    host.convert_file(file, 0, PAGE, private=False)
    with host.batch(stop=True) as batch:
        first = batch.pin(file, 0, PAGE)
        second = batch.unpin(99)
        third = batch.pin(file, 0, PAGE)
    assert first.error is None
    assert isinstance(second.error, NotFound)
    assert third.error is not None
    assert third.error.errno == 125, "ECANCELED"  # type: ignore[attr-defined]
    assert len(client.files.pins(file).pins) == 1


def test_a_full_datagram_is_carried_out(daemon: Daemon, host: Session) -> None:
    client = daemon.client(token=host.token)
    _, file = make_vm(client)
    host.convert_file(file, 0, NPAGES * PAGE, private=False)
    with host.batch() as batch:
        results = [batch.write_shared(file, 128 * n, bytes([n & 255]) * 128) for n in range(1024)]
    assert not any(result.error for result in results)
    with host.batch() as batch:
        whole = batch.read_shared(file, 0, 128 << 10)
        more = batch.read_shared(file, 0, 1)
    assert whole.result() == b"".join(bytes([n & 255]) * 128 for n in range(1024))
    assert isinstance(more.error, Exhausted)
    full = Batch()
    for _ in range(1025):
        full.unpin(1)
    with pytest.raises(ValueError, match="too much"), host.batch() as batch:
        batch.records.extend(full.records)


# --- whose it is ---------------------------------------------------------------------------------
def test_another_tenants_objects_are_not_there(daemon: Daemon, host: Session) -> None:
    """Absent and not yours are refused alike, in every op."""
    client = daemon.client(token=host.token)
    vm, file = make_vm(client)
    host.convert_file(file, 0, 4 * PAGE, private=False)
    pin = host.pin(file, 0, PAGE)
    ticket = daemon.client().sessions.create_ticket(HOST, tenant="uid:4242")
    with Session.open(daemon.socket_dir, ticket=ticket) as other:
        assert other.tenant == "uid:4242"
        _refused_alike(other, vm, file, pin)
    assert len(client.files.pins(file).pins) == 1


def _refused_alike(other: Session, vm: int, file: int, pin: int) -> None:
    calls = {
        "file": [
            lambda n: other.get(n, 0, PAGE), lambda n: other.pin(n, 0, PAGE),
            lambda n: other.fd(n), lambda n: other.read_shared(n, 0, 1),
            lambda n: other.write_shared(n, 0, b"x"), lambda n: other.register_faults(n, 0, PAGE),
            lambda n: other.convert_file(n, 0, PAGE, private=True),
            lambda n: other.resolve_zero(n, 0, PAGE), lambda n: other.resolve_copy(n, 0, b""),
        ],
        "vm": [
            lambda n: other.fault(n, 0, PAGE), lambda n: other.convert(n, 0, PAGE, private=True)
        ],
        "pin": [lambda n: other.unpin(n)],
    }  # fmt: skip
    for number, kind in ((file, "file"), (vm, "vm"), (pin, "pin")):
        for call in calls[kind]:
            refusals = []
            for named in (number, 987654):
                with pytest.raises(NotFound) as refused:
                    call(named)
                said = refused.value.as_dict()
                said.pop("revision")
                refusals.append(str(said).replace(str(named), "N"))
            assert refusals[0] == refusals[1]


def test_a_device_reaches_its_grant_and_nothing_else(
    daemon: Daemon, host: Session, clients: Clients, capsys: pytest.CaptureFixture[str]
) -> None:
    client = daemon.client(token=host.token)
    vm, file = make_vm(client)
    _, second = make_vm(client)
    for one in (file, second):
        host.convert_file(one, 0, NPAGES * PAGE, private=False)
    foreign_pin = host.pin(file, 0, PAGE)
    host.write_shared(file, 0, b"not the device's")
    grants = [grant(file, 4, 4), grant(file, 8, 2, read_only=True)]
    ticket = client.sessions.create_ticket(DEVICE, grants=grants)
    device = clients().open(daemon.socket_dir, ticket=ticket.hex())
    device.do("write_shared", file, 4 * PAGE, b"in the ring")
    assert host.read_shared(file, 4 * PAGE, 11) == b"in the ring"
    assert device.do("read_shared", file, 8 * PAGE, 5) == bytes(5)
    mine = device.do("pin", file, 4 * PAGE, 4 * PAGE)
    tries = {
        "read below its range": ("read_shared", file, 3 * PAGE, 16),
        "read across its start": ("read_shared", file, 4 * PAGE - 1, 2),
        "read past its range": ("read_shared", file, 10 * PAGE, 1),
        "write what it may read": ("write_shared", file, 8 * PAGE, b"x"),
        "write below its range": ("write_shared", file, 0, b"x"),
        "pin more than its range": ("pin", file, 4 * PAGE, 5 * PAGE),
        "pin what it may read": ("pin", file, 8 * PAGE, PAGE),
        "a descriptor of the file": ("fd", file),
        "read another file": ("read_shared", second, 0, 1),
        "write another file": ("write_shared", second, 0, b"x"),
        "a descriptor of another file": ("fd", second),
        "unpin the VMM's pin": ("unpin", foreign_pin),
        "references on private pages": ("get", file, 4 * PAGE, PAGE),
        "drop references": ("put", [1]),
        "convert its range": ("convert_file", file, 4 * PAGE, PAGE),
        "handle page faults": ("register_faults", file, 4 * PAGE, PAGE),
        "fault the guest's memory": ("fault", vm, 0, PAGE),
        "read the guest's memory": ("read_guest", vm, 0, 0, 1),
        "write the guest's memory": ("write_guest", vm, 0, 0, b"x"),
    }
    said = {}
    for what, (name, *args) in tries.items():
        named = {"private": True} if name == "convert_file" else {}
        with pytest.raises(ClientRefused) as refused:
            device.do(name, *args, **named)
        said[what] = refused.value.reason
    assert set(said.values()) == {"NOT_GRANTED", "NO_SUCH_FILE", "NO_SUCH_PIN", "ROLE_DENIED"}
    assert [w for w, reason in said.items() if "another" in w and reason != "NO_SUCH_FILE"] == []
    rpc = daemon.client(token=device.token)
    for what, call in {
        "gRPC: the VM": lambda: rpc.vms.get(vm), "gRPC: a new VM": lambda: rpc.vms.create("null"),
        "gRPC: a ticket": lambda: rpc.sessions.create_ticket(DEVICE, grants=[grant(file, 0, 1)]),
        "gRPC: the VMM's session": lambda: rpc.sessions.close(host.number),
        "gRPC: another file": lambda: rpc.files.get(second),
        "gRPC: physical memory": lambda: rpc.host.page(pfn=1),
    }.items():  # fmt: skip
        with pytest.raises(RmemError) as refusal:
            call()
        said[what] = refusal.value.reason
    with capsys.disabled():
        print("\nwhat a device tried".ljust(36), "refused as")
        for what, reason in said.items():
            print(f"  {what:<34} {reason}")
    assert device.do("unpin", mine) is None
    device.kill()


def test_a_grant_is_taken_back(daemon: Daemon, host: Session, clients: Clients) -> None:
    client = daemon.client(token=host.token)
    _, file = make_vm(client)
    host.convert_file(file, 0, NPAGES * PAGE, private=False)
    ticket = client.sessions.create_ticket(DEVICE, grants=[grant(file, 0, 8)])
    device = clients().open(daemon.socket_dir, ticket=ticket.hex())
    pin = device.do("pin", file, 2 * PAGE, PAGE)
    with pytest.raises(Busy, match="FOLIO_BUSY") as refused:
        client.sessions.revoke(file, 0, 4 * PAGE)
    assert refused.value.holders[0].name == f"session {device.session} pin {pin}"
    device.do("read_shared", file, 0, 1)
    device.do("unpin", pin)
    assert list(client.sessions.revoke(file, 0, 4 * PAGE).sessions) == [device.session]
    told = device.do("notice")
    assert (told["kind"], told["file"]) == ("revoked", file)
    assert (told["offset_bytes"], told["length_bytes"]) == (0, 4 * PAGE)
    with pytest.raises(ClientRefused, match="NOT_GRANTED"):
        device.do("read_shared", file, 3 * PAGE, 1)
    assert device.do("read_shared", file, 4 * PAGE, 1) == b"\0"
    device.kill()


def test_whoever_is_below_a_session_ends_with_it(
    daemon: Daemon, clients: Clients, host: Session
) -> None:
    vmm = clients().open(daemon.socket_dir)
    client = daemon.client(token=vmm.token)
    vm, file = make_vm(client)
    vmm.do("convert_file", file, 0, PAGE, private=False)
    below: list[ClientProcess] = [
        clients().open(daemon.socket_dir, ticket=ticket.hex())
        for ticket in (
            client.sessions.create_ticket(GUEST, vm=vm),
            client.sessions.create_ticket(DEVICE, grants=[grant(file, 0, 1)]),
        )
    ]
    below[1].do("pin", file, 0, PAGE)
    vmm.kill()
    for one in below:
        assert one.do("notice")["kind"] == "closed"
        with pytest.raises(ClientRefused, match="session has ended"):
            one.do("notice")
    left = daemon.client().sessions.list().sessions
    assert [one.session for one in left] == [host.number]
    assert not daemon.client().vms.list().vms


def test_a_session_closed_by_grpc_is_told(daemon: Daemon, clients: Clients) -> None:
    one = clients().open(daemon.socket_dir)
    daemon.client().sessions.close(one.session)
    assert one.do("notice")["kind"] == "closed"
    with pytest.raises(ClientRefused, match="session has ended"):
        one.do("unpin", 1)
    closed = eventually(
        lambda: [line for line in daemon.log_lines if line["event"] == "session_closed"]
    )
    assert [(line["session"], line["why"]) for line in closed] == [(one.session, "closed")]
