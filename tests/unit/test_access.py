"""Who may call what: one rule a method, each role decided; tokens, tickets and leases."""

from __future__ import annotations

import importlib
import pkgutil
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.descriptor import ServiceDescriptor
from helpers import Clock, MakeEngine

import rmem.v1
from rmem.v1 import host_pb2
from rmemd.access.callers import SOCKET, TCP, UNIX, Access, Caller, Ticket, policy_of
from rmemd.access.rules import RULES, admit
from rmemd.engine.engine import Engine
from rmemd.errors import RmemError
from rmemd.model.sessions import ADMIN, DEVICE, GUEST, HOST, ROLES, GrantRange, Owner
from rmemd.rpc.jobs import Jobs
from rmemd.rpc.server import make_services
from rmemd.session.wire import Op
from rmemd.units import PAGE_SIZE

MINE, THEIRS = "uid:1", "uid:2"


@pytest.fixture
def access(engine: Engine, clock: Clock) -> Access:
    return Access(engine, policy_of(False, 1, ["spiffe://a/admin"]), clock)


# --- the table -----------------------------------------------------------------------------------
def served(engine: Engine, access: Access) -> list[ServiceDescriptor]:
    """Return what a daemon serves, and every service of the API."""
    found = {
        descriptor.full_name: descriptor
        for descriptor, _ in make_services(engine, access, "0", lambda tenant: 0, Jobs(engine))
    }
    for module in pkgutil.iter_modules(rmem.v1.__path__):
        if module.name.endswith("_pb2"):
            loaded = importlib.import_module(f"rmem.v1.{module.name}")
            for service in loaded.DESCRIPTOR.services_by_name.values():
                found[service.full_name] = service
    return list(found.values())


def test_every_method_has_one_rule_and_every_rule_a_method(engine: Engine, access: Access) -> None:
    methods = {
        f"{service.name}/{method.name}"
        for service in served(engine, access)
        for method in service.methods
    }
    ops = {f"Session/{op.name}" for op in Op}
    assert set(RULES) == methods | ops
    for name, rule in RULES.items():
        assert rule.roles, f"{name} is for nobody"
        assert rule.roles <= set(ROLES), name
        # what is for hosts is for admins too, save plaintext, which is for guests alone
        assert HOST not in rule.roles or ADMIN in rule.roles, name


def test_a_role_that_is_not_in_a_rule_is_refused_before_anything_is_looked_at(
    engine: Engine,
) -> None:

    class Untouchable:
        def __getattr__(self, what: str) -> Any:
            raise LookupError(what)

    for name, rule in RULES.items():
        for role in set(ROLES) - rule.roles:
            with pytest.raises(RmemError, match="ROLE_DENIED"):
                admit(engine.core, Caller(MINE, role), name, Untouchable())


def test_plaintext_is_for_guests_alone() -> None:
    for name in ("VcpuService/ReadGuest", "VcpuService/WriteGuest", "Session/READ_GUEST",
                 "Session/WRITE_GUEST"):  # fmt: skip
        assert RULES[name].roles == {GUEST}


def test_the_socket_and_grpc_agree() -> None:
    """The same operation is for the same roles, whichever way it comes."""
    same = {
        "PIN": "FileService/PinPages", "UNPIN": "FileService/UnpinPages",
        "FAULT": "VmService/PreFault", "CONVERT": "VmService/SetMemoryAttributes",
        "CONVERT_FILE": "FileService/ConvertFile", "READ_SHARED": "FileService/ReadShared",
        "WRITE_SHARED": "FileService/WriteShared", "READ_GUEST": "VcpuService/ReadGuest",
        "WRITE_GUEST": "VcpuService/WriteGuest",
    }  # fmt: skip
    for op, rpc in same.items():
        assert RULES[f"Session/{op}"] == RULES[rpc], op


