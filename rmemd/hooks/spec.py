"""The hooks, version 1: what a consumer may implement and what leaving one out means.

Owns the signatures (``ConsumerSpec``, ``PlatformSpec``), the markers and the version. A consumer
declares support by implementing a hook and in no other way: what is absent is NULL.

Hooks are called by the engine under its lock, inline; they read arrays, write only through ``tx``
and name bytes to it. To decline, a hook raises a refusal of ``rmemd.errors`` (``Refused``,
``Busy``...); the engine then undoes whatever the hook wrote. Any other exception is a fault of the
plugin: the whole operation is undone and the plugin is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import pluggy

from rmemd.hooks.hooktx import HookTx, HostContext, VmContext
from rmemd.hooks.state import State
from rmemd.hooks.types import (
    AccessAnswer,
    CallAnswer,
    Content,
    GuestCall,
    HostAccess,
    HostAnswer,
    PageStates,
    Pin,
    Populated,
    Runs,
    Variant,
    Why,
)
from rmemd.units import I64, U8, Bools

PROJECT = "rmemd"
HOOKS_VERSION = 1
ENTRY_POINTS = "rmemd.platforms.v1"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
_first = hookspec(firstresult=True)


class ConsumerSpec(Protocol):
    """The notifier ops of one VM's vendor back end. ``runs`` are gfn to pfn and in pages."""

    @_first
    def invalidate_start(self, tx: HookTx, runs: Runs, why: Why) -> None:
        """Unmap ``runs``: after it returns the vendor lets no vCPU reach them.

        For ``Why.MIGRATE`` only block: the entry stays, so that migrate_folio can relocate it.
        ``runs`` are the mapped private pages of the range and may be empty. When NULL: not
        allowed, the pair is mandatory. Source: restrictedmem_notifier_ops.invalidate_start.
        """

    @_first
    def invalidate_end(self, tx: HookTx, runs: Runs, why: Why, ok: bool) -> None:
        """End the bracket; every start has one. ``ok`` False: the change did not happen.

        For ``Why.MIGRATE``, ``runs`` name the pfns mapped from now on; with ``ok`` False unblock
        them. When NULL: not allowed, the pair is mandatory.
        """

    @_first
    def prepare(self, tx: HookTx, runs: Runs) -> None:
        """A page was found, and is about to be mapped. When NULL: nothing is needed."""

    @_first
    def map(self, tx: HookTx, runs: Runs) -> None:
        """Enter ``runs`` in the vendor's tables. When NULL: the engine's mirror suffices."""

    @_first
    def pin(self, tx: HookTx, runs: Runs) -> Pin:
        """Say what is held while ``runs`` stay mapped; the engine records it in the ledger.

        When NULL: no lasting reference.
        """

    @_first
    def unpin(self, tx: HookTx, runs: Runs) -> Bools:
        """``runs`` were unmapped; the engine drops what pin() held. NULL exactly if pin is.

        True marks a page that the vendor could not take out of its tables: its hold stays.
        """

    @_first
    def migrate_folio(self, tx: HookTx, gfns: I64, src: I64, dst: I64) -> None:
        """Move private pages from ``src`` to ``dst`` frames, by ``tx.relocate``.

        Called between the pair, with references checked. When NULL: the folios are unmovable and
        the consumer is never asked.
        """

    @_first
    def convert(self, tx: HookTx, runs: Runs, to_private: bool) -> Content:
        """In-place conversion: say what the pages hold afterwards. When NULL: ENOTTY.

        Called between the pair, for pages that are present.
        """

    @_first
    def populate(self, tx: HookTx, runs: Runs, kinds: U8, measure: bool, source: U8) -> Populated:
        """Take initial pages in; ``kinds`` are PageKind per page, ``source`` (n, 4096) uint8.

        Name the bytes with ``tx.copy_in``. When NULL: the vendor has no launch population.
        """

    @_first
    def finalize(self, tx: HookTx) -> bytes:
        """Close the measurement and return it. When NULL: the VM has none and needs none."""

    @_first
    def enter(self, tx: HookTx, vcpu: int) -> None:
        """A vCPU enters the guest. When NULL: no TLB state is kept."""

    @_first
    def leave(self, tx: HookTx, vcpu: int) -> None:
        """A vCPU left the guest. NULL exactly if enter is."""

    @_first
    def guest_access(self, tx: HookTx, vcpu: int, runs: Runs, write: bool) -> AccessAnswer:
        """Judge a guest access to mapped private pages, page by page. When NULL: allowed."""

    @_first
    def guest_call(
        self, tx: HookTx, vcpu: int, call: GuestCall, gfns: I64, level: int
    ) -> CallAnswer:
        """Answer a guest call over consecutive ``gfns`` (level 0: 4K, 1: 2M).

        When NULL: the call is unknown to the vendor.
        """

    @_first
    def error(self, tx: HookTx, runs: Runs, consumed: bool) -> str:
        """A frame is poisoned: return "" if the VM lives on, else why it is lost.

        ``consumed`` says that the guest has read the poison (an integrity failure included);
        otherwise the host found it first. When NULL: the VM is killed.
        """

    @_first
    def page_state(self, gfns: I64, pfns: I64) -> PageStates:
        """Name the vendor's state of pages; reads only. When NULL: mapped or not is all."""

    @_first
    def export_state(self) -> State:
        """Return all that the consumer keeps; reads only. When NULL: no swap.

        No vCPU is in the guest, and nothing of the VM is in progress.
        """

    @_first
    def import_state(self, tx: HookTx, state: State) -> None:
        """Take over what another object exported, into tables that are empty. NULL if export is.

        The platform's tables are as they were, ids and keys included: take nothing host-wide.
        """

    @_first
    def resume(self, read: Callable[[I64], U8]) -> str:
        """Another process kept this VM and was killed: rebuild what is not in tables.

        ``read`` gives the guest's own plaintext, uint8 (n, 4096), of mapped gfns. Return "", or
        what is lost, for the log. When NULL: all there is, is in tables.
        """


class PlatformSpec(Protocol):
    """A vendor's host-wide half: one object per daemon."""

    @_first
    def variants(self) -> Sequence[Variant]:
        """Name the variants that make_consumer takes; the first is the default."""

    @_first
    def start(self, host: HostContext) -> None:
        """Create the platform's tables."""

    @_first
    def make_consumer(
        self, vm: VmContext, tx: HookTx, variant: str, config: Mapping[str, str]
    ) -> object:
        """Make the consumer of a new VM: an object with the hooks that it supports."""

    @_first
    def destroy_consumer(self, tx: HookTx, consumer: object) -> None:
        """The VM is gone and its pages are unmapped: give back its HKID or ASID."""

    @_first
    def host_access(self, tx: HookTx, pfns: I64, access: HostAccess) -> HostAnswer:
        """Say what the CPU makes of a host access to frames. When NULL: raw bytes, unchecked."""

    @_first
    def free(self, tx: HookTx, pfns: I64) -> Bools:
        """Frames go back to the host: reclaim them; True marks one that cannot be given back.

        Such a frame is leaked: counted and never reused. When NULL: nothing to reclaim.
        """


CONSUMER_PAIRS: tuple[tuple[str, str], ...] = (
    ("pin", "unpin"), ("enter", "leave"), ("export_state", "import_state"),
)  # fmt: skip
CONSUMER_MANDATORY: tuple[str, ...] = ("invalidate_start", "invalidate_end")
PLATFORM_MANDATORY: tuple[str, ...] = ("variants", "start", "make_consumer", "destroy_consumer")
