"""Every refusal rmemd can utter: the catalogue of reasons, and by the same door their exceptions.

Owns the catalogue. A reason is raised by calling it::

    raise FOLIO_BUSY("gfn 0x42 is referenced", page="gfn 0x42", holders=(Holder(...),))

Imports nothing of ours; ``rpc.status`` maps the tree (``errors.tree``) once to google.rpc.Status.
Plugins declare their own reasons with the same class, so that ``rmemctl explain`` knows them too.
"""

from __future__ import annotations

import errno as errno_names

from rmemd.errors.tree import NUMBERS
from rmemd.errors.tree import REASONS as REASONS
from rmemd.errors.tree import Aborted as Aborted
from rmemd.errors.tree import AlreadyExists as AlreadyExists
from rmemd.errors.tree import Busy as Busy
from rmemd.errors.tree import Cancelled as Cancelled
from rmemd.errors.tree import Denied as Denied
from rmemd.errors.tree import Details as Details
from rmemd.errors.tree import Exhausted as Exhausted
from rmemd.errors.tree import Holder as Holder
from rmemd.errors.tree import InvalidArgument as InvalidArgument
from rmemd.errors.tree import Kind as Kind
from rmemd.errors.tree import NotFound as NotFound
from rmemd.errors.tree import OutOfRange as OutOfRange
from rmemd.errors.tree import PluginFault as PluginFault
from rmemd.errors.tree import Poisoned as Poisoned
from rmemd.errors.tree import Reason as Reason
from rmemd.errors.tree import Refused as Refused
from rmemd.errors.tree import RmemError as RmemError
from rmemd.errors.tree import Unauthenticated as Unauthenticated
from rmemd.errors.tree import Unavailable as Unavailable
from rmemd.errors.tree import Unsupported as Unsupported
from rmemd.errors.tree import errno_name as errno_name


def _reason(name: str, kind: Kind, errno: str, cause: str, remedy: str, source: str = "") -> Reason:
    number = (NUMBERS.get(errno) or getattr(errno_names, errno)) if errno else 0
    return Reason(name, kind, number, cause, remedy, source)


GMEM = "Linux virt/kvm/guest_memfd.c; restrictedmem.md §2"
KVM = "Linux virt/kvm/kvm_main.c; restrictedmem.md §2"

# fmt: off
# --- the request is wrong --------------------------------------------------------------------
BAD_REQUEST = _reason("BAD_REQUEST", Kind.INVALID, "EINVAL",
    "A field is missing, malformed or out of its range.",
    "Correct the field that is named.")
REQUEST_ID_REUSED = _reason("REQUEST_ID_REUSED", Kind.INVALID, "",
    "The id of this request was that of another one, with other contents.",
    "Give every call an id of its own, and send it unchanged when the same call is repeated.",
    "AIP-155")
UNKNOWN_FLAG = _reason("UNKNOWN_FLAG", Kind.INVALID, "EINVAL",
    "A flag bit is set that does not exist.",
    "Clear the unknown bits.",
    GMEM)
POINT_NOT_A_STEP = _reason("POINT_NOT_A_STEP", Kind.INVALID, "EINVAL",
    "A fault rule is to delay a point at which the lock is held.",
    "Delay one of the steps that are listed with the points; make this point fail instead.")
NOT_PAGE_ALIGNED = _reason("NOT_PAGE_ALIGNED", Kind.INVALID, "EINVAL",
    "An offset, address or length is not a multiple of 4096 bytes.",
    "Align it to the page size.",
    GMEM)
BAD_RANGE = _reason("BAD_RANGE", Kind.INVALID, "EINVAL",
    "A range is empty, wraps around or leaves its file, slot or address space.",
    "Give a range inside the object.",
    GMEM)
OFFSET_TOO_BIG = _reason("OFFSET_TOO_BIG", Kind.INVALID, "EFBIG",
    "offset + length passes 2^63-1, which the VFS refuses before the file sees it.",
    "Give a range below 2^63.",
    GMEM)