@pytest.mark.parametrize(
    ("name", "field"),
    [("VmService/GetVm", "vm"), ("FileService/GetFile", "file"), ("Session/UNPIN", "pin")],
)
def test_not_yours_is_refused_as_absent(engine: Engine, name: str, field: str) -> None:
    theirs = Owner(THEIRS, engine.open_session(THEIRS, HOST, "socket").session)
    vm = engine.create_vm("null", owner=theirs).info.vm
    file = engine.create_file(vm, 4 * PAGE_SIZE).info.file
    pin = engine.pin(file, 0, PAGE_SIZE, "DMA", "x", theirs)
    number = {"vm": vm, "file": file, "pin": pin}[field]
    said = []
    for named in (number, 98765):
        with pytest.raises(RmemError) as refused:
            admit(engine.core, Caller(MINE, HOST), name, SimpleNamespace(**{field: named}))
        said.append((str(refused.value).replace(str(named), "N"), refused.value.errno))
    assert said[0] == said[1]
    request = SimpleNamespace(**{field: number})
    admit(engine.core, Caller(THEIRS, HOST), name, request)
    admit(engine.core, Caller(MINE, ADMIN), name, request)


def test_a_page_is_named_by_an_object_of_ones_own_and_by_an_admin_in_any_way(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = Owner(THEIRS, engine.open_session(THEIRS, HOST, "socket").session)
    vm = engine.create_vm("null", owner=theirs).info.vm
    by_guest = host_pb2.PageAddress(guest=host_pb2.GuestPage(vm=vm, gfn=1))
    by_pfn = host_pb2.PageAddress(pfn=1)
    for address, reason in ((by_guest, "NO_SUCH_VM"), (by_pfn, "ROLE_DENIED")):
        request = host_pb2.GetPageRequest(page=address)
        with pytest.raises(RmemError, match=reason):
            admit(engine.core, Caller(MINE, HOST), "HostService/GetPage", request)
    admit(
        engine.core, Caller(THEIRS, HOST), "HostService/GetPage",
        host_pb2.GetPageRequest(page=by_guest),
    )  # fmt: skip
    # nothing is looked at, so nobody is waited for
    monkeypatch.setattr(engine.core, "read", lambda query: pytest.fail("the lock is taken"))
    for address in (by_guest, by_pfn):
        request = host_pb2.GetPageRequest(page=address)
        admit(engine.core, Caller(MINE, ADMIN), "HostService/GetPage", request)


def test_a_guest_has_its_vm_and_a_device_its_files_and_pins(engine: Engine) -> None:
    host = engine.open_session(MINE, HOST, "socket")
    vms = [engine.create_vm("null", owner=host.owner).info.vm for _ in range(2)]
    files = [engine.create_file(vm, 4 * PAGE_SIZE).info.file for vm in vms]
    guest = Caller(MINE, GUEST, vm=vms[0])
    admit(engine.core, guest, "VmService/GetVm", SimpleNamespace(vm=vms[0]))
    with pytest.raises(RmemError, match="NO_SUCH_VM"):
        admit(engine.core, guest, "VmService/GetVm", SimpleNamespace(vm=vms[1]))
    info = engine.open_session(MINE, DEVICE, "socket", grants=(GrantRange(files[0], 0, 1),))
    device = Caller(MINE, DEVICE, info.session)
    admit(engine.core, device, "Session/PIN", SimpleNamespace(file=files[0]))
    with pytest.raises(RmemError, match="NO_SUCH_FILE"):
        admit(engine.core, device, "Session/PIN", SimpleNamespace(file=files[1]))
    foreign = engine.pin(files[0], 0, PAGE_SIZE, "DMA", "x", host.owner)
    mine = engine.pin(files[0], 0, PAGE_SIZE, "DMA", "x", info.owner)
    admit(engine.core, device, "Session/UNPIN", SimpleNamespace(pin=mine))
    with pytest.raises(RmemError, match="NO_SUCH_PIN"):
        admit(engine.core, device, "Session/UNPIN", SimpleNamespace(pin=foreign))


# --- tokens and tickets --------------------------------------------------------------------------
def test_a_token_is_good_at_its_door_for_its_tenant(access: Access) -> None:
    info, token = access.open(MINE, HOST, SOCKET)
    assert access.caller(UNIX, "", token) == Caller(MINE, HOST, info.session, 0, UNIX)
    remote, far = access.open("spiffe://a/b", HOST, TCP)
    assert access.caller(TCP, "spiffe://a/b", far).session == remote.session
    for door, tenant, wrong in (
        (TCP, "spiffe://a/b", token), (UNIX, "", far), (TCP, "spiffe://a/c", far),
        (UNIX, "", token[:-1]), (UNIX, "", "x"),
    ):  # fmt: skip
        with pytest.raises(RmemError, match="TOKEN_UNKNOWN"):
            access.caller(door, tenant, wrong)
    access.close(info.session)
    with pytest.raises(RmemError, match="TOKEN_UNKNOWN"):
        access.caller(UNIX, "", token)


def test_a_token_takes_up_its_own_session(access: Access) -> None:
    (mine, token), (other, _) = (access.open(MINE, HOST, SOCKET) for _ in range(2))
    assert access.resume(mine.session, token) == mine
    for session, wrong in ((other.session, token), (mine.session, "x"), (99, token)):
        with pytest.raises(RmemError, match="TOKEN_UNKNOWN"):
            access.resume(session, wrong)


def test_without_a_token(access: Access) -> None:
    assert access.caller(UNIX, "") == Caller(MINE, ADMIN, door=UNIX)
    assert access.caller(TCP, "spiffe://a/b").role == HOST
    assert access.caller(TCP, "spiffe://a/admin").role == ADMIN
    access.policy = policy_of(True, 1, ())
    with pytest.raises(RmemError, match="TOKEN_REQUIRED"):
        access.caller(UNIX, "")


def test_who_may_be_admin(access: Access) -> None:
    for tenant in (MINE, "uid:0", "spiffe://a/admin"):
        assert access.open(tenant, ADMIN, SOCKET)[0].role == ADMIN
    with pytest.raises(RmemError, match="ROLE_DENIED"):
        access.open(THEIRS, ADMIN, SOCKET)
    for role in (GUEST, DEVICE):
        with pytest.raises(RmemError, match="BAD_REQUEST"):
            access.open(MINE, role, SOCKET)


def test_tickets(engine: Engine, access: Access) -> None:
    parent, _ = access.open(MINE, HOST, SOCKET)
    vm = engine.create_vm("null", owner=parent.owner).info.vm
    caller = Caller(MINE, HOST, parent.session)
    ticket = Ticket(MINE, GUEST, parent.session, vm, ())
    secret = access.issue(caller, ticket)
    info, _ = access.redeem(secret, SOCKET, pid=7)
    assert (info.role, info.vm, info.parent, info.pid) == (GUEST, vm, parent.session, 7)
    for bad in (secret, secret[:-1], b"", bytes(32)):
        with pytest.raises(RmemError, match="TOKEN_UNKNOWN"):
            access.redeem(bad, SOCKET)
    for wrong in (Ticket(MINE, HOST, 0, 0, ()), Ticket(THEIRS, GUEST, 0, vm, ())):
        with pytest.raises(RmemError, match="ROLE_DENIED"):
            access.issue(caller, wrong)
    left = access.issue(caller, ticket)
    access.close(parent.session)
    with pytest.raises(RmemError, match="TOKEN_UNKNOWN"):
        access.redeem(left, SOCKET)


def test_tickets_are_bounded(access: Access, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rmemd.access.callers.TICKETS_MAX", 2)
    admin = Caller(MINE, ADMIN)
    for tenant in (THEIRS, THEIRS, MINE):
        access.issue(admin, Ticket(tenant, HOST, 0, 0, ()))
    with pytest.raises(RmemError, match="TOO_MANY"):
        access.issue(admin, Ticket(THEIRS, HOST, 0, 0, ()))


def test_what_is_kept_of_a_secret_is_its_digest(access: Access) -> None:
    _, token = access.open(MINE, HOST, SOCKET)
    ticket = access.issue(Caller(MINE, ADMIN), Ticket(THEIRS, HOST, 0, 0, ()))
    kept = repr(access._engine.core.notes.all())
    assert token not in kept
    assert repr(ticket)[2:-1] not in kept


def test_a_lease_is_told_of(make_engine: MakeEngine, clock: Clock) -> None:
    access = Access(make_engine(), policy_of(False, 1, ()), clock)
    told: list[bool] = []
    access.on_lease = lambda: told.append(True)
    info, _ = access.open("spiffe://a/b", HOST, TCP)
    assert access.lease(info.session, 5.0) == 5.0
    assert told == [True]
    assert access.due(clock.now) == ([], 5.0)
    for bad in (-1.0, 1e9):
        with pytest.raises(RmemError, match="BAD_REQUEST"):
            access.lease(info.session, bad)
