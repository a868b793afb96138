"""What a run of the conformance kit found."""

from __future__ import annotations

from collections import Counter

from msgspec import Struct, field

FINDINGS_MAX = 20


class Finding(Struct, frozen=True):
    """A rule that a consumer broke: at which step of which seed, doing what, and how."""

    rule: str
    op: str
    step: int
    seed: int
    text: str

    def __str__(self) -> str:
        """Return it as one line."""
        return f"[{self.rule}] step {self.step} ({self.op}), seed {self.seed}: {self.text}"


class Report(Struct):
    """What a run of the kit found.

    Attributes:
        variant: the consumer.
        findings: what is wrong, at most ``FINDINGS_MAX``; empty for a consumer that passes.
        ops_called: how often each op, and each op of the platform, was called.
        undone: how often each op was made to raise, and its transaction undone.
        unreached: ops that the consumer has and that the run never called.
        steps: how many steps were taken.
        restarts: how often the engine was reopened as after a kill, and went on as the other did.
    """

    variant: str
    findings: list[Finding] = field(default_factory=list)
    ops_called: Counter[str] = field(default_factory=Counter)
    undone: Counter[str] = field(default_factory=Counter)
    unreached: frozenset[str] = frozenset()
    steps: int = 0
    restarts: int = 0

    @property
    def full(self) -> bool:
        """Return whether as much was found as is kept."""
        return len(self.findings) >= FINDINGS_MAX

    def require(self) -> None:
        """Pass only if nothing was found.

        Raises:
            AssertionError: with every finding.
        """
        if self.findings:
            lines = "\n".join(map(str, self.findings))
            raise AssertionError(f"{self.variant} does not conform:\n{lines}")