FALLOCATE_MODE = _reason("FALLOCATE_MODE", Kind.INVALID, "EOPNOTSUPP",
    "fallocate() takes KEEP_SIZE, alone or with PUNCH_HOLE, and nothing else.",
    "Set KEEP_SIZE.",
    GMEM)
# --- handles and names -----------------------------------------------------------------------
NO_SUCH_VM = _reason("NO_SUCH_VM", Kind.NOT_FOUND, "ENOENT",
    "No VM has this handle (handles are never used again).",
    "List the VMs.")
NO_SUCH_FILE = _reason("NO_SUCH_FILE", Kind.NOT_FOUND, "EBADF",
    "No restricted file has this handle (handles are never used again).",
    "List the files.")
NO_SUCH_VCPU = _reason("NO_SUCH_VCPU", Kind.NOT_FOUND, "ENOENT",
    "The VM has no vCPU with this index.",
    "Create the vCPU first.")
NO_SUCH_SLOT = _reason("NO_SUCH_SLOT", Kind.INVALID, "EINVAL",
    "The memslot that is to be deleted does not exist.",
    "List the VM's slots.",
    KVM)
NO_SUCH_CONSUMER = _reason("NO_SUCH_CONSUMER", Kind.NOT_FOUND, "ENOENT",
    "No plugin that was loaded offers this consumer and variant.",
    "See the list of consumers; a quarantined plugin is listed with its error.")
NO_SUCH_RULE = _reason("NO_SUCH_RULE", Kind.NOT_FOUND, "ENOENT",
    "No fault rule has this handle.",
    "List the fault rules.")
NO_SUCH_PIN = _reason("NO_SUCH_PIN", Kind.NOT_FOUND, "ENOENT",
    "No pin has this handle.",
    "Read the holders of the page.")
NO_SUCH_SESSION = _reason("NO_SUCH_SESSION", Kind.NOT_FOUND, "ENOENT",
    "No session has this handle, or it has ended.",
    "List the sessions.")
NOT_HELD = _reason("NOT_HELD", Kind.REFUSED, "EINVAL",
    "A reference is dropped that the session does not have.",
    "Drop what get returned, once.")
NO_SUCH_OPERATION = _reason("NO_SUCH_OPERATION", Kind.NOT_FOUND, "ENOENT",
    "No long job has this name, or its result was deleted or is no longer kept.",
    "List the operations.")
NO_TRACE = _reason("NO_TRACE", Kind.NOT_FOUND, "ENOENT",
    "Nothing was recorded since the daemon began.",
    "Start a recording.")
NO_SUCH_USERFAULT = _reason("NO_SUCH_USERFAULT", Kind.NOT_FOUND, "ENOENT",
    "No range is registered under this handle, or the pages are in no range of the session's.",
    "Register the range first; only the session that registered it resolves its faults.",
    "Linux mm/userfaultfd.c; ioctl_userfaultfd(2)")
NO_SUCH_REASON = _reason("NO_SUCH_REASON", Kind.NOT_FOUND, "ENOENT",
    "The catalogue has no such reason.",
    "List the reasons.")
EXISTS = _reason("EXISTS", Kind.EXISTS, "EEXIST",
    "An object with this index exists already.",
    "Choose another index, or delete it first.")
TRACE_RUNNING = _reason("TRACE_RUNNING", Kind.EXISTS, "EBUSY",
    "A recording is going on, and there is one at a time.",
    "Stop it, and export it if it is wanted; or wait until it is full.")
# --- who calls -------------------------------------------------------------------------------
TOKEN_REQUIRED = _reason("TOKEN_REQUIRED", Kind.UNKNOWN_CALLER, "EACCES",
    "The daemon is shared, and the call carries no token that says whose it is.",
    "Open a session on the session socket, and send its token as metadata rmem-token.")
TOKEN_UNKNOWN = _reason("TOKEN_UNKNOWN", Kind.UNKNOWN_CALLER, "EACCES",
    "The token or ticket was never given out, was used up, belongs to another door, or its "
    "session has ended.",
    "Open a new session; a ticket is good for one redemption.")
