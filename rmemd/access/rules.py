"""Which call is for whom: one table, asked once for every call.

Owns the roles of each RPC and the objects that its request names. What belongs to another tenant
is refused as what does not exist, in the same words.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec import Struct

from rmemd.access.callers import Caller
from rmemd.engine.core import Core
from rmemd.errors import NO_SUCH_FILE, NO_SUCH_PIN, NO_SUCH_VM, ROLE_DENIED, SAFE_MODE
from rmemd.model.sessions import ADMIN, DEVICE, GUEST, HOST, Owner

Scope = Callable[[Core, Caller, Any], None]


class Rule(Struct, frozen=True):
    """Who may make a call, and what checks the objects that it names.

    Attributes:
        roles: whose callers may.
        scopes: each refuses what is not there for the caller.
        any_for_admins: whether nothing is checked of an admin's: that takes no lock.
    """

    roles: frozenset[str]
    scopes: tuple[Scope, ...] = ()
    any_for_admins: bool = False


def own_vm(core: Core, caller: Caller, request: Any) -> None:
    """The VM is the caller's tenant's; a guest's is its own."""
    require_vm(core, caller, request.vm)


def own_file(core: Core, caller: Caller, request: Any) -> None:
    """The file is the caller's tenant's; a device has something of it."""
    require_file(core, caller, request.file)


def own_pin(core: Core, caller: Caller, request: Any) -> None:
    """The pin is the caller's tenant's; a device's is its own."""
    owner = core.sessions.pin(request.pin).owner
    mine = caller.sees(owner) and (caller.role != DEVICE or owner.session == caller.session)
    if not mine:
        raise NO_SUCH_PIN(f"no pin {request.pin}", field="pin", for_log=_whose(owner))


def own_page(core: Core, caller: Caller, request: Any) -> None:
    """The page is named by an object of the caller's tenant; frames are the operator's."""
    which = request.page.WhichOneof("address")
    if which == "guest":
        require_vm(core, caller, request.page.guest.vm)
    elif which == "file_page":
        require_file(core, caller, request.page.file_page.file)
    else:
        raise ROLE_DENIED("frames by number are for the admin role", field="page")


def own_vm_if_named(core: Core, caller: Caller, request: Any) -> None:
    """The VM, where one is named, is the caller's tenant's."""
    if request.vm:
        require_vm(core, caller, request.vm)


def own_file_if_named(core: Core, caller: Caller, request: Any) -> None:
    """The file, where one is named, is the caller's tenant's."""
    if request.file:
        require_file(core, caller, request.file)


def require_vm(core: Core, caller: Caller, number: int) -> None:
    """Check that a VM is there for the caller.

    Raises:
        NotFound: NO_SUCH_VM.
    """
    owner = core.vms.get(number).info.owner
    if not caller.sees(owner) or (caller.role == GUEST and number != caller.vm):
        raise NO_SUCH_VM(f"vm/{number} does not exist", field="vm", for_log=_whose(owner))


def require_file(core: Core, caller: Caller, number: int) -> None:
    """Check that a file is there for the caller.

    Raises:
        NotFound: NO_SUCH_FILE.
    """
    owner = core.files.get(number).info.owner
    there = caller.sees(owner)
    if caller.role == DEVICE:
        granted = core.sessions.alive(caller.session).grants
        there = there and any(grant.file == number for grant in granted)
    if not there:
        raise NO_SUCH_FILE(f"file/{number} does not exist", field="file", for_log=_whose(owner))


def _whose(owner: Owner) -> str:
    return f"it is {owner.tenant}'s, or not granted"


