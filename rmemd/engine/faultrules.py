"""Fault rules: make a named point go wrong at its Nth passage.

Owns the rules that wait. They are test surgery, not state: a passage counts even if the
transaction that passed is undone, otherwise a rule that makes an operation fail would never end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from rmemd.errors import BAD_REQUEST, NO_SUCH_RULE

TEXT_MAX = 256


@dataclass(frozen=True)
class Rule:
    """At ``point`` of VM ``vm`` (0: any), from the ``nth`` passage on, ``times`` times."""

    rule: int
    vm: int
    point: str
    error: str
    nth: int = 1
    times: int = 1


class FaultRules:
    """The rules that wait, oldest first."""

    def __init__(self) -> None:
        self._rules: dict[int, Rule] = {}
        self._last = 0

    def add(self, vm: int, point: str, error: str, nth: int, times: int) -> Rule:
        """Add a rule.

        Raises:
            InvalidArgument: BAD_REQUEST.
        """
        must = f"a number positive, a text at most {TEXT_MAX} characters"
        for field, bad in (
            ("point", not 0 < len(point) <= TEXT_MAX),
            ("error", not 0 < len(error) <= TEXT_MAX),
            ("nth", nth < 1),
            ("times", times < 1),
        ):
            if bad:
                raise BAD_REQUEST(f"{field} must be given, {must}", field=f"rule.{field}")
        self._last += 1
        rule = Rule(self._last, vm, point, error, nth, times)
        self._rules[rule.rule] = rule
        return rule

    def remove(self, rule: int) -> None:
        """Remove a rule.

        Raises:
            NotFound: NO_SUCH_RULE.
        """
        if self._rules.pop(rule, None) is None:
            raise NO_SUCH_RULE(f"no fault rule {rule}", field="rule")

    def all(self) -> list[Rule]:
        """Return the rules that wait."""
        return list(self._rules.values())

    def waits(self, vm: int, point: str) -> bool:
        """Return whether a rule waits at a point of a VM."""
        return any(r.point == point and r.vm in (0, vm) for r in self._rules.values())

    def passage(self, vm: int, point: str) -> str:
        """Count a passage; return what goes wrong at it, "" for nothing."""
        error = ""
        for rule in self.all():
            if rule.point != point or rule.vm not in (0, vm):
                continue
            if rule.nth > 1:
                self._rules[rule.rule] = replace(rule, nth=rule.nth - 1)
                continue
            error = error or rule.error
            if rule.times > 1:
                self._rules[rule.rule] = replace(rule, times=rule.times - 1)
            else:
                del self._rules[rule.rule]
        return error
