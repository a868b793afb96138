"""The smallest consumer there can be: the mandatory pair, and what a swap needs; the rest is NULL.

What a VM of it can and cannot do shows what the engine makes of NULL, op by op.
Differs: it stands for no vendor; its private memory is plain.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rmemd.errors import NO_SUCH_CONSUMER
from rmemd.hooks import (
    HookTx,
    HostContext,
    Runs,
    State,
    Variant,
    VmContext,
    Why,
    export_tables,
    hookimpl,
    import_tables,
)

VARIANT = "null"
SCHEMA = ("null", 1)


class NullGuest:
    """A consumer that has the pair, and no state for a swap to carry over."""

    @hookimpl
    def invalidate_start(self, tx: HookTx, runs: Runs, why: Why) -> None:
        """Keep nothing: clearing the mirror is the whole unmap."""

    @hookimpl
    def invalidate_end(self, tx: HookTx, runs: Runs, why: Why, ok: bool) -> None:
        """Keep nothing."""

    @hookimpl
    def export_state(self) -> State:
        """Have nothing to give."""
        return export_tables(*SCHEMA)

    @hookimpl
    def import_state(self, tx: HookTx, state: State) -> None:
        """Have nothing to take, but of nobody else."""
        import_tables(tx, state, *SCHEMA)


class NullPlatform:
    """A host without a vendor."""

    @hookimpl
    def variants(self) -> Sequence[Variant]:
        """Name the one variant."""
        return [Variant(VARIANT, "the mandatory pair, and no op that is about pages")]

    @hookimpl
    def start(self, host: HostContext) -> None:
        """Keep no tables."""

    @hookimpl
    def make_consumer(
        self, vm: VmContext, tx: HookTx, variant: str, config: Mapping[str, str]
    ) -> object:
        """Make a guest whose memory is plain."""
        if variant != VARIANT:
            raise NO_SUCH_CONSUMER(f"null has no variant {variant!r}")
        if not vm.importing:
            tx.use_key(tx.new_key(plain=True))
        return NullGuest()

    @hookimpl
    def destroy_consumer(self, tx: HookTx, consumer: object) -> None:
        """Have nothing to give back."""
