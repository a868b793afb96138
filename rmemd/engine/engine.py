"""The engine's door: every operation as one method, drained to its end.

Owns nothing but the list. Each method says which progress it makes (ALL, PREFIX or EACH), raises
RmemError and nothing else of its own, and is safe to call from any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from rmemd.consumers.guard import Guard
from rmemd.consumers.registry import Found
from rmemd.engine import (
    attributes,
    compact,
    convert,
    faultpoints,
    guestio,
    hostmap,
    lifecycle,
    memory,
    onepage,
    physical,
    pins,
    plugins,
    populate,
    reopen,
    sessions,
    swap,
    userfaultops,
    vcpu,
)
from rmemd.engine.attributes import Ranges
from rmemd.engine.cancel import never
from rmemd.engine.compact import Compacted, Offlined
from rmemd.engine.convert import Converted
from rmemd.engine.core import Core, Options
from rmemd.engine.driver import Steps
from rmemd.engine.faultrules import Rule
from rmemd.engine.migrate import Report, migrate
from rmemd.engine.onepage import Page
from rmemd.engine.pendingfaults import Message
from rmemd.engine.physical import Poisoned
from rmemd.engine.plugins import Reloaded
from rmemd.engine.populate import PreFaulted
from rmemd.engine.programme import Instruction
from rmemd.engine.reopen import Recovered
from rmemd.engine.sessions import Closed
from rmemd.engine.swap import Swapped
from rmemd.engine.vcpu import Exited
from rmemd.errors import BAD_NODE
from rmemd.hooks.types import Agent
from rmemd.model.files import Policy, RestrictedFile
from rmemd.model.sessions import NOBODY, GrantRange, Owner, SessionInfo
from rmemd.model.vms import Vm
from rmemd.store.keeping import Keeping
from rmemd.units import I64, distinct

if TYPE_CHECKING:
    from rmemd.engine.invariants import Checked, Invariant

T = TypeVar("T")


class Engine:
    """A host with its VMs. ``core`` is there for queries and tests.

    Attributes:
        read: runs a query of the core under the lock; returns the revision it saw, and its result.
        last_check: what the last check of the invariants came to, whoever asked for it.
        checks: how many there were.
        recovered: what reopening the state of an earlier process found and did, None if it is new.
    """

    def __init__(self, options: Options, guard: Guard, keeping: Keeping | None = None) -> None:
        self.core = Core(options, guard, keeping or Keeping())
        self.read = self.core.read
        self.recovered: Recovered | None = None
        if self.core.read_back is not None:
            self.recovered = self.core.run(partial(reopen.settle, self.core, self.core.read_back))
            self.core.run(partial(sessions.finish_closing, self.core))
        self.last_check: Checked | None = None
        self.checks = 0

    @property
    def revision(self) -> int:
        """Return the revision of the last committed transaction."""
        return self.core.journal.revision

    @property
    def answered(self) -> int:
        """Return the revision at which what this thread asked last was carried out (I21).

        It is that of the reply to it. The present one, if the call asked nothing yet.
        """
        return self.core.answered.revision or self.revision

    def settle(self, act: Callable[[Core], T]) -> T:
        """Do something short under the lock, once for a call that is repeated. ALL."""
        return self.core.settle(lambda: act(self.core))

    def drain(self) -> None:
        """Have running vCPUs exit and watches end."""
        self.core.draining = True
        self.core.wake()

    def close(self) -> None:
        """Let go of every memfd."""
        self.core.close()

    # --- VMs ---------------------------------------------------------------------------------
    def create_vm(
        self,
        consumer: str,
        in_place: bool | None = None,
        config: Mapping[str, str] | None = None,
        memlock_pages: int = 0,
        name: str = "",
        starts_private: bool | None = None,
        owner: Owner = NOBODY,
    ) -> Vm:
        """Make a VM. ALL."""
        return self._once(
            lambda: lifecycle.create_vm(
                self.core,
                consumer,
                in_place,
                config or {},
                memlock_pages,
                name,
                starts_private,
                owner,
            )
        )

    def destroy_vm(self, vm: int) -> None:
        """Destroy a VM; its files live on. ALL."""
        self.core.run(lambda: lifecycle.destroy_vm(self.core, vm))

    def set_memory_region(
        self,
        vm: int,
        slot: int,
        flags: int,
        gpa: int,
        size: int,
        file: int = 0,
        offset: int = 0,
        userspace_addr: int = 0,
    ) -> None:
        """Add, change or (size 0) delete a memslot. ALL."""
        self.core.run(
            lambda: lifecycle.set_memory_region(
                self.core, vm, slot, flags, gpa, size, userspace_addr, file, offset
            )
        )

    def set_attributes(self, vm: int, ranges: Ranges, flags: int = 0) -> int:
        """Set attributes of ranges (gpa, size, attributes); return how many were so. ALL each.

        Thousands of them go as uint64 rows, shape (n, 3).
        """
        return self.core.run(lambda: attributes.set_attributes(self.core, vm, ranges, flags))

    def populate(
        self, vm: int, gpa: int, source: bytes, kind: int = 1, measure: bool = True
    ) -> int:
        """Take initial pages in; return how many. PREFIX."""
        return self.core.run(lambda: populate.populate(self.core, vm, gpa, source, kind, measure))

    def finalize(self, vm: int) -> bytes:
        """Close the measurement and return it. ALL."""
        return self.core.run(lambda: populate.finalize(self.core, vm))

    def pre_fault(
        self,
        vm: int,
        gpa: int,
        size: int,
        traced: bool = False,
        cancelled: Callable[[], bool] = never,
    ) -> PreFaulted:
        """Fault a guest range in. PREFIX."""
        return self.core.run(
            lambda: populate.pre_fault(self.core, vm, gpa, size, traced),
            cancelled=cancelled,
            repeatable=True,
        )

    # --- consumers ---------------------------------------------------------------------------
    def swap_consumer(
        self, vm: int, consumer: str = "", config: Mapping[str, str] | None = None
    ) -> Swapped:
        """Replace a VM's consumer while it runs; "" is its own, made anew. ALL."""
        return self._once(lambda: swap.swap_consumer(self.core, vm, consumer, config or {}))

    def load_plugins(self, names: Sequence[str] = ()) -> list[Found]:
        """Load plugins that were installed since the start; none named: all of them. EACH."""
        return self.core.run(lambda: plugins.load(self.core, names))

    def unload_plugin(self, name: str) -> list[str]:
        """Take out a plugin that no VM uses; return the consumers it offered. ALL."""
        return self.core.run(lambda: plugins.unload(self.core, name))

    def reload_plugin(self, name: str) -> Reloaded:
        """Load a plugin's code anew and swap every VM of it. ALL."""
        return self.core.run(lambda: plugins.reload(self.core, name))

    # --- vCPUs -------------------------------------------------------------------------------
    def create_vcpu(self, vm: int, index: int) -> None:
        """Make a vCPU. ALL."""
        self._once(lambda: lifecycle.create_vcpu(self.core, vm, index))

    def set_programme(
        self, vm: int, index: int, programme: tuple[Instruction, ...], lazy_accept: bool = False
    ) -> None:
        """Give a vCPU a programme. ALL."""
        self._once(lambda: vcpu.set_programme(self.core, vm, index, programme, lazy_accept))

    def run_vcpu(
        self,
        vm: int,
        index: int,
        answer: int = 0,
        max_instructions: int = 0,
        cancelled: Callable[[], bool] = never,
    ) -> Exited:
        """Run a vCPU until it exits. PREFIX: what was executed stays."""
        return self.core.run(
            lambda: vcpu.run(self.core, vm, index, answer, max_instructions, cancelled),
            who=f"vm/{vm} vcpu {index}",
            cancelled=cancelled,
        )

    def read_guest(
        self,
        vm: int,
        index: int,
        gpa: int,
        length: int,
        private: bool,
        cancelled: Callable[[], bool] = never,
    ) -> bytes:
        """Read up to 64 KiB of plaintext as the guest does; for the guest role only. ALL."""
        return self.core.run(
            lambda: guestio.read(self.core, vm, index, gpa, length, private), cancelled=cancelled
        )

    def write_guest(
        self,
        vm: int,
        index: int,
        gpa: int,
        data: bytes,
        private: bool,
        cancelled: Callable[[], bool] = never,
    ) -> None:
        """Write up to 64 KiB as the guest does; for the guest role only. PREFIX."""
        self.core.run(
            lambda: guestio.write(self.core, vm, index, gpa, data, private), cancelled=cancelled
        )

    # --- files -------------------------------------------------------------------------------
    def create_file(
        self, vm: int, size_bytes: int, flags: int = 0, session: int = 0, spare: int = 0
    ) -> RestrictedFile:
        """Make a restricted file, on a session's spare memory if there is such. ALL."""
        return self.core.run(
            lambda: memory.create(self.core, vm, size_bytes, flags, session, spare)
        )

    def close_file(self, file: int, session: int = 0) -> int:
        """Close a file, its memory being a session's to have again; the pages freed. ALL."""
        return self.core.run(lambda: memory.close_file(self.core, file, session))

    def fallocate(self, file: int, mode: int, offset: int, length: int) -> int:
        """Allocate (PREFIX) or punch (ALL); return the pages that changed."""
        return self.core.run(lambda: memory.fallocate(self.core, file, mode, offset, length))

    def convert_file(
        self, file: int, offset: int, size: int, attributes: int, flags: int = 0
    ) -> Converted:
        """Convert in place. ALL."""
        return self.core.run(
            lambda: convert.convert_file(self.core, file, offset, size, attributes, flags)
        )

    def read_shared(
        self,
        file: int,
        offset: int,
        length: int,
        session: int = 0,
        cancelled: Callable[[], bool] = never,
    ) -> bytes:
        """Read through the host's mapping. ALL."""
        return self.core.run(
            lambda: hostmap.read_shared(self.core, file, offset, length, session),
            cancelled=cancelled,
        )

    def write_shared(
        self,
        file: int,
        offset: int,
        data: bytes,
        session: int = 0,
        cancelled: Callable[[], bool] = never,
    ) -> None:
        """Write through the host's mapping. ALL."""
        self.core.run(
            lambda: hostmap.write_shared(self.core, file, offset, data, session),
            cancelled=cancelled,
        )

    def set_policy(
        self, file: int, offset: int, length: int, policy: int, nodes: tuple[int, ...]
    ) -> None:
        """Store a NUMA policy. ALL."""
        self._once(lambda: memory.set_policy(self.core, file, offset, length, policy, nodes))

    def get_policy(self, file: int, offset: int) -> Policy:
        """Read the NUMA policy at an offset."""
        return self.read(lambda core: memory.get_policy(core, file, offset))[1]

    def pin(
        self,
        file: int,
        offset: int,
        length: int,
        purpose: str,
        holder: str,
        owner: Owner = NOBODY,
        cancelled: Callable[[], bool] = never,
    ) -> int:
        """Pin pages as DMA does; return the handle. ALL."""
        return self.core.run(
            lambda: pins.pin(self.core, file, offset, length, purpose, holder, owner),
            cancelled=cancelled,
        )

    def unpin(self, handle: int) -> None:
        """Let a pin go. ALL."""
        self.core.run(lambda: pins.unpin(self.core, handle))

    def get_pages(self, file: int, offset: int, length: int, owner: Owner) -> I64:
        """Take a plain reference on each page; return the frames. ALL."""
        return self.core.run(lambda: pins.get_pages(self.core, file, offset, length, owner))

    def put_pages(self, pfns: I64, owner: Owner) -> int:
        """Drop references that get_pages took; return how many. ALL."""
        return self.core.run(lambda: pins.put_pages(self.core, pfns, owner))

    def shared_descriptor(self, file: int, session: int, read_only: bool) -> int:
        """Return a descriptor of a file's shared half, for its caller to pass on and close. ALL."""
        return self.read(lambda core: hostmap.shared_descriptor(core, file, session, read_only))[1]

    # --- page fault handlers -----------------------------------------------------------------
    def register_userfault(self, file: int, pgoff: int, npages: int, session: int = 0) -> int:
        """Have faults on holes of a range wait for a session; return the handle. ALL."""
        return self.core.run(lambda: userfaultops.register(self.core, file, pgoff, npages, session))

    def unregister_userfault(self, handle: int, session: int = 0) -> None:
        """Let a range go; what waits in it goes on. ALL."""
        self.core.run(lambda: userfaultops.unregister(self.core, handle, session))

    def on_userfault(self, notify: Callable[[int], None]) -> None:
        """Have ``notify`` told the session that has something to take; it must not block."""
        self.core.pending_faults.notify = notify

    def take_userfaults(self, session: int) -> list[Message]:
        """Return the faults and removals that a session was not told yet."""
        return self.read(lambda core: core.pending_faults.take(session))[1]

    def pending_userfaults(self, session: int | None = None) -> list[Message]:
        """Return the faults that wait for a session (for any, by default), told or not."""
        return self.read(lambda core: core.pending_faults.pending(session))[1]

    def userfault_copy(self, file: int, pgoff: int, data: bytes, session: int = 0) -> int:
        """Fill shared holes with bytes; return how many pages. PREFIX."""
        return self.core.run(lambda: userfaultops.copy(self.core, session, file, pgoff, data))

    def userfault_zeropage(self, file: int, pgoff: int, npages: int, session: int = 0) -> int:
        """Fill shared holes with zeros; return how many pages. PREFIX."""
        return self.core.run(lambda: userfaultops.zeropage(self.core, session, file, pgoff, npages))

    def userfault_continue(
        self, file: int, pgoff: int, npages: int, private: bool, session: int = 0
    ) -> int:
        """Have faults go on, on the pages they would have got; return how many pages. PREFIX."""
        return self.core.run(
            lambda: userfaultops.continue_(self.core, session, file, pgoff, npages, private)
        )

    def userfault_wake(self, file: int, pgoff: int, npages: int, session: int = 0) -> None:
        """Have what waits in a range told again. ALL."""
        self.core.run(lambda: userfaultops.wake(self.core, session, file, pgoff, npages))

    # --- sessions ----------------------------------------------------------------------------
    def open_session(
        self,
        tenant: str,
        role: str,
        door: str,
        pid: int = 0,
        parent: int = 0,
        vm: int = 0,
        grants: tuple[GrantRange, ...] = (),
        ticket: bytes = b"",
    ) -> SessionInfo:
        """Open a session, which uses up a ticket. ALL."""
        return self._once(
            lambda: sessions.open_session(
                self.core, tenant, role, door, pid, parent, vm, grants, ticket
            )
        )

    def close_session(
        self, session: int, check: Callable[[Core], None] = lambda core: None
    ) -> Closed:
        """End a session with everything it holds, unless ``check`` refuses. ALL."""
        return self.core.run(lambda: sessions.close_session(self.core, session, check))

    def revoke(self, tenant: str, file: int, pgoff: int, npages: int) -> list[SessionInfo]:
        """Take a granted range back; return the sessions that lost something. ALL."""
        return self.core.run(lambda: sessions.revoke(self.core, tenant, file, pgoff, npages))

    # --- the host ----------------------------------------------------------------------------
    def read_physical(self, pfn: int, npages: int, agent: Agent, bus: bool = False) -> bytes:
        """Read frames as the host would. ALL."""
        return self.core.run(lambda: physical.read(self.core, pfn, npages, agent, bus))

    def write_physical(self, pfn: int, data: bytes, agent: Agent, bus: bool = False) -> None:
        """Write frames as the host would. ALL."""
        self.core.run(lambda: physical.write(self.core, pfn, data, agent, bus))

    def copy_physical(
        self, src: int, dst: int, npages: int, agent: Agent, bus: bool = False
    ) -> None:
        """Copy raw bytes between frames. ALL."""
        self.core.run(lambda: physical.copy(self.core, src, dst, npages, agent, bus))

    def poison(self, pfn: int | Callable[[Core], int]) -> Poisoned:
        """Poison a frame, or the one that is found under the lock. ALL."""
        return self.core.run(
            lambda: physical.poison(self.core, pfn if isinstance(pfn, int) else pfn(self.core))
        )

    # of these three, ``report`` can be read while it grows, and can stop them between two steps;
    # ``who`` is their name in the wait graph
    def migrate(
        self, pfns: I64, node: int | None = None, report: Report | None = None, who: str = ""
    ) -> Report:
        """Move the pages on frames elsewhere. EACH."""
        nodes = self._nodes(node)
        told = Report() if report is None else report
        wanted = distinct(np.asarray(pfns, dtype=np.int64))
        return self.core.run(lambda: migrate(self.core, wanted, nodes, told), who, repeatable=True)

    def compact(self, node: int, report: Report | None = None, who: str = "") -> Compacted:
        """Compact a node. EACH."""
        told = Report() if report is None else report
        return self.core.run(lambda: compact.compact(self.core, node, told), who, repeatable=True)

    def offline(
        self, pfn: int, npages: int, report: Report | None = None, who: str = ""
    ) -> Offlined:
        """Empty frames and take them out of use. EACH."""
        told = Report() if report is None else report
        return self.core.run(
            lambda: compact.offline(self.core, pfn, npages, told), who, repeatable=True
        )

    def online(self, pfn: int, npages: int) -> int:
        """Give offlined frames back. ALL."""
        return self.core.run(lambda: compact.online(self.core, pfn, npages))

    def page(self, pfn: int) -> tuple[int, Page]:
        """Return the revision and one page's whole story."""
        return self.read(lambda core: onepage.page(core, pfn))

    def check(self) -> Checked:
        """Check every invariant over the state as it is now; remembered as ``last_check``."""
        # these modules, of which most daemons make no use, are not read before they serve
        from rmemd.engine import invariants

        def look(core: Core) -> Checked:
            self.last_check = invariants.timed(core)
            self.checks += 1
            return self.last_check

        return self.read(look)[1]

    def watch(self, transactions: int | None = None) -> None:
        """Have the next transactions (None: all) watched for what no state shows."""
        from rmemd.engine.monitors import Monitors

        def begin(core: Core) -> None:
            (core.watched or Monitors(core)).begin(transactions)

        self.read(begin)

    def listed(self, done: Checked) -> list[Invariant]:
        """Return every invariant there is, and how it stood at a check."""
        from rmemd.engine import invariants

        return invariants.listed(self.core, done)

    def add_fault_rule(
        self,
        vm: int,
        point: str,
        error: str,
        nth: int = 1,
        times: int = 1,
        probability: float = 1.0,
        delay_ms: int = 0,
    ) -> Rule:
        """Make a point go wrong, or a step take its time; fields as in ``Rule``. ALL."""
        rule = Rule(0, vm, point, error, nth, times, probability, delay_ms)

        def add(core: Core) -> Rule:
            if vm:
                core.vms.get(vm)
            faultpoints.require_possible(rule)
            return core.rules.add(rule)

        return self.read(add)[1]

    def remove_fault_rule(self, rule: int) -> None:
        """Remove a fault rule. ALL."""
        self.read(lambda core: core.rules.remove(rule))

    def _once(self, operation: Callable[[], Steps[T]]) -> T:
        """Run an operation of a single transaction, again while others are in its way."""
        return self.core.run(lambda: self.core.unit(operation), named_by=operation)

    def _nodes(self, node: int | None) -> tuple[int, ...]:
        every = tuple(n.node for n in self.core.host.nodes)
        if node is None:
            return every
        if node not in every:
            raise BAD_NODE(f"no node {node}", field="node")
        return (node,)
