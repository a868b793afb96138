"""Random registrations, faults, resolutions, punches, conversions and deaths, step by step.

Operations that wait are held as generators and go on one at a time, in an order that is drawn.
After each step the invariants hold, and every page that is waited for has been told to its handler
exactly once since it was last a hole that somebody waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guests import make_engine
from helpers import Guest, make_guest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rmemd.engine import hostmap, pins, populate, userfaultops, vcpu
from rmemd.engine.cancel import never
from rmemd.engine.driver import Step, Steps
from rmemd.engine.invariants import check
from rmemd.engine.pendingfaults import FAULT
from rmemd.engine.programme import Instruction, Opcode, Pattern
from rmemd.errors import PluginFault, RmemError
from rmemd.model.files import FLAG_INIT_SHARED, FLAG_MMAP
from rmemd.units import PAGE_SIZE

PAGES = 12
VCPUS = 3
WAITING_MAX = 6
HOW = ("copy", "zero", "go", "go", "wake")

ranges = st.tuples(st.integers(0, PAGES - 1), st.integers(1, 5)).map(
    lambda r: (r[0], min(r[1], PAGES - r[0]))
)


class Waiting:
    """An operation that stands at a step, and is driven by hand."""

    def __init__(self, steps: Steps[Any]) -> None:
        self.steps = steps
        self.at: Step | None = None
        self.over = False


class UserfaultMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine(1024)
        self.core = self.engine.core
        self.waiting: list[Waiting] = []
        self.told: set[tuple[int, bool, int]] = set()

    @initialize(kind=st.sampled_from(["attributes", "in-place", "tdx-today", "gup"]))
    def begin(self, kind: str) -> None:
        self.restricted = kind != "gup"
        if kind == "in-place":
            flags = FLAG_MMAP | FLAG_INIT_SHARED
            self.guest = make_guest(self.engine, "sw-protected", PAGES, flags=flags, in_place=True)
        elif kind == "gup":
            self.guest = make_guest(
                self.engine, "gup", PAGES, restricted=False, starts_private=False
            )
        else:
            name = "sw-protected" if kind == "attributes" else kind
            self.guest = make_guest(self.engine, name, PAGES, in_place=False)
        for index in range(1, VCPUS):
            self.engine.create_vcpu(self.guest.vm, index)
        self.sessions = [self._session() for _ in range(2)]
        if kind != "gup":
            self._convert(PAGES // 2, PAGES // 2, private=kind == "in-place")

    def teardown(self) -> None:
        """Whatever happened, what waits comes to an end when the daemon drains."""
        self.core.draining = True
        for one in list(self.waiting):
            self._advance(one)
            assert one.over
        assert self.core.pending_faults.waiting == []
        assert self.core.running == set()
        assert check(self.core) == []
        self.engine.close()

    # --- handlers ------------------------------------------------------------------------------
    @rule(who=st.integers(0, 1), at=ranges)
    def register(self, who: int, at: tuple[int, int]) -> None:
        self._refused(
            lambda: self.engine.register_userfault(self.guest.file, *at, self.sessions[who])
        )

    @precondition(lambda self: self.core.userfaults)
    @rule(data=st.data())
    def unregister(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.core.userfaults.all()))
        self.engine.unregister_userfault(one.userfault, one.session)

    @rule(who=st.integers(0, 1), rarely=st.integers(0, 2))
    def die(self, who: int, rarely: int) -> None:
        if rarely:
            return

        def death() -> Steps[int]:
            yield from ()
            with self.core.tx("death") as tx:
                return userfaultops.release(self.core, tx, self.sessions[who])

        self.core.run(death)
        self.sessions[who] = self._session()

    @rule(who=st.integers(0, 2), at=ranges, how=st.sampled_from(HOW), private=st.booleans())
    def resolve(self, who: int, at: tuple[int, int], how: str, private: bool) -> None:
        engine, file = self.engine, self.guest.file
        session = [*self.sessions, 0][who]
        acts: dict[str, Callable[[], Any]] = {
            "copy": lambda: engine.userfault_copy(file, at[0], bytes(at[1] * PAGE_SIZE), session),
            "zero": lambda: engine.userfault_zeropage(file, *at, session),
            "go": lambda: engine.userfault_continue(file, *at, private, session),
            "wake": lambda: engine.userfault_wake(file, *at, session),
        }
        refused = self._refused(acts[how])
        if how == "wake" and refused is None:
            again = range(at[0], sum(at))
            self.told = {one for one in self.told if one[2] not in again}

    # --- those who fault -----------------------------------------------------------------------
    @precondition(lambda self: len(self.waiting) < WAITING_MAX)
    @rule(index=st.integers(0, VCPUS - 1), at=ranges, private=st.booleans(), write=st.booleans())
    def run(self, index: int, at: tuple[int, int], private: bool, write: bool) -> None:
        core, guest = self.core, self.guest
        if (guest.vm, index) in core.running or not core.vms.exists(guest.vm):
            return
        opcode = Opcode.WRITE if write else Opcode.TOUCH
        gpa = guest.gpa + at[0] * PAGE_SIZE
        instruction = Instruction(opcode, gpa, at[1] * PAGE_SIZE, Pattern.BYTE, 7, private)
        self.engine.set_programme(guest.vm, index, (instruction,), lazy_accept=True)
        self._start(lambda: vcpu.run(core, guest.vm, index, 0, 0, lambda: False))

    @precondition(lambda self: len(self.waiting) < WAITING_MAX)
    @rule(at=ranges, how=st.sampled_from(["pre-fault", "read", "write", "pin"]))
    def touch(self, at: tuple[int, int], how: str) -> None:
        core, guest = self.core, self.guest
        offset, size = at[0] * PAGE_SIZE, at[1] * PAGE_SIZE
        gpa = guest.gpa + offset
        made: dict[str, Callable[[], Steps[Any]]] = {
            "pre-fault": lambda: populate.pre_fault(core, guest.vm, gpa, size, False),
            "read": lambda: hostmap.read_shared(core, guest.file, offset, size),
            "write": lambda: hostmap.write_shared(core, guest.file, offset, bytes(size)),
            "pin": lambda: pins.pin(core, guest.file, offset, size, "DMA", "device/1"),
        }
        self._start(made[how])

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def go_on(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        self._advance(one)
        if not self.core.userfaults:
            assert one.over, "it waits, and nobody has a range"

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        one = data.draw(st.sampled_from(self.waiting))
        assert one.at is not None
        one.at.cancelled = True
        self._advance(one, to_its_end=True)
        assert one.over

    # --- what comes between --------------------------------------------------------------------
    @rule(at=ranges)
    def punch(self, at: tuple[int, int]) -> None:
        self._refused(
            lambda: self.engine.fallocate(self.guest.file, 3, at[0] * PAGE_SIZE, at[1] * PAGE_SIZE)
        )

    @rule(at=ranges)
    def allocate(self, at: tuple[int, int]) -> None:
        self._refused(
            lambda: self.engine.fallocate(self.guest.file, 1, at[0] * PAGE_SIZE, at[1] * PAGE_SIZE)
        )

    @rule(at=ranges, private=st.booleans())
    def convert(self, at: tuple[int, int], private: bool) -> None:
        self._convert(*at, private)

    @rule()
    def compact(self) -> None:
        self.engine.compact(0)

    @rule(often=st.integers(0, 9), what=st.sampled_from(["file", "vm"]))
    def close(self, often: int, what: str) -> None:
        if often:
            return
        if what == "file" and self.restricted:
            self._refused(lambda: self.engine.close_file(self.guest.file))
        elif what == "vm":
            self._refused(lambda: self.engine.destroy_vm(self.guest.vm))

    # --- after each step -------------------------------------------------------------------------
    @invariant()
    def all_is_well(self) -> None:
        assert check(self.core) == []
        assert self.core.space.holders == []
        waited = {
            (fault.file, fault.private, page)
            for fault in self.core.pending_faults.waiting for page in fault.pgoffs.tolist()
        }  # fmt: skip
        self.told &= waited
        for session in [*getattr(self, "sessions", []), 0]:
            for message in self.engine.take_userfaults(session):
                if message.kind != FAULT:
                    continue
                one = self.core.userfaults.get(message.userfault, session)
                assert one.pgoff <= message.pgoff < message.pgoff + message.npages <= one.end
                for page in range(message.pgoff, message.pgoff + message.npages):
                    key = (message.file, message.private, page)
                    assert key not in self.told, "told twice"
                    self.told.add(key)
        assert self.told == waited, "waited for, and not told"

    # --- helpers -------------------------------------------------------------------------------
    guest: Guest

    def _session(self) -> int:
        return self.engine.open_session("uid:1", "host", "socket").session

    def _convert(self, page: int, n: int, private: bool) -> None:
        guest, attributes = self.guest, 8 if private else 0
        if not self.core.vms.exists(guest.vm):
            return
        if self.core.vms.get(guest.vm).info.in_place:
            act: Callable[[], Any] = lambda: self.engine.convert_file(  # noqa: E731
                guest.file, page * PAGE_SIZE, n * PAGE_SIZE, attributes
            )
        else:
            act = lambda: self.engine.set_attributes(  # noqa: E731
                guest.vm, [(guest.gpa + page * PAGE_SIZE, n * PAGE_SIZE, attributes)]
            )
        self._refused(act)

    def _refused(self, act: Callable[[], Any]) -> RmemError | None:
        try:
            act()
        except PluginFault:
            raise
        except RmemError as refusal:
            return refusal
        return None

    def _start(self, make: Callable[[], Steps[Any]]) -> None:
        one = Waiting(self.core.and_scrub(make))
        self.waiting.append(one)
        self._advance(one)

    def _advance(self, one: Waiting, to_its_end: bool = False) -> None:
        """Drive an operation to its next wait, as ``Core.run`` would."""
        with self.core._changed:
            try:
                while True:
                    one.at = one.steps.send(None)
                    if one.at.wait:
                        assert one.at.name == "userfault"
                        if not to_its_end:
                            return
                        one.at.cancelled = True
                    elif not self.core.done_at_once(one.at, never):
                        with self.core.away(one.at, self.core.waits.current):
                            self.core.work(one.at)
                        self.core.come_back(one.at)
            except PluginFault:
                raise
            except (StopIteration, RmemError):
                one.over = True
                self.waiting.remove(one)


TestUserfault = UserfaultMachine.TestCase
TestUserfault.settings = settings(
    max_examples=80,
    phases=[Phase.explicit, Phase.generate],
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