def admit(core: Core, caller: Caller, name: str, request: Any) -> None:
    """Check that a caller may make a call with this request; takes the engine's lock if it must.

    Args:
        core: the engine's, for the owners of what is named.
        caller: who.
        name: the RPC as "Service/Method".
        request: its message.

    Raises:
        Denied: ROLE_DENIED.
        NotFound: as if the object did not exist.
        Unavailable: SAFE_MODE.
    """
    rule = RULES[name]
    if core.read_only and name not in SAFE:
        raise SAFE_MODE(f"{name} could change something: {core.read_only}")
    if caller.role not in rule.roles:
        raise ROLE_DENIED(
            f"{name} is not for the {caller.role} role", state=f"role {caller.role}",
            rule="one table says which call is for whom",
        )  # fmt: skip
    if rule.scopes and not (rule.any_for_admins and caller.role == ADMIN):
        # under the lock: beside it an object may be half destroyed, and be there again if undone
        core.read(partial(_look, rule, caller, request))


def _look(rule: Rule, caller: Caller, request: Any, core: Core) -> None:
    for scope in rule.scopes:
        scope(core, caller, request)


_ADMIN = frozenset((ADMIN,))
_HOST = frozenset((HOST, ADMIN))
_RUN = frozenset((HOST, GUEST, ADMIN))
_IO = frozenset((HOST, DEVICE, ADMIN))
_GUEST = frozenset((GUEST,))
_ALL = frozenset((HOST, GUEST, DEVICE, ADMIN))


def _rules(service: str, **methods: Rule) -> dict[str, Rule]:
    return {f"{service}/{method}": rule for method, rule in methods.items()}


