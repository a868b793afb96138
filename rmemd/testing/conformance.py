"""The conformance kit: does a consumer keep the contract of the hook reference?

Owns ``check_consumer``. It drives VMs of one variant, on an engine of its own, through random legal
operations, breaks each op in turn, and after every step compares everything there is. Now and then
it reopens the engine as after a kill, and takes some steps on both. The same seed gives the same
run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint
from typing import Any, cast

from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.errors import PluginFault, RmemError
from rmemd.hooks.tables import Space, same_state
from rmemd.hooks.types import Runs, Why
from rmemd.model.vms import unpack
from rmemd.testing.attributes import changed, plain
from rmemd.testing.baseline import left, made_at_once
from rmemd.testing.findings import Finding, Report
from rmemd.testing.guestmodel import PAGES, ModelGuest
from rmemd.testing.keeping import Kept, kept_engine
from rmemd.testing.recorder import Recorder, reachable
from rmemd.testing.restarts import Both, Twin
from rmemd.testing.strangers import taken

NFRAMES = 2048
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
NOT_TRIPPED = (*SWAPPING, "resume")
# every so many steps, between two swaps, the engine is reopened, and goes on beside for a few
RESTART_EVERY, RESTART_AT, TOGETHER = 24, 13, 4
WITHOUT_RANGE = frozenset(("change_slot", "close_file", "destroy"))


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
    kept = Kept()
    engine = kept_engine(kept, Options(NFRAMES, 2, kept_records=None, plugins=tuple(plugins)))
    engine.watch()
    run = _Run(engine, kept, variant, config or {}, may_leak, seed)
    try:
        if run.find(null):
            run.go(steps)
        return run.report
    finally:
        run.part()
        engine.close()
        kept.close()


class _Run:
    """One run: the engine, a VM per personality, and a shadow that only knows the journal."""

    def __init__(
        self, engine: Engine, kept: Kept, variant: str, config: Mapping[str, str],
        may_leak: bool, seed: int,
    ) -> None:  # fmt: skip
        self.engine, self.variant, self.config, self.seed = engine, variant, config, seed
        self.kept, self.may_leak = kept, may_leak
        self.twin: Twin | None = None
        # what guests are driven through: the engine, or it and its twin
        self.door = engine
        self.known: set[tuple[str, str]] = set()
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
    def find(self, null: frozenset[str] | None) -> bool:
        """Find what is offered under the variant's name; return whether it is there."""
        core = self.core
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
            if self.report.full:
                break
            if self.report.steps % RESTART_EVERY == RESTART_AT:
                self.restart()
            self.step()
            if self.report.steps % RESTART_EVERY == RESTART_AT + TOGETHER - 1:
                self.part()
            if self.report.steps % SWAP_EVERY == 0:
                self.swap()
        self.op = "teardown"
        self.part()
        self.recorder.begin()
        for guest in self.guests:
            self.tear_down(guest)
        self.look()
        self.baseline(before)
        self.report.ops_called, self.report.undone = self.recorder.calls, self.recorder.undone
        self.report.unreached = frozenset(op for op in self.ops if not self.recorder.calls[op])

    def capacity(self) -> int:
        """Return how many VMs there can be at once."""
        made = made_at_once(self.engine, self.variant, self.config)
        for vm in made:
            self.act("destroy", lambda vm=vm: self.engine.destroy_vm(vm))  # type: ignore[misc]
        return len(made)

    def create(self, personality: str) -> None:
        """Make and launch a VM."""
        in_place = personality == "in-place"

        def make() -> None:
            guest = ModelGuest(
                self.door, self.recorder, self.variant, in_place, self.config, self.rng
            )
            self.guests.append(guest)
            made = guest.consumer.made
            self.attributes[guest.vm] = (made, plain(made))
            guest.build()

        self.recorder.begin()
        refusal = self.act("create", make)
        if refusal is not None:
            self.found("launch", f"a VM could not be made: {refusal}")
        else:
            self.finalize(self.guests[-1])
        self.look()

    def finalize(self, guest: ModelGuest) -> None:
        """Finalize a VM, which must come to the same after a kill."""
        if guest.ops.finalize is None:
            return
        alone = self.twin is None
        if alone:
            self.restart()
        refusal = self.act("finalize", guest.finalize)
        if refusal is not None:
            self.found("launch", f"a VM could not be finalized: {refusal}")
        if alone:
            self.part()

    def tear_down(self, guest: ModelGuest) -> None:
        """End a VM and its file."""
        for refused in guest.teardown():
            self.found("teardown", refused)
        self.poisoned |= guest.poisoned

    def baseline(self, capacity: int) -> None:
        """Compare what is left with an empty host."""
        for text in left(self.core, self.poisoned, self.may_leak):
            self.found("frames", text)
        after = self.capacity()
        if after != capacity:
            self.found("keys", f"{capacity} VMs could be made at first, {after} now")

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
        self.attributes[guest.vm] = (made, plain(made))
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

    # --- a restart ---------------------------------------------------------------------------
    def restart(self) -> None:
        """Reopen the engine as after a kill; from here on guests are driven in both."""
        op, self.op = self.op, "restart"
        try:
            self.twin = Twin(self.engine, self.kept)
        except Exception as error:
            self.found("restart", f"the engine cannot be reopened: {error!r}")
        else:
            self.report.restarts += 1
            # asked of the other engine's consumers
            self.recorder.calls["resume"] += sum(g.ops.resume is not None for g in self.guests)
            self.go_through(Both(self.engine, self.twin, lambda text: self.found("restart", text)))
            for text in self.twin.different():
                self.found("restart", text)
        self.op = op

    def part(self) -> None:
        """Compare the two once more, and have guests be driven in the one alone."""
        if self.twin is None:
            return
        for text in self.twin.strayed():
            self.found("restart", text)
        self.twin.close()
        self.twin = None
        self.go_through(self.engine)

    def go_through(self, door: Both | Engine) -> None:
        """Have guests be driven through an engine, or through two."""
        self.door = cast("Engine", door)
        for guest in self.guests:
            guest.engine = self.door

    def trip(self) -> tuple[str, str]:
        """Choose the op that is to raise in this step, "" for none: each before and after."""
        waiting = [op for op in self.ops if self.recorder.undone[op] < 2 and op not in NOT_TRIPPED]
        # the twin's ops are not broken with it
        if not waiting or self.rng.random() < 0.5 or self.twin is not None:
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
            after = plain(made)
            names = changed(before, after)
            if names:
                self.found("tables", f"vm/{vm}: the consumer keeps state in {names}")
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
        """Note a finding, once."""
        if not self.report.full and (rule, text) not in self.known:
            self.known.add((rule, text))
            finding = Finding(rule, self.op, self.report.steps, self.seed, text)
            self.report.findings.append(finding)
