"""The points at which fault rules can strike: what they are, and what a rule may do at them.

Owns the list. Ops are the ops table's, a vendor's points those that its plugin declares or has
passed; the engine's own are the race of a fault, and the steps at which an operation lets go of
the lock. Only these can be delayed: everywhere else a transaction is open and the lock is held, and
a delay there would stop the whole host instead of one operation.
"""

from __future__ import annotations

import inspect
from enum import Enum

from msgspec import Struct

from rmemd.consumers.guard import INJECTABLE
from rmemd.engine.core import Core
from rmemd.engine.fault import LOST_RACE
from rmemd.engine.faultrules import STEP, Rule, require_sound
from rmemd.errors import BAD_REQUEST, POINT_NOT_A_STEP
from rmemd.hooks.spec import ConsumerSpec

RACE = "an invalidation comes between a fault's look-up and its installation"


class Sort(Enum):
    """What sort of point it is; the values are those of the API's FaultPointKind."""

    OP = 1
    RACE = 2
    STEP = 3
    VENDOR = 4


class Pause(Struct, frozen=True):
    """A step: what happens to the operation there, and whether it is one VM's."""

    means: str
    of_vm: bool = True


class Point(Struct, frozen=True):
    """A point, whose it is ("" for the engine's), and how often it was passed since the start."""

    name: str
    sort: Sort
    means: str
    plugin: str = ""
    passages: int = 0


STEPS = {
    "step/guest": Pause("between two steps of a guest"),
    "step/fault-looked-up": Pause("a fault has its pages and has not mapped them"),
    "step/populate": Pause("initial pages are written before they count"),
    "step/convert": Pause("bytes are carried over in a conversion in place"),
    "step/convert-discard": Pause("the half that no longer counts is destroyed"),
    "step/move-slot": Pause("a memslot is about to move"),
    "step/punch-shared": Pause("the shared half of a punched range is freed"),
    "step/userfault-copy": Pause("a page fault handler's bytes are written"),
    "step/migrate": Pause("pages are copied to their new frames"),
    "step/scrub": Pause("the bytes of freed frames are destroyed", of_vm=False),
    "step/load-import": Pause("a plugin's code is imported", of_vm=False),
    "step/reload-import": Pause("a plugin's code is imported anew", of_vm=False),
}


def every(core: Core) -> list[Point]:
    """Return every point that is known, in order of sort; a vendor's by its plugin and name."""
    passed = core.rules.passed
    known = [Point(op, Sort.OP, _first_line(op), "", passed.get(op, 0)) for op in INJECTABLE]
    known.append(Point(LOST_RACE, Sort.RACE, RACE, "", passed.get(LOST_RACE, 0)))
    known += [
        Point(name, Sort.STEP, step.means, "", passed.get(name, 0)) for name, step in STEPS.items()
    ]
    return known + _vendors(core, {point.name for point in known})


def _vendors(core: Core, ours: set[str]) -> list[Point]:
    passed = core.rules.passed
    offers = core.registry.offers.values()
    declared = {(offer.platform, name) for offer in offers for name in offer.variant.points}
    # of a point that nobody declares, nobody knows the plugin: VMs of several may have passed it
    loose = passed.keys() - ours - {name for _, name in declared}
    return [
        Point(name, Sort.VENDOR, "", plugin, passed.get(name, 0))
        for plugin, name in sorted(declared | {("", name) for name in loose})
    ]


def _first_line(op: str) -> str:
    said = inspect.getdoc(getattr(ConsumerSpec, op)) or ""
    return said.partition("\n")[0].replace("``", "")


def require_possible(rule: Rule) -> None:
    """Check that a rule is sound, and can do at its point what it is to do.

    A point that is not known may be a vendor's: a rule that makes it go wrong is taken.

    Raises:
        InvalidArgument: BAD_REQUEST, POINT_NOT_A_STEP.
    """
    require_sound(rule)
    step = STEPS.get(rule.point)
    if step is None and rule.point.startswith(STEP):
        known = ", ".join(STEPS)
        raise BAD_REQUEST(f"no step {rule.point[:80]!r}; there are: {known}", field="rule.point")
    if step is None:
        if rule.delay_ms:
            raise POINT_NOT_A_STEP(
                f"{rule.point[:80]} cannot be delayed; what can: {', '.join(STEPS)}",
                field="rule.delay_ms", rule="a transaction is open there, under the lock",
            )  # fmt: skip
        return
    if rule.error:
        raise BAD_REQUEST(
            f"{rule.point} is a step, where nothing is asked of anybody: it can only be delayed",
            field="rule.error",
        )
    if rule.vm and not step.of_vm:
        raise BAD_REQUEST(f"{rule.point} is a step of no VM in particular", field="rule.vm")