RULES: dict[str, Rule] = {
    **_rules(
        "HostService",
        GetHost=Rule(_ALL), ExplainReason=Rule(_ALL),
        GetPage=Rule(_HOST, (own_page,), any_for_admins=True),
        GetAccounting=Rule(_HOST, (own_vm_if_named,)),
        GetPageMap=Rule(_ADMIN), ReadPhysical=Rule(_ADMIN), WritePhysical=Rule(_ADMIN),
        CopyPhysical=Rule(_ADMIN), Migrate=Rule(_ADMIN), Compact=Rule(_ADMIN),
        Offline=Rule(_ADMIN), Online=Rule(_ADMIN), Poison=Rule(_ADMIN),
        AddFaultRule=Rule(_ADMIN), ListFaultRules=Rule(_ADMIN), RemoveFaultRule=Rule(_ADMIN),
        GetWaitGraph=Rule(_ADMIN), CheckHost=Rule(_ADMIN), ListFaultPoints=Rule(_ADMIN),
        Upgrade=Rule(_ADMIN),
    ),
    **_rules(
        "FileService",
        CreateFile=Rule(_HOST, (own_vm,)), ListFiles=Rule(_HOST),
        GetFile=Rule(_IO, (own_file,)), CloseFile=Rule(_HOST, (own_file,)),
        Fallocate=Rule(_HOST, (own_file,)), ConvertFile=Rule(_HOST, (own_file,)),
        ReadShared=Rule(_IO, (own_file,)), WriteShared=Rule(_IO, (own_file,)),
        SetPolicy=Rule(_HOST, (own_file,)), GetPolicy=Rule(_HOST, (own_file,)),
        PinPages=Rule(_IO, (own_file,)), UnpinPages=Rule(_IO, (own_pin,)),
        ListPins=Rule(_IO, (own_file_if_named,)),
    ),
    **_rules(
        "VmService",
        CreateVm=Rule(_HOST), ListVms=Rule(_HOST),
        GetVm=Rule(_RUN, (own_vm,)), DestroyVm=Rule(_HOST, (own_vm,)),
        # whose file a slot names is checked there: another VM's is refused in any case
        SetMemoryRegion=Rule(_HOST, (own_vm,)), SetMemoryAttributes=Rule(_HOST, (own_vm,)),
        GetMemoryAttributes=Rule(_RUN, (own_vm,)), Populate=Rule(_HOST, (own_vm,)),
        Finalize=Rule(_HOST, (own_vm,)), PreFault=Rule(_RUN, (own_vm,)),
        SwapConsumer=Rule(_HOST, (own_vm,)),
    ),
    **_rules(
        "VcpuService",
        CreateVcpu=Rule(_HOST, (own_vm,)), SetProgramme=Rule(_RUN, (own_vm,)),
        RunVcpu=Rule(_RUN, (own_vm,)),
        # the one way by which a guest's plaintext leaves the daemon
        ReadGuest=Rule(_GUEST, (own_vm,)), WriteGuest=Rule(_GUEST, (own_vm,)),
    ),
    **_rules(
        "ConsumerService",
        ListConsumers=Rule(_ALL), GetOps=Rule(_RUN, (own_vm,)), LoadPlugins=Rule(_ADMIN),
        UnloadPlugin=Rule(_ADMIN), ReloadPlugin=Rule(_ADMIN),
    ),
    **_rules(
        "TraceService",
        StartTrace=Rule(_ADMIN), StopTrace=Rule(_ADMIN), GetTrace=Rule(_ADMIN),
        ExportTrace=Rule(_ADMIN),
    ),
    **_rules("WatchService", Watch=Rule(_RUN, (own_vm_if_named,))),
    **_rules(
        "SessionService",
        WhoAmI=Rule(_ALL), OpenSession=Rule(_ALL), RenewSession=Rule(_ALL),
        CloseSession=Rule(_ALL), ListSessions=Rule(_HOST), CreateTicket=Rule(_HOST),
        RevokeGrants=Rule(_HOST, (own_file,)),
    ),
    **_rules(
        "JobService",
        StartMigrate=Rule(_ADMIN), StartCompact=Rule(_ADMIN), StartOffline=Rule(_ADMIN),
    ),
    # the records of the session socket, which name one object each
    **_rules(
        "Session",
        GET=Rule(_HOST, (own_file,)), PUT=Rule(_HOST),
        PIN=Rule(_IO, (own_file,)), UNPIN=Rule(_IO, (own_pin,)),
        FAULT=Rule(_RUN, (own_vm,)), CONVERT=Rule(_HOST, (own_vm,)),
        CONVERT_FILE=Rule(_HOST, (own_file,)),
        READ_SHARED=Rule(_IO, (own_file,)), WRITE_SHARED=Rule(_IO, (own_file,)),
        READ_GUEST=Rule(_GUEST, (own_vm,)), WRITE_GUEST=Rule(_GUEST, (own_vm,)),
        FD=Rule(_IO, (own_file,)),
        CREATE=Rule(_HOST, (own_vm,)), CLOSE=Rule(_HOST, (own_file,)),
        # what a session has registered is its own; the engine looks
        USERFAULT_REGISTER=Rule(_HOST, (own_file,)), USERFAULT_UNREGISTER=Rule(_HOST),
        USERFAULT_COPY=Rule(_HOST, (own_file,)), USERFAULT_ZERO=Rule(_HOST, (own_file,)),
        USERFAULT_CONTINUE=Rule(_HOST, (own_file,)), USERFAULT_WAKE=Rule(_HOST, (own_file,)),
    ),
    # an operation is there for the tenant that started it; the service looks
    **_rules(
        "Operations",
        ListOperations=Rule(_HOST), GetOperation=Rule(_HOST), DeleteOperation=Rule(_HOST),
        CancelOperation=Rule(_HOST), WaitOperation=Rule(_HOST),
    ),
}  # fmt: skip


def _names(service: str, methods: str) -> set[str]:
    return {f"{service}/{method}" for method in methods.split()}


# What a daemon in safe mode answers: calls that change nothing, not even by a fault or a machine
# check, one that keeps a session from running out, and the one that leaves that mode.
SAFE: frozenset[str] = frozenset().union(
    _names("HostService", "GetHost ExplainReason GetPage GetPageMap GetAccounting ListFaultRules "
           "ListFaultPoints GetWaitGraph CheckHost Upgrade"),
    _names("FileService", "ListFiles GetFile GetPolicy ListPins"),
    _names("VmService", "ListVms GetVm GetMemoryAttributes"),
    _names("ConsumerService", "ListConsumers GetOps"),
    _names("WatchService", "Watch"),
    _names("SessionService", "WhoAmI ListSessions RenewSession"),
    _names("Operations", "ListOperations GetOperation WaitOperation"),
    _names("Session", "FD"),
)  # fmt: skip
