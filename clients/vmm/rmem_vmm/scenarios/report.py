"""What a scenario found: steps with what was answered and what must be, and figures.

Owns the judgement of one step: found against wanted. Everything found is from the daemon, a guest
or a device; what is wanted follows from the rules, never from the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

Figure = int | str


@dataclass(frozen=True)
class Step:
    """One step: what was tried, what was answered, and whether that is right."""

    what: str
    said: str
    ok: bool
    wanted: str = ""


@dataclass
class Report:
    """One guest's run of a scenario.

    Attributes:
        who: the consumer, or the guest's part in the scenario.
        steps: what happened, in order.
        figures: numbers for people and for JSON.
    """

    who: str
    steps: list[Step] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Return whether every step is as it must be."""
        return bool(self.steps) and all(step.ok for step in self.steps)

    def expect(self, what: str, found: Any, wanted: Any, said: str = "") -> None:
        """Record a step that must find ``wanted``; ``said`` is what people read of it."""
        ok = found == wanted
        self.steps.append(Step(what, said or str(found), ok, "" if ok else str(wanted)))

    def require(self, what: str, ok: bool, said: str) -> None:
        """Record a step that is right if ``ok``."""
        self.steps.append(Step(what, said, ok))

    def note(self, what: str, said: str) -> None:
        """Record what has no right or wrong: vendors differ here."""
        self.steps.append(Step(what, said, True))

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "who": self.who,
            "ok": self.ok,
            "steps": [
                {"what": s.what, "said": s.said, "ok": s.ok, "wanted": s.wanted} for s in self.steps
            ],
            "figures": self.figures,
        }


@dataclass(frozen=True)
class Settings:
    """What scenarios are run with.

    Attributes:
        socket_dir: the daemon's directory.
        seed: of what guests write.
        vcpus: vCPUs of guests that may have several.
        conversions: conversions of one vCPU in a storm.
        bytes_moved: bytes that go through shared memory.
    """

    socket_dir: str
    seed: int = 1
    vcpus: int = 2
    conversions: int = 64
    bytes_moved: int = 64 << 20


@dataclass(frozen=True)
class Scenario:
    """A scenario by its name.

    Attributes:
        name: as the command line has it.
        summary: one sentence.
        consumers: whom it runs with, by vendor.
        run: runs it, and yields one report per guest.
    """

    name: str
    summary: str
    consumers: dict[str, str]
    run: Callable[[Settings, tuple[str, ...]], Iterable[Report]]
