"""What a recording of operations, and their replay, hear of the engine.

Owns ``Tracer``, which ``Core`` tells at the few points where an operation takes the lock, commits,
or meets what is no state: bytes that clients share, a hook's time, the guest's own comparisons. An
engine that is not traced pays one comparison with None at each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rmemd.engine.driver import Step
    from rmemd.engine.waits import Operation
    from rmemd.hooks.tx import Tx
    from rmemd.store.memfd import Memfd
    from rmemd.units import I64, Bools


class Tracer(Protocol):
    """Told under the engine's lock, save for ``shared``, and for what that returns."""

    def begun(self, operation: Operation) -> None:
        """An operation has the lock for the first time."""

    def resumed(self, operation: Operation, step: Step) -> None:
        """An operation has the lock again, after a step that let it go."""

    def ended(self, operation: Operation) -> None:
        """An operation has come to its end, refused or not."""

    def committing(self) -> None:
        """A transaction is about to freeze what is overdue, and to commit."""

    def committed(self, tx: Tx) -> None:
        """A transaction has committed."""

    def shared(self, file: int, memfd: Memfd) -> Memfd:
        """Return what an operation is to reach a file's shared bytes through."""

    def compared(self, vm: int, gfns: I64, pfns: I64, wrong: Bools) -> Bools:
        """Return which private pages a guest finds different from what it expects."""
