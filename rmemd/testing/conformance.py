"""The conformance kit: does a consumer keep the contract of the hook reference?

Owns ``check_consumer``. It drives VMs of one variant, on an engine of its own, through random legal
operations, breaks each op in turn, and after every step compares everything there is. The same
seed gives the same run.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks.tables import Space, same_state
from rmemd.hooks.types import Runs, Why
from rmemd.model.host import Use
from rmemd.model.vms import unpack
from rmemd.testing.guestmodel import PAGES, ModelGuest
from rmemd.testing.recorder import Recorder, reachable
from rmemd.testing.strangers import taken

NFRAMES = 2048
# VMs that are made at most to see how many keys the vendor has
CAPACITY_MAX = 24
FINDINGS_MAX = 20
# how often each action is drawn; the last ones end a VM's life, or part of it
ACTIONS: tuple[tuple[str, int], ...] = (
    ("write", 16), ("read", 8), ("fault", 3), ("allocate", 2), ("punch", 3), ("convert", 6),
    ("call", 5), ("migrate", 6), ("pin", 3), ("inspect", 2), ("change_slot", 1), ("poison", 2),
    ("close_file", 1), ("destroy", 1),
)  # fmt: skip
# after these the guest looks at its pages at once
CHANGES = frozenset(("punch", "convert", "migrate", "poison"))
# so many steps after the last one, a VM's consumer is swapped: these ops are broken only there
SWAP_EVERY = 12
SWAPPING = ("export_state", "import_state")
WITHOUT_RANGE = frozenset(("change_slot", "close_file", "destroy"))


@dataclass(frozen=True)
class Finding:
    """A rule that a consumer broke: at which step of which seed, doing what, and how."""

    rule: str
    op: str
    step: int
    seed: int
    text: str

    def __str__(self) -> str:
        """Return it as one line."""
        return f"[{self.rule}] step {self.step} ({self.op}), seed {self.seed}: {self.text}"


@dataclass
class Report:
    """What a run of the kit found.

    Attributes:
        variant: the consumer.
        findings: what is wrong, at most ``FINDINGS_MAX``; empty for a consumer that passes.
        ops_called: how often each op, and each op of the platform, was called.
        undone: how often each op was made to raise, and its transaction undone.
        unreached: ops that the consumer has and that the run never called.
        steps: how many steps were taken.
    """

    variant: str
    findings: list[Finding] = field(default_factory=list)
    ops_called: Counter[str] = field(default_factory=Counter)
    undone: Counter[str] = field(default_factory=Counter)
    unreached: frozenset[str] = frozenset()
    steps: int = 0

    def require(self) -> None:
        """Pass only if nothing was found.

        Raises:
            AssertionError: with every finding.
        """
        if self.findings:
            lines = "\n".join(map(str, self.findings))
            raise AssertionError(f"{self.variant} does not conform:\n{lines}")


def check_consumer(
    variant: str,
    *,
    null: frozenset[str] | None = None,
    config: Mapping[str, str] | None = None,
    plugins: Iterable[EntryPoint] = (),
    may_leak: bool = False,
    seed: int = 0,
    steps: int = 300,
) -> Report:
    """Run a consumer variant through random legal operations and say what it gets wrong.

    Args:
        variant: the consumer's full name, as in ``Variant.name``.
        null: the ops that its table must leave NULL, exactly; None to take the table as it is.
        config: the VMs' configuration.
        plugins: entry points to load beside the installed plugins.
        may_leak: whether frames may be leaked that the vendor cannot give back.
        seed: of every random choice.
        steps: how many operations, not counting how VMs begin and end.

    Returns:
        The report; ``report.require()`` raises if there are findings.
    """
    engine = Engine(Options(NFRAMES, 2, kept_records=None), Guard(clock=lambda: 0.0))
    engine.watch()
    try:
        run = _Run(engine, variant, config or {}, may_leak, seed)
        if run.load(plugins, null):
            run.go(steps)
        return run.report
    finally:
        engine.close()


class _Run:
    """One run: the engine, a VM per personality, and a shadow that only knows the journal."""

    def __init__(
        self, engine: Engine, variant: str, config: Mapping[str, str], may_leak: bool, seed: int
    ) -> None:
        self.engine, self.variant, self.config, self.seed = engine, variant, config, seed
        self.may_leak = may_leak
        self.core = engine.core
        self.rng = random.Random(seed)
        self.report = Report(variant)
        self.op = "load"
        self.shadow, self.replayed = Space(), 0
        self.guests: list[ModelGuest] = []
        self.poisoned: set[int] = set()
        self.attributes: dict[int, tuple[object, dict[str, Any]]] = {}
        self.recorder = Recorder(engine.core)

    # --- the beginning and the end -----------------------------------------------------------
    def load(self, plugins: Iterable[EntryPoint], null: frozenset[str] | None) -> bool:
        """Load what is not installed; return whether the variant is there."""
        core = self.core
        with core.locked(), core.tx("load plugins") as tx:
            core.registry.load(tx, NFRAMES, plugins)
        offer = core.registry.offers.get(self.variant)
        if offer is None:
            why = [f"{f.name}: {f.error}" for f in core.registry.found if f.error]
            self.found("registration", f"there is no such consumer; quarantined: {why}")
            return False
        self.platform = core.registry.platforms[offer.platform]
        self.personalities = offer.variant.personalities
        declared = frozenset(op for op, there in offer.ops.implemented().items() if not there)
        if null is not None and declared != null:
            self.found("null", f"NULL are {sorted(declared)}, declared were {sorted(null)}")
        self.ops = [op for op, there in offer.ops.implemented().items() if there]
        self.ops += [op for op in ("free", "host_access", "destroy_consumer")
                     if getattr(self.platform.ops, op) is not None]  # fmt: skip
        return True

    def go(self, steps: int) -> None:
        """Make the run."""
        before = self.capacity()
        self.recorder.watch(self.platform)
        for personality in self.personalities:
            self.create(personality)
        for self.report.steps in range(1, steps + 1):
            if len(self.report.findings) >= FINDINGS_MAX:
                break
            self.step()
            if self.report.steps % SWAP_EVERY == 0:
                self.swap()
        self.op = "teardown"
        self.recorder.begin()
        for guest in self.guests:
            self.tear_down(guest)
        self.look()
        self.baseline(before)
        self.report.ops_called, self.report.undone = self.recorder.calls, self.recorder.undone
        self.report.unreached = frozenset(op for op in self.ops if not self.recorder.calls[op])

    def capacity(self) -> int:
        """Return how many VMs there can be at once, up to CAPACITY_MAX."""
        made: list[int] = []
        try:
            while len(made) < CAPACITY_MAX:
                made.append(self.engine.create_vm(self.variant, None, self.config).info.vm)
        except RmemError:
            pass
        for vm in made:
            self.act("destroy", lambda vm=vm: self.engine.destroy_vm(vm))  # type: ignore[misc]
        return len(made)

    def create(self, personality: str) -> None:
        """Make and launch a VM."""
        in_place = personality == "in-place"

        def make() -> None:
            guest = ModelGuest(
                self.engine, self.recorder, self.variant, in_place, self.config, self.rng
            )
            self.guests.append(guest)
            made = guest.consumer.made
            self.attributes[guest.vm] = (made, _plain(made))
            guest.launch()

        self.recorder.begin()
        refusal = self.act("create", make)
        if refusal is not None:
            self.found("launch", f"a VM could not be made: {refusal}")
        self.look()

    def tear_down(self, guest: ModelGuest) -> None:
        """End a VM and its file."""
        for refused in guest.teardown():
            self.found("teardown", refused)
        self.poisoned |= guest.poisoned

    def baseline(self, capacity: int) -> None:
        """Compare what is left with an empty host."""
        host = self.core.host
        kept = np.ones(NFRAMES, dtype=np.bool_)
        kept[list(self.poisoned)] = False
        gone = (Use.FREE, Use.LEAKED) if self.may_leak else (Use.FREE,)
        left = np.flatnonzero(kept & ~np.isin(host.use.view, gone))
        if left.size:
            uses = sorted({Use(int(u)).name for u in host.use.view[left]})
            self.found("frames", f"{left.size} frames are left {uses}, first pfn {left[0]:#x}")
        if any(self.core.ledger.count(entry) for entry in self.core.ledger.entries()):
            self.found("frames", "references or pins are left in the ledger")
        after = self.capacity()
        if after != capacity:
            self.found("keys", f"{capacity} VMs could be made at first, {after} now")
        tables = [name for name in self.core.space.tables if name.startswith(("vm/", "file/"))]
        if tables or len(host.vm_keys):
            self.found("frames", f"tables or keys of VMs are left: {tables}")

    # --- a step ------------------------------------------------------------------------------
    def step(self) -> None:
        """Do something to a VM, now and then with an op broken, and look at everything."""
        for guest in [g for g in self.guests if g.dead or not g.file_open]:
            self.replace(guest)
        if not self.guests:
            return
        guest = self.rng.choice(self.guests)
        names, weights = zip(*ACTIONS, strict=True)
        name = self.rng.choices(names, weights)[0]
        page = self.rng.randrange(PAGES)
        n = self.rng.randint(1, min(6, PAGES - page))
        if not guest.slot:
            name = "change_slot"
        if name == "destroy":
            self.replace(guest)
            return
        action = getattr(guest, name)
        self.recorder.begin(*self.trip())
        self.act(name, action if name in WITHOUT_RANGE else lambda: action(page, n))
        self.look()
        if name in CHANGES and guest.usable:
            self.recorder.begin()
            self.act(name, lambda: guest.read(page, n))
            self.look()
        for rule, text in guest.broken:
            self.found(rule, text)
        guest.broken.clear()

    def replace(self, guest: ModelGuest) -> None:
        """End a VM and make another."""
        self.op = "destroy"
        self.recorder.begin(*self.trip())
        self.guests.remove(guest)
        self.tear_down(guest)
        self.look()
        self.create("in-place" if guest.in_place else "attributes")

    def swap(self) -> None:
        """Have a fresh object take over from a VM's consumer, in the middle of everything.

        The first ones are broken: each of the two ops, before and after it ran.
        """
        usable = [guest for guest in self.guests if not guest.dead]
        offered = self.core.registry.offers[self.variant].ops
        if not usable or offered.export_state is None:
            return
        guest = usable[self.report.steps // SWAP_EVERY % len(usable)]
        waiting = [op for op in SWAPPING if self.recorder.undone[op] < 2]
        how = ("before", "after")[self.recorder.undone[waiting[0]] % 2] if waiting else ""
        before, raw = self.core.space.snapshot(), guest.ops
        self.recorder.begin(waiting[0] if waiting else "", how)
        refusal = self.act("swap", guest.swap)
        if waiting:
            # the object that did not take over is asked no more
            self.recorder.tables[guest.vm] = raw
        elif isinstance(refusal, RmemError):
            self.found("swap", f"vm/{guest.vm}: its consumer cannot be swapped: {refusal}")
        made, own = guest.consumer.made, f"vm/{guest.vm}/{self.platform.name}/"
        self.attributes[guest.vm] = (made, _plain(made))
        differ = [name for name in same_state(before, self.core.space.snapshot())
                  if name.startswith(("platform/", own))]  # fmt: skip
        if differ:
            self.found("swap", f"these tables are not what they were: {differ}")
        self.look()
        variant = self.core.registry.offers[self.variant].variant
        if guest.ops.export_state is not None:
            state = guest.ops.export_state()
            for text in taken(self.core, guest.consumer, variant, self.config, state):
                self.found("swap", text)

    def trip(self) -> tuple[str, str]:
        """Choose the op that is to raise in this step, "" for none: each before and after."""
        waiting = [op for op in self.ops if self.recorder.undone[op] < 2 and op not in SWAPPING]
        if not waiting or self.rng.random() < 0.5:
            return "", ""
        op = self.rng.choice(waiting)
        return op, ("before", "after")[self.recorder.undone[op] % 2]

    def act(self, name: str, action: Callable[[], object]) -> RmemError | None:
        """Do something; a refusal is legal, a plugin's fault is not unless the kit caused it."""
        self.op = name
        try:
            action()
        except PluginFault as fault:
            if not self.recorder.tripped:
                cause = fault.__cause__
                self.found("answer", f"{fault}{f': {cause!r}' if cause else ''}")
            return fault
        except RmemError as refusal:
            return refusal
        return None

    def look(self) -> None:
        """Compare everything there is."""
        for rule, text in self.recorder.end():
            self.found(rule, text)
        for text in check(self.core):
            self.found("invariant", text)
        self.look_at_state()
        self.look_at_attributes()
        for bracket in self.recorder.starts:
            if bracket.why in (Why.PUNCH, Why.CLOSE):
                self.look_behind(bracket.vm, bracket.runs)

    def look_at_state(self) -> None:
        """The state must be what the committed transactions make, and nothing else."""
        records = self.core.journal.records
        for at in range(self.replayed, len(records)):
            for write in records[at].writes:
                self.shadow.apply(write)
        self.replayed = len(records)
        differ = same_state(self.shadow.snapshot(), self.core.space.snapshot())
        if differ:
            self.found("undo", f"these tables differ from what was committed: {differ}")

    def look_at_attributes(self) -> None:
        """State lives in tables: a consumer's own attributes are as they were made."""
        for vm, (made, before) in list(self.attributes.items()):
            after = _plain(made)
            changed = sorted(k for k in before.keys() | after.keys()
                             if before.get(k) != after.get(k))  # fmt: skip
            if changed:
                self.found("tables", f"vm/{vm}: the consumer keeps state in {changed}")
                self.attributes[vm] = (made, after)

    def look_behind(self, vm: int, runs: Runs) -> None:
        """A frame that went back to the host is out of the vendor's reach."""
        consumer = self.core.consumers.get(vm)
        guest = next((g for g in self.guests if g.vm == vm), None)
        if consumer is None or guest is None or guest.ops.guest_access is None:
            return
        gfns, pfns = runs.gfns(), runs.pfns()
        gone = self.core.host.owner.get(pfns) == 0
        gone &= unpack(self.core.vms.get(vm).mirror.get(gfns))[0] < 0
        old = Runs.of_pages(gfns[gone], pfns[gone])
        allowed = reachable(self.core, consumer, guest.ops.guest_access, old)
        if allowed.size:
            page = f"gfn {int(allowed[0]):#x}"
            self.found("unmap", f"vm/{vm}: {page} is allowed to the guest after its frame is gone")

    def found(self, rule: str, text: str) -> None:
        """Note a finding."""
        if len(self.report.findings) < FINDINGS_MAX:
            finding = Finding(rule, self.op, self.report.steps, self.seed, text)
            self.report.findings.append(finding)


def _plain(made: object) -> dict[str, Any]:
    """Return copies of an object's attributes that are plain values or collections."""
    plain = (int, str, bytes, tuple, list, dict, set, frozenset)
    found = getattr(made, "__dict__", {}).items()
    return {name: copy.deepcopy(value) for name, value in found if isinstance(value, plain)}