ROLE_DENIED = _reason("ROLE_DENIED", Kind.DENIED, "EACCES",
    "The session's role does not allow this call.",
    "Call from a session of a role that does.")
NOT_GRANTED = _reason("NOT_GRANTED", Kind.DENIED, "EACCES",
    "The device session was not granted the whole range, or only for reading.",
    "Have the VMM grant the range.")
# --- the daemon's life -----------------------------------------------------------------------
SAFE_MODE = _reason("SAFE_MODE", Kind.UNAVAILABLE, "EROFS",
    "The daemon died again and again right after its start; all memory is kept, and nothing "
    "changes.",
    "Read what its log says of the deaths, mend that, then `rmemctl host upgrade`.")
HANDING_OVER = _reason("HANDING_OVER", Kind.UNAVAILABLE, "EINTR",
    "The daemon makes way for its successor, and the call stopped between two steps.",
    "Make the call again, under the same request id; the client library does.")
NO_KEEPER = _reason("NO_KEEPER", Kind.REFUSED, "EBUSY",
    "Nobody keeps the daemon's memory, so a successor would find none.",
    "Start the daemon with a keeper, or under a service manager with a descriptor store.")
MEMORY_LOST = _reason("MEMORY_LOST", Kind.POISON, "EIO",
    "The daemon that had it, and its keeper, are gone with all guest memory.",
    "Make the guests anew: what they held is nowhere.")
# --- memslots and bindings -------------------------------------------------------------------
SLOT_INVALID = _reason("SLOT_INVALID", Kind.INVALID, "EINVAL",
    "The slot number, flags, size, address or offset is not valid for a memslot.",
    "Correct the field that is named.",
    KVM)
SLOT_OVERLAP = _reason("SLOT_OVERLAP", Kind.EXISTS, "EEXIST",
    "The guest range overlaps another slot of the VM.",
    "Delete or move the other slot.",
    KVM)
SLOT_IMMUTABLE = _reason("SLOT_IMMUTABLE", Kind.INVALID, "EINVAL",
    "A slot bound to a restricted file cannot be moved, re-set or change its flags.",
    "Delete the slot and add it again.",
    KVM)
BINDING_OVERLAP = _reason("BINDING_OVERLAP", Kind.EXISTS, "EEXIST",
    "Part of the file's range is bound already (Linux up to 7.1 says EINVAL).",
    "Bind another range, or delete the slot that has it.",
    GMEM)
BINDING_FOREIGN = _reason("BINDING_FOREIGN", Kind.INVALID, "EINVAL",
    "The file belongs to another VM, or is not a restricted file.",
    "Create the file for this VM.",
    GMEM)
FILE_GONE = _reason("FILE_GONE", Kind.REFUSED, "EFAULT",
    "The slot's restricted file was closed.",
    "Delete the slot and bind another file.",
    GMEM)
# --- page fault handlers ---------------------------------------------------------------------
USERFAULT_TAKEN = _reason("USERFAULT_TAKEN", Kind.EXISTS, "EBUSY",
    "Part of the range has a page fault handler already.",
    "Register another range, or have the handler that is named unregister.",
    "Linux fs/userfaultfd.c, userfaultfd_register; ioctl_userfaultfd(2)")
PAGE_PRESENT = _reason("PAGE_PRESENT", Kind.EXISTS, "EEXIST",
    "A page is there already, so it is not filled again.",
    "Go on after it: nobody waits for a page that is there.",
    "Linux mm/userfaultfd.c; UFFDIO_COPY(2const)")
PRIVATE_CONTENT = _reason("PRIVATE_CONTENT", Kind.REFUSED, "EINVAL",
    "The host cannot say what a private page holds: its bytes are the guest's.",
    "Continue the fault, which gives the guest an empty page, or convert the page to shared.")
INTERRUPTED = _reason("INTERRUPTED", Kind.UNAVAILABLE, "EINTR",
    "The caller went away, the VM's session ends or the daemon stops, while a fault waited for "
    "its handler.",
    "Make the call again; the fault is told again if its page is still missing.",
    "Linux fs/userfaultfd.c, handle_userfault; KVM_EXIT_INTR")
