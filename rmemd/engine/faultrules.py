"""Fault rules: make a named point go wrong, or take its time, at its Nth passage.

Owns the rules that wait. They are test surgery, not state: a passage counts even if the
transaction that passed is undone, otherwise a rule that makes an operation fail would never end.
What is left to chance is drawn from the seed, the rule's handle and the number of its passage, so
that the same requests meet the same faults. Which points there are is ``faultpoints``'.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from hashlib import blake2b

from msgspec import Struct
from msgspec.structs import replace

from rmemd.errors import BAD_REQUEST, NO_SUCH_RULE

TEXT_MAX = 256
# longer than any deadline that a client has by default, and short enough to wait out
DELAY_MAX_MS = 60_000
# a plugin may name its points as it likes, without end
POINTS_MAX = 1024
# an op and a step may have one name
STEP = "step/"


@cache
def at_step(name: str) -> str:
    """Return the point at which a step can be delayed: "fault: looked up" is step/fault-looked-up.

    Args:
        name: of the ``Step``, of which there are a few.
    """
    return STEP + re.sub(r"\W+", "-", name)


class Rule(Struct, frozen=True):
    """At ``point`` of VM ``vm`` (0: any), from the ``nth`` passage on, ``times`` times.

    Attributes:
        error: what goes wrong there; "" where the rule delays.
        probability: of each passage from the nth on to be hit, above 0 and up to 1.
        delay_ms: how long a passage takes then; 0 where the rule makes it go wrong.
        passages: passages so far.
        hits: those that were hit; the rule is gone at the last.
    """

    rule: int
    vm: int
    point: str
    error: str
    nth: int = 1
    times: int = 1
    probability: float = 1.0
    delay_ms: int = 0
    passages: int = 0
    hits: int = 0


class FaultRules:
    """The rules that wait, oldest first.

    Attributes:
        passed: how often each point was passed since the start, rule or not.
        waiting: the rules by their handles.
    """

    def __init__(self, seed: int = 0) -> None:
        self.waiting: dict[int, Rule] = {}
        self._last = 0
        self._seed = seed
        self.passed: defaultdict[str, int] = defaultdict(int)

    def add(self, rule: Rule) -> Rule:
        """Add a rule, under a handle of its own; return it.

        Raises:
            InvalidArgument: BAD_REQUEST.
        """
        require_sound(rule)
        self._last += 1
        added = replace(rule, rule=self._last, passages=0, hits=0)
        self.waiting[added.rule] = added
        return added

    def restore(self, rules: Iterable[Rule], last: int) -> None:
        """Have these rules wait as they are; ``last`` is the last handle that was given."""
        self.waiting = {rule.rule: rule for rule in rules}
        self._last = last

    @property
    def last(self) -> int:
        """Return the last handle that was given."""
        return self._last

    def remove(self, rule: int) -> None:
        """Remove a rule.

        Raises:
            NotFound: NO_SUCH_RULE.
        """
        if self.waiting.pop(rule, None) is None:
            raise NO_SUCH_RULE(f"no fault rule {rule}", field="rule")

    def all(self) -> list[Rule]:
        """Return the rules that wait."""
        return list(self.waiting.values())

    def waits(self, vm: int, point: str) -> bool:
        """Return whether a rule waits at a point of a VM."""
        return any(r.point == point and r.vm in (0, vm) for r in self.waiting.values())

    def passage(self, vm: int, point: str) -> str:
        """Count a passage; return what goes wrong at it, "" for nothing."""
        hits = [rule.error for rule in self._pass(vm, point)]
        return hits[0] if hits else ""

    def delay(self, vm: int, step: str) -> float:
        """Count a passage of a step, by its name; return the seconds that it takes longer."""
        return sum(rule.delay_ms for rule in self._pass(vm, at_step(step))) / 1000

    def _pass(self, vm: int, point: str) -> list[Rule]:
        if point in self.passed or len(self.passed) < POINTS_MAX:
            self.passed[point] += 1
        return list(self._hit(vm, point)) if self.waiting else []

    def _hit(self, vm: int, point: str) -> Iterator[Rule]:
        for rule in self.all():
            if rule.point != point or rule.vm not in (0, vm):
                continue
            passages = rule.passages + 1
            hit = passages >= rule.nth and self._draws(rule, passages)
            now = replace(rule, passages=passages, hits=rule.hits + hit)
            self.waiting[rule.rule] = now
            if now.hits == rule.times:
                del self.waiting[rule.rule]
            if hit:
                yield now

    def _draws(self, rule: Rule, passage: int) -> bool:
        """Return whether chance has it: a pure function of seed, rule and passage."""
        if rule.probability == 1:
            return True
        of = f"{self._seed} {rule.rule} {passage}"
        drawn = blake2b(of.encode(), digest_size=8).digest()
        return int.from_bytes(drawn, "little") < rule.probability * 2.0**64


def require_sound(rule: Rule) -> None:
    """Check what a rule says for itself, whatever its point is.

    Raises:
        InvalidArgument: BAD_REQUEST.
    """
    for field, bad, must in (
        ("point", not 0 < len(rule.point) <= TEXT_MAX, f"given, {TEXT_MAX} characters at most"),
        ("error", len(rule.error) > TEXT_MAX, f"{TEXT_MAX} characters at most"),
        ("nth", rule.nth < 1, "positive"),
        ("times", rule.times < 1, "positive"),
        # written so that it refuses what is no number, too
        ("probability", not 0 < rule.probability <= 1, "above 0, and 1 at most"),
        ("delay_ms", not 0 <= rule.delay_ms <= DELAY_MAX_MS, f"0 to {DELAY_MAX_MS}"),
        ("error", bool(rule.error) == bool(rule.delay_ms), "given, unless delay_ms is; not both"),
    ):
        if bad:
            raise BAD_REQUEST(f"{field} must be {must}", field=f"rule.{field}")
