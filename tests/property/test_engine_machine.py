"""One engine, VMs of every consumer, and whatever comes to Hypothesis's mind.

After each step the invariants hold, revisions grow exactly when the state changed, a refusal
changed nothing, and guests read what the model says: what they wrote, wherever it was moved to, and
zeros where a page is new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from guests import Guest, consumers, make_engine
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rmemd.engine.invariants import check
from rmemd.engine.migrate import Outcome
from rmemd.engine.programme import Instruction, Opcode, Pattern, make_rows
from rmemd.errors import Denied, PluginFault, RmemError
from rmemd.hooks import Agent
from rmemd.hooks.tables import same_state
from rmemd.model.host import Use
from rmemd.model.vms import GUEST_MEMFD
from rmemd.units import PAGE_SIZE, pages

NFRAMES = 2048
PAGES = 40
VMS_MAX = 4
CONSUMERS = consumers()
ZERO = -1
# a page that comes anew to a guest of these reads as noise: nobody zeroed it under the guest's key
NOISY = ("snp",)
# conversion to shared and back takes the page from the guest
FORGETFUL = ("tdx",)


@dataclass(eq=False)
class Known:
    """What a guest's pages hold: page -> seed, or ZERO; a page that is absent is not predicted."""

    guest: Guest
    file_open: bool = True
    slot: bool = True
    private: dict[int, int] = field(default_factory=dict)
    shared: dict[int, int] = field(default_factory=dict)
    poisoned: set[tuple[int, bool]] = field(default_factory=set)
    # taken by force: the guest dies of touching it (pkvm.md §8 rule 13)
    fatal: set[int] = field(default_factory=set)

    def __repr__(self) -> str:
        return f"{self.guest.consumer_name} vm/{self.guest.vm}"

    def half(self, private: bool) -> dict[int, int]:
        """Return the model of one half; in place there is one for both."""
        return self.private if private or self.guest.in_place else self.shared

    def fresh(self, private: bool) -> int | None:
        """Return what a page reads as that was never touched."""
        return None if private and self.guest.platform in NOISY else ZERO

    def expected(self, page: int, private: bool) -> int | None:
        """Return what a page reads as, None for no prediction."""
        half = self.half(private)
        return half[page] if page in half else self.fresh(private)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    """Draw (page, n) inside the slot."""
    page = draw(st.integers(0, PAGES - 1))
    return page, draw(st.integers(1, min(12, PAGES - page)))


class EngineMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = make_engine(NFRAMES, nnodes=2)
        self.known: list[Known] = []
        self.pins: list[int] = []
        self.last_vm = self.last_file = 0
        self.before: tuple[int, dict[str, Any]] = (0, {})

    @initialize(names=st.lists(st.sampled_from(CONSUMERS), min_size=2, max_size=3))
    def begin(self, names: list[str]) -> None:
        for name in names:
            self._create(name, True)
        for known in self.known:
            self._store(known, 0, 12, known.guest.vm)
            if not known.guest.in_place:
                # and some shared pages beside them
                self._refused(lambda known=known: known.guest.convert(30, 6, False))
                self._store(known, 30, 6, known.guest.vm)
        self.before = self._state()

    def teardown(self) -> None:
        self.engine.close()

    # --- steps -------------------------------------------------------------------------------
    @precondition(lambda self: len(self.known) < VMS_MAX)
    @rule(name=st.sampled_from(CONSUMERS), finalized=st.booleans())
    def create(self, name: str, finalized: bool) -> None:
        self._create(name, finalized)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges(), seed=st.integers(0, 99), finalize=st.booleans())
    def populate(self, data: st.DataObject, at: tuple[int, int], seed: int, finalize: bool) -> None:
        known, (page, n) = self._pick(data), at
        guest = known.guest
        rows = make_rows(Pattern.WORDS, seed, pages(guest.gfn + page, n))
        if self._refused(lambda: guest.populate(page, rows.tobytes())) is None:
            known.private |= dict.fromkeys(range(page, page + n), seed)
        if finalize:
            self._refused(lambda: self.engine.finalize(guest.vm))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges(), seed=st.integers(0, 99))
    def write(self, data: st.DataObject, at: tuple[int, int], seed: int) -> None:
        self._store(self._pick(data), *at, seed)

    def _store(self, known: Known, page: int, n: int, seed: int) -> None:
        private = self._is_private(known, page)
        n = self._uniform(known, page, n, private)
        half = known.half(private)
        for i in range(page, page + n):
            half.pop(i, None)
        exited = self._run(known, [self._access(known, Opcode.WRITE, page, n, private, seed)])
        if exited is not None and exited.reason.name == "HLT":
            half |= dict.fromkeys(range(page, page + n), seed)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges())
    def read(self, data: st.DataObject, at: tuple[int, int]) -> None:
        self._verify(self._pick(data), range(at[0], sum(at)))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges())
    def read_as_the_other(self, data: st.DataObject, at: tuple[int, int]) -> None:
        known, (page, _) = self._pick(data), at
        private = not self._is_private(known, page)
        exited = self._run(known, [self._access(known, Opcode.CHECK, page, 1, private, 0)])
        assert exited is None or exited.reason.name in ("MEMORY_FAULT", "MMIO")

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges(), idle=st.sampled_from([False, False, False, True]))
    def convert(self, data: st.DataObject, at: tuple[int, int], idle: bool) -> None:
        known, (page, n) = self._pick(data), at
        private = self._is_private(known, page) == idle
        changed = [i for i in range(page, page + n) if self._is_private(known, i) != private]
        if self._refused(lambda: known.guest.convert(page, n, private)) is None:
            self._forget_if_forgetful(known, changed)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges(), by_fault=st.booleans())
    def bring_in(self, data: st.DataObject, at: tuple[int, int], by_fault: bool) -> None:
        known, (page, n) = self._pick(data), at
        act = known.guest.fault if by_fault else known.guest.allocate
        self._refused(lambda: act(page, n), whole=not by_fault)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges())
    def punch(self, data: st.DataObject, at: tuple[int, int]) -> None:
        known, (page, n) = self._pick(data), at
        guest, span = known.guest, range(page, page + n)
        had = [i for i in span if known.slot and guest.pfns(i)[0] >= 0]
        private = {i: self._is_private(known, i) for i in span}
        if self._refused(lambda: guest.punch(page, n)) is not None:
            return
        if guest.platform == "pkvm":
            known.fatal.update(i for i in had if private[i])
        for i in span:
            known.private.pop(i, None)
            known.poisoned.discard((i, True))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges())
    def pin(self, data: st.DataObject, at: tuple[int, int]) -> None:
        known, (page, n) = self._pick(data), at
        try:
            self.pins.append(
                self.engine.pin(
                    known.guest.file, page * PAGE_SIZE, n * PAGE_SIZE, "DMA", "device/1"
                )
            )
        except RmemError as refusal:
            self._judge(refusal)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        handle = data.draw(st.sampled_from(self.pins))
        self.pins.remove(handle)
        assert self._refused(lambda: self.engine.unpin(handle)) is None
        assert self._refused(lambda: self.engine.unpin(handle)) is not None

    @precondition(lambda self: self.known)
    @rule(data=st.data(), at=ranges(), node=st.sampled_from([None, 0, 1]))
    def migrate(self, data: st.DataObject, at: tuple[int, int], node: int | None) -> None:
        present = self._present(self._pick(data))
        pfns = np.array(present[at[0] % 12 :][: at[1]] or present[:1], dtype=np.int64)
        self._report(self.engine.migrate(pfns, node), pfns)

    @rule(node=st.integers(0, 1))
    def compact(self, node: int) -> None:
        done = self.engine.compact(node)
        self._report(done.report, None)
        assert done.free_2m_after >= done.free_2m_before

    @rule(start=st.integers(0, 255), n=st.integers(1, 64), back=st.booleans())
    def offline(self, start: int, n: int, back: bool) -> None:
        self._report(self.engine.offline(start, n).report, None)
        if back:
            self.engine.online(start, n)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def swap(self, data: st.DataObject) -> None:
        """Another consumer takes over, or nothing has happened; its own always can."""
        known = self._pick(data)
        offers, guest = self.engine.core.registry.offers, known.guest
        kin = [name for name in CONSUMERS if offers[name].platform == guest.platform]
        name = data.draw(st.sampled_from(kin))
        refusal = self._refused(lambda: self.engine.swap_consumer(guest.vm, name))
        if refusal is None:
            guest.consumer_name = name
        elif name == guest.consumer_name:
            assert refusal.reason.name == "VM_DEAD", refusal

    @precondition(lambda self: self.known)
    @rule(data=st.data(), rarely=st.sampled_from([0, 0, 1]))
    def poison(self, data: st.DataObject, rarely: int) -> None:
        known = self._pick(data)
        present = self._present(known)
        if not present or not rarely:
            return
        pfn = data.draw(st.sampled_from(present))
        host = self.engine.core.host
        page, private = host.pgoff.at(pfn), host.use.at(pfn) == Use.PRIVATE
        if self._refused(lambda: self.engine.poison(pfn)) is None:
            known.poisoned.add((page, private or bool(known.guest.in_place)))

    @rule(pfn=st.integers(0, 300))
    def poison_what_nobody_owns(self, pfn: int) -> None:
        if not self.engine.core.host.owner.at(pfn):
            self._refused(lambda: self.engine.poison(pfn))

    @rule(pfn=st.integers(0, NFRAMES - 1), write=st.booleans())
    def host_touches(self, pfn: int, write: bool) -> None:
        """The host may read anything, and write to what nobody owns."""
        if self.engine.core.host.owner.at(pfn):
            self._refused(lambda: self.engine.read_physical(pfn, 1, Agent.DEVICE))
        elif write:
            self._refused(lambda: self.engine.write_physical(pfn, b"x" * 4096, Agent.HOST_USER))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), rarely=st.sampled_from([0, 0, 0, 1]))
    def close_file(self, data: st.DataObject, rarely: int) -> None:
        known = self._pick(data)
        if not rarely:
            return
        if self._refused(lambda: self.engine.close_file(known.guest.file)) is None:
            known.file_open = False

    @precondition(lambda self: self.known)
    @rule(data=st.data(), rarely=st.sampled_from([0, 0, 0, 1]))
    def change_slot(self, data: st.DataObject, rarely: int) -> None:
        known = self._pick(data)
        if not rarely:
            return
        guest = known.guest
        size = 0 if known.slot else PAGES * PAGE_SIZE
        act = lambda: self.engine.set_memory_region(  # noqa: E731
            guest.vm, 0, GUEST_MEMFD, guest.gpa(0), size, guest.file
        )
        if self._refused(act) is None:
            known.slot = not known.slot
            self._forget_if_forgetful(known, list(range(PAGES)))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), rarely=st.sampled_from([0, 0, 0, 1]))
    def destroy(self, data: st.DataObject, rarely: int) -> None:
        known = self._pick(data)
        if not rarely:
            return
        if self._refused(lambda: self.engine.destroy_vm(known.guest.vm)) is None:
            self.known.remove(known)
            assert self._refused(lambda: self.engine.destroy_vm(known.guest.vm)) is not None

    @precondition(lambda self: self.known)
    @rule(data=st.data(), which=st.integers(0, 7))
    def ask_for_nonsense(self, data: st.DataObject, which: int) -> None:
        guest, engine = self._pick(data).guest, self.engine
        calls: list[Callable[[], Any]] = [
            lambda: engine.create_vm("tdx-never"),
            lambda: engine.create_file(guest.vm, 0),
            lambda: engine.fallocate(guest.file, 3, 1, PAGE_SIZE),
            lambda: engine.set_attributes(guest.vm, [(0, PAGE_SIZE, 16)]),
            lambda: engine.pre_fault(guest.vm, guest.gpa(PAGES), PAGE_SIZE),
            lambda: engine.set_memory_region(guest.vm, 1, GUEST_MEMFD, 0, PAGE_SIZE, 9999),
            lambda: engine.migrate(np.array([0]), 7),
            lambda: engine.create_vcpu(guest.vm, 0),
        ]
        assert self._refused(calls[which]) is not None

    # --- after each step -----------------------------------------------------------------------
    @invariant()
    def all_is_well(self) -> None:
        core = self.engine.core
        assert check(core) == []
        assert core.space.holders == []
        assert not (core.host.use.view == Use.SCRUBBING).any(), "frames in limbo"
        revision, state = self._state()
        if same_state(self.before[1], state):
            assert revision > self.before[0], "changed without a revision"
        assert revision >= self.before[0]
        self.before = (revision, state)
        vms = [known.guest.vm for known in self.known]
        assert vms == sorted(set(vms))

    # --- helpers -------------------------------------------------------------------------------
    def _create(self, name: str, finalized: bool) -> None:
        try:
            guest = Guest(self.engine, name, PAGES, finalized=finalized)
        except RmemError as refusal:
            self._judge(refusal)
            return
        assert guest.vm > self.last_vm, "a VM's handle was used again"
        assert guest.file > self.last_file, "a file's handle was used again"
        self.last_vm, self.last_file = guest.vm, guest.file
        self.known.append(Known(guest))

    def _pick(self, data: st.DataObject) -> Known:
        return data.draw(st.sampled_from(self.known))

    def _present(self, known: Known) -> list[int]:
        """Return the frames of the guest's file, private ones first."""
        if not known.file_open:
            return []
        file = self.engine.core.files.get(known.guest.file)
        tables = (file.frames, file.shared)
        return [int(pfn) - 1 for t in tables for pfn in t.get(pages(0, PAGES)) if pfn]

    def _state(self) -> tuple[int, dict[str, Any]]:
        return self.engine.revision, self.engine.core.space.snapshot()

    def _judge(self, refusal: RmemError) -> None:
        assert not isinstance(refusal, (PluginFault, Denied)), refusal

    def _refused(self, act: Callable[[], Any], whole: bool = True) -> RmemError | None:
        before = self._state()
        refusal = None
        try:
            act()
        except RmemError as caught:
            refusal = caught
        if refusal is not None:
            self._judge(refusal)
            if whole:
                after = self._state()
                assert same_state(before[1], after[1]) == [], str(refusal)
                assert before[0] == after[0]
        return refusal

    def _report(self, report: Any, asked: Any) -> None:
        for moved in report.moves:
            if moved.outcome is Outcome.MOVED:
                assert (self.engine.core.host.owner.get(moved.dst) != 0).all()
                assert (self.engine.core.host.owner.get(moved.src) == 0).all() or asked is None
            else:
                self._judge(moved.refusal)
        if asked is not None:
            told = np.sort(np.concatenate([m.src for m in report.moves] or [asked[:0]]))
            assert told.tolist() == np.sort(asked).tolist(), "a page without an outcome, or two"

    def _is_private(self, known: Known, page: int) -> bool:
        core, guest = self.engine.core, known.guest
        if not guest.in_place:
            return core.vms.get(guest.vm).attributes.at(guest.gfn + page) == 1
        # where the file or the slot is gone, the access fails whatever it says
        return known.file_open and core.files.get(guest.file).attributes.at(page) == 1

    def _uniform(self, known: Known, page: int, n: int, private: bool) -> int:
        same = [self._is_private(known, i) == private for i in range(page, page + n)]
        return same.index(False) if False in same else n

    def _forget_if_forgetful(self, known: Known, changed: list[int]) -> None:
        if known.guest.platform in FORGETFUL:
            for i in changed:
                known.private.pop(i, None)

    def _access(
        self, known: Known, opcode: Opcode, page: int, n: int, private: bool, value: int
    ) -> Instruction:
        pattern = Pattern.BYTE if value == ZERO else Pattern.WORDS
        value = max(value, 0)
        return known.guest.do(opcode, page, n, private=private, pattern=pattern, value=value)

    def _run(self, known: Known, programme: list[Instruction]) -> Any:
        guest = known.guest
        first, last = programme[0].gpa, programme[-1].gpa + programme[-1].length
        span = range(first // PAGE_SIZE - guest.gfn, last // PAGE_SIZE - guest.gfn)
        try:
            exited = guest.run(*programme, lazy=True)
        except RmemError as refusal:
            self._judge(refusal)
            return None
        name = exited.reason.name
        if name in ("SHUTDOWN", "NONE"):
            assert known.fatal.intersection(span), exited
        if name == "INTERNAL_ERROR":
            assert exited.refusal is not None, exited
            self._judge(exited.refusal)
        if name == "MMIO":
            assert not known.slot
        if name == "MEMORY_FAULT" and exited.errno == 133:
            assert any((i, p) in known.poisoned for i in span for p in (True, False)), exited
        return exited

    def _verify(self, known: Known, span: range) -> None:
        programme = []
        for page in span:
            private = self._is_private(known, page)
            expected = known.expected(page, private)
            if expected is not None:
                programme.append(self._access(known, Opcode.CHECK, page, 1, private, expected))
        if programme:
            exited = self._run(known, programme)
            assert exited is None or exited.vcpu.mismatched == 0, exited


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=60,
    # explaining costs a trace of every line, and shrinking more than a test may take
    phases=[Phase.explicit, Phase.generate],
    stateful_step_count=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