# --- attributes, conversion, population ------------------------------------------------------
ATTRIBUTES_UNSUPPORTED = _reason("ATTRIBUTES_UNSUPPORTED", Kind.INVALID, "EINVAL",
    "The VM has no private memory, or an attribute other than PRIVATE was named.",
    "Use a VM type with private memory and only the PRIVATE attribute.",
    KVM)
WRONG_PERSONALITY = _reason("WRONG_PERSONALITY", Kind.UNSUPPORTED, "ENOTTY",
    "The VM converts through the other interface; the two are exclusive.",
    "VM attributes for `attributes`, the file's attributes for `in-place`.",
    GMEM)
OP_NOT_IMPLEMENTED_BY_CONSUMER = _reason(
    "OP_NOT_IMPLEMENTED_BY_CONSUMER", Kind.UNSUPPORTED, "EOPNOTSUPP",
    "The consumer has a NULL op there.",
    "Read the consumer's ops table; choose a variant that implements the op.")
FOLIO_UNMOVABLE = _reason("FOLIO_UNMOVABLE", Kind.UNSUPPORTED, "EOPNOTSUPP",
    "The consumer's migrate_folio is NULL: the store must not move its private folios, and "
    "the consumer is not asked.",
    "Choose a variant that implements migrate_folio.",
    "Sean Christopherson, 22 Dec 2022; restrictedmem.md §1")
FOLIO_BUSY = _reason("FOLIO_BUSY", Kind.BUSY, "EAGAIN",
    "Somebody holds a reference beyond the expected ones.",
    "Have the holders that are named let go, then try again.",
    "restrictedmem.md §2")
RANGE_IN_PROGRESS = _reason("RANGE_IN_PROGRESS", Kind.BUSY, "EAGAIN",
    "Another operation is in progress on the range.",
    "Try again.",
    KVM)
NOT_PRIVATE = _reason("NOT_PRIVATE", Kind.INVALID, "EINVAL",
    "The range is not wholly private.",
    "Convert it first.",
    GMEM)
NOT_PAUSED = _reason("NOT_PAUSED", Kind.REFUSED, "EINVAL",
    "The VM was finalized, and its initial image can no longer change.",
    "Populate before finalize.",
    "tdx.md §4, snp.md §4")
NOT_FINALIZED = _reason("NOT_FINALIZED", Kind.REFUSED, "EINVAL",
    "The VM has not been finalized, so its vCPUs cannot run.",
    "Finalize it first.",
    "tdx.md §4, snp.md §4")
PRE_FAULT_TOO_EARLY = _reason("PRE_FAULT_TOO_EARLY", Kind.REFUSED, "EOPNOTSUPP",
    "Memory of a VM that is to be measured cannot be faulted in before it is finalized.",
    "Finalize the VM first.",
    "Linux kvm_arch_vcpu_pre_fault_memory: pre_fault_allowed")
# --- faults ----------------------------------------------------------------------------------
NO_MEMSLOT = _reason("NO_MEMSLOT", Kind.NOT_FOUND, "ENOENT",
    "No memslot covers the page.",
    "Add a slot over it.",
    "restrictedmem.md §3, pre_fault_memory")
MEMORY_FAULT = _reason("MEMORY_FAULT", Kind.REFUSED, "EFAULT",
    "The access does not match the page's attribute, or the slot has no restricted file.",
    "Convert the range, or bind a file; then run the vCPU again.",
    KVM)
READONLY_SLOT = _reason("READONLY_SLOT", Kind.REFUSED, "EFAULT",
    "The guest writes to a read-only slot, which makes a vCPU exit as for MMIO.",
    "Handle the write as a device would.",
    "Linux Documentation/virt/kvm/api.rst, KVM_MEM_READONLY")
GUEST_EXCEPTION = _reason("GUEST_EXCEPTION", Kind.REFUSED, "EFAULT",
    "The access gave the guest an exception that it has no handler for.",
    "Accept or validate the page first, or give the vCPU a programme that accepts lazily.",
    "tdx.md §2, snp.md §2")
HOST_SIGBUS = _reason("HOST_SIGBUS", Kind.REFUSED, "EFAULT",
    "The host touched, through its mapping, a page that is private or past the file: SIGBUS.",
    "Convert the page to shared first.",
    GMEM)
NOT_MAPPABLE = _reason("NOT_MAPPABLE", Kind.UNSUPPORTED, "ENODEV",
    "The file was created without the MMAP flag, so the host has no mapping of it.",
    "Create the file with MMAP, or use the VM's shared half.",
    GMEM)
HW_POISON = _reason("HW_POISON", Kind.POISON, "EHWPOISON",
    "The frame is poisoned, and poison is sticky.",
    "Punch the page and fault it again.",
    GMEM)
HOST_ACCESS_FAULT = _reason("HOST_ACCESS_FAULT", Kind.REFUSED, "EFAULT",
    "The CPU's own check stopped the host's access to a private frame.",
    "Private frames are the guest's; ask the guest to share the page.",
    "snp.md §2, tdx.md §6, pkvm.md §3")
VM_DEAD = _reason("VM_DEAD", Kind.REFUSED, "EIO",
    "The VM was killed by a fatal fault and can only be destroyed.",
    "Destroy the VM.",
    KVM)
VM_FROZEN = _reason("VM_FROZEN", Kind.REFUSED, "EIO",
    "A hook of the VM's consumer overran its deadline, and the VM was frozen.",
    "See the daemon's log for the hook; destroy the VM.")
VCPU_BUSY = _reason("VCPU_BUSY", Kind.BUSY, "EBUSY",
    "The vCPU is running in another call.",
    "Wait for that call to return.")
VM_IN_USE = _reason("VM_IN_USE", Kind.BUSY, "EBUSY",
    "A vCPU of the VM is running.",
    "Wait for its call to return.")
# --- resources -------------------------------------------------------------------------------
NO_FRAMES = _reason("NO_FRAMES", Kind.EXHAUSTED, "ENOMEM",
    "The host, or the node asked for, has too few free frames.",
    "Punch or close something, or start the daemon with more --host-memory.")
NO_SLOT_NUMBERS = _reason("NO_SLOT_NUMBERS", Kind.INVALID, "EINVAL",
    "The slot number is not below the limit.",
    "Use a slot number below the limit.",
    KVM)
NO_KEY_SLOTS = _reason("NO_KEY_SLOTS", Kind.EXHAUSTED, "ENOSPC",
    "The platform has no free HKID or ASID.",
    "Destroy a VM of this vendor.")
QUOTA = _reason("QUOTA", Kind.EXHAUSTED, "EDQUOT",
    "The tenant would pass one of its limits; nothing was allocated.",
    "Give something back, or have the operator raise the limit.")
TOO_MANY = _reason("TOO_MANY", Kind.EXHAUSTED, "ENOSPC",
    "A limit of the daemon is reached.",
    "Let go of some, or ask for fewer at a time.")
MESSAGE_TOO_BIG = _reason("MESSAGE_TOO_BIG", Kind.EXHAUSTED, "EMSGSIZE",
    "The message or the byte range is larger than one call may carry.",
    "Split it; bulk calls take at most 1 MiB.")
SYSTEM_MEMORY = _reason("SYSTEM_MEMORY", Kind.EXHAUSTED, "ENOMEM",
    "The system under the daemon has no memory left for the bytes; nothing was changed.",
    "Free memory on the machine, or give the daemon a smaller --host-memory.")
# --- plugins ---------------------------------------------------------------------------------
PLUGIN_RAISED = _reason("PLUGIN_RAISED", Kind.PLUGIN, "EIO",
    "A hook raised an exception; its transaction was undone.",
    "See the daemon's log under the correlation id; fix or unload the plugin.")
PLUGIN_NONSENSE = _reason("PLUGIN_NONSENSE", Kind.PLUGIN, "EIO",
    "A hook gave an answer outside its contract; its transaction was undone.",
    "Fix the plugin: the hook reference lists the legal answers.")
PLUGIN_INVALID = _reason("PLUGIN_INVALID", Kind.PLUGIN, "",
    "A plugin could not be registered, and is quarantined.",
    "Correct the hook that is named; the hook reference gives the signature.")
SWAP_UNSAFE = _reason("SWAP_UNSAFE", Kind.REFUSED, "EBUSY",
    "Live state of the VM relies on an op, or on a setting, that the new consumer does not have.",
    "Bring the state that is named to an end, or choose a consumer that has the op.",
    "rmemd; EBUSY as the kernel says of what is in use and could be free later")
SWAP_SCHEMA = _reason("SWAP_SCHEMA", Kind.REFUSED, "ENOEXEC",
    "The state is of another kind or version than the new code takes.",
    "Swap between code of equal state schema; make a new VM for the other.",
    "rmemd; ENOEXEC as Linux says of a module that was built for another kernel")
SWAP_FOREIGN = _reason("SWAP_FOREIGN", Kind.INVALID, "EINVAL",
    "The consumer belongs to another platform, or makes another kind of VM.",
    "Choose a variant of the VM's own platform that has what the VM was made with.")
SWAP_STATE_LEFT = _reason("SWAP_STATE_LEFT", Kind.PLUGIN, "EIO",
    "After the swap the new consumer's tables did not hold what the old one's held; it was undone.",
    "Have export_state and import_state carry every table of the consumer.")
NO_SUCH_PLUGIN = _reason("NO_SUCH_PLUGIN", Kind.NOT_FOUND, "ENOENT",
    "No plugin of this name is loaded, or installed.",
    "List the plugins; install the package in the daemon's environment first.")
PLUGIN_LOADED = _reason("PLUGIN_LOADED", Kind.EXISTS, "EEXIST",
    "A plugin of this name is loaded already.",
    "Reload it to have its code anew.",
    "Linux kernel/module: init_module")
PLUGIN_IN_USE = _reason("PLUGIN_IN_USE", Kind.REFUSED, "EBUSY",
    "VMs use the plugin's consumers, so it cannot be unloaded.",
    "Destroy the VMs that are named.",
    "Linux kernel/module: delete_module")
INTERNAL = _reason("INTERNAL", Kind.PLUGIN, "EIO",
    "The daemon failed in a way it has no name for; the transaction was undone.",
    "Report it with the correlation id.")
JOB_CANCELLED = _reason("JOB_CANCELLED", Kind.CANCELLED, "ECANCELED",
    "A long job was cancelled, or the daemon ended; what it did before is in the status's details.",
    "Start it again: what is done already is not done twice.",
    "AIP-151")
DAEMON_RESTARTED = _reason("DAEMON_RESTARTED", Kind.ABORTED, "ECANCELED",
    "The daemon ended while the long job ran, and was started again; what the job had done stands.",
    "Start it again: what is done already is not done twice.")
REVISION_COMPACTED = _reason("REVISION_COMPACTED", Kind.RANGE, "",
    "The events after this revision are no longer kept.",
    "List the objects again and watch from the revision of that reply.")
# --- host maintenance ------------------------------------------------------------------------
FRAME_IN_USE = _reason("FRAME_IN_USE", Kind.BUSY, "EBUSY",
    "The frame has an owner, so it cannot be used as a destination.",
    "Choose a free frame.")
FRAME_NOT_OWNED = _reason("FRAME_NOT_OWNED", Kind.REFUSED, "ENOENT",
    "The frame has no owner, so there is nothing to move.",
    "Read the page map.")
BAD_NODE = _reason("BAD_NODE", Kind.INVALID, "EINVAL",
    "The host has no such NUMA node.",
    "Read the host's nodes.")
MEMLOCK = _reason("MEMLOCK", Kind.EXHAUSTED, "ENOMEM",
    "The pin would exceed the VM's RLIMIT_MEMLOCK.",
    "Raise the VM's memlock limit.",
    "pkvm.md §2")
# fmt: on
