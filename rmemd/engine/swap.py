"""A VM's consumer replaced while it is bound and its vCPUs run.

Owns the swap: quiesce, export, make the new one, import, compare, reclassify the pins, flip. It is
one transaction, so that whatever raises leaves the old consumer as if nothing had happened. Bytes,
frames, keys and the platform's own tables stay where they are.

Which loss of an op is unsafe, and because of which live state, is ``engine.swaprules``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from rmemd.consumers.guard import Consumer, Platform
from rmemd.consumers.registry import Offer
from rmemd.engine import frames
from rmemd.engine.bracket import pin_entries, pin_entry
from rmemd.engine.core import Core
from rmemd.engine.driver import Steps
from rmemd.engine.fault import charge_memlock
from rmemd.engine.migrate import governed
from rmemd.engine.swaprules import files_of, needed, strays
from rmemd.errors import (
    OP_NOT_IMPLEMENTED_BY_CONSUMER,
    PLUGIN_NONSENSE,
    SWAP_FOREIGN,
    SWAP_STATE_LEFT,
    SWAP_UNSAFE,
)
from rmemd.hooks.state import TableState, capture, same_table
from rmemd.hooks.tables import Dense
from rmemd.hooks.tx import Tx
from rmemd.hooks.types import Pin
from rmemd.model.vms import Vm
from rmemd.units import I64, MAX_GFN, distinct

MICROSECONDS = 1_000_000


class Swapped(Struct, frozen=True):
    """What a swap changed.

    Attributes:
        gained: ops that are implemented now and were NULL; ``lost`` the other way about.
        kind: of the state that was carried over; ``version`` of its schema; ``entries`` of it.
        released_pages: pages that the consumer held and holds no more.
        held_pages: pages that it holds and did not hold.
        reclassified_pages: folios that could move and cannot, or the other way about.
        pause_us: how long the VM stood still, in microseconds.
    """

    vm: int
    previous: str
    consumer: str
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    kind: str
    version: int
    entries: int
    released_pages: int
    held_pages: int
    reclassified_pages: int
    pause_us: int = 0


class Successor(Struct, frozen=True):
    """A consumer that stands ready in an open transaction, and what its swap changes."""

    consumer: Consumer
    swapped: Swapped


def swap_consumer(core: Core, number: int, name: str, config: Mapping[str, str]) -> Steps[Swapped]:
    """Replace a VM's consumer by one called ``name`` ("": its own, made anew). ALL.

    Raises:
        RmemError: it is refused, or a hook failed; the old consumer goes on.
    """
    yield from ()
    vm = core.vms.alive(number)
    offer = core.registry.offer(name or vm.info.consumer)
    require_quiet(core, vm)
    begun = core.guard.clock()
    with core.tx("swap consumer") as tx:
        platform = core.registry.platforms[offer.platform]
        successor = succeed(core, tx, vm, platform, offer, config)
    return flip(core, [successor], begun)[0]


def require_quiet(core: Core, vm: Vm) -> None:
    """Have the operation wait while anything of the VM, or of its files, is in progress."""
    core.ranges.require_idle("vm", vm.info.vm, 0, MAX_GFN)
    for file in files_of(core, vm):
        core.ranges.require_idle("file", file.info.file, 0, file.info.size_pages)


def flip(core: Core, successors: list[Successor], begun: float) -> list[Swapped]:
    """Have the successors be the consumers; their transaction is committed."""
    for one in successors:
        core.consumers[one.consumer.vm] = one.consumer
        # a fault that looked its page up before asks the new consumer
        core.ranges.invalidated(one.consumer.vm)
    pause = round((core.guard.clock() - begun) * MICROSECONDS)
    return [replace(one.swapped, pause_us=pause) for one in successors]


def succeed(
    core: Core,
    tx: Tx,
    vm: Vm,
    platform: Platform,
    offer: Offer,
    config: Mapping[str, str],
) -> Successor:
    """Make a VM's next consumer in an open transaction; the old one is asked no more after it.

    Raises:
        InvalidArgument: SWAP_FOREIGN, BAD_REQUEST.
        Unsupported: OP_NOT_IMPLEMENTED_BY_CONSUMER; export_state is NULL.
        Refused: SWAP_UNSAFE, SWAP_SCHEMA.
        PluginFault: SWAP_STATE_LEFT, or a hook failed.
    """
    old = core.consumer(vm)
    _require_kin(vm, offer)
    options = _options(vm, offer, config)
    _require_op(old, "export_state")
    core.kick(tx, vm.info.vm)
    state = old.export_state(tx)
    held = _tables(core, vm)
    mark = tx.mark()
    key = core.host.vm_keys.get(vm.info.vm)
    for name in held:
        tx.destroy(name)
    new = core.registry.make_of(tx, vm.info.vm, platform, offer.variant, options, importing=True)
    _require_op(new, "import_state")
    lost = _only(old, new)
    _require_safe(core, vm, lost, new, held)
    new.call(tx, "import_state", state)
    _compare(held, _tables(core, vm), new)
    if len(tx.byte_ops) != mark.byte_ops or core.host.vm_keys.get(vm.info.vm) != key:
        raise PLUGIN_NONSENSE(
            f"{new.name} named bytes, or another key, while it took over", where=new.name
        )
    released, taken = _rehold(core, tx, vm, old, new)
    core.vms.update(tx, core.vms.get(vm.info.vm), consumer=offer.variant.name, config=options)
    swapped = Swapped(
        vm.info.vm, vm.info.consumer, offer.variant.name, _only(new, old), lost, state.kind,
        state.version, state.entries, released, taken, _reclassified(core, vm, old, new),
    )  # fmt: skip
    _tell(tx, swapped)
    return Successor(new, swapped)


def _tell(tx: Tx, swapped: Swapped) -> None:
    tx.emit(
        "consumer_swapped", vm=swapped.vm, previous=swapped.previous, consumer=swapped.consumer,
        gained=" ".join(swapped.gained), lost=" ".join(swapped.lost),
        released_pages=swapped.released_pages, held_pages=swapped.held_pages,
    )  # fmt: skip


# --- what can follow what --------------------------------------------------------------------
def _require_kin(vm: Vm, offer: Offer) -> None:
    """What the VM was made with must be what the variant makes."""
    info, variant = vm.info, offer.variant
    wanted = "in-place" if info.in_place else "attributes"
    for differs, what in (
        (offer.platform != info.platform, f"of platform {offer.platform}, not {info.platform}"),
        (variant.private_memory != info.private_memory, "for VMs with other memory"),
        (wanted not in variant.personalities, f"unable to convert by {wanted}"),
    ):
        if differs:
            raise SWAP_FOREIGN(
                f"{variant.name} is {what}; {info.label} has {info.consumer}", field="consumer",
                state=info.consumer,
            )  # fmt: skip


def _options(vm: Vm, offer: Offer, config: Mapping[str, str]) -> dict[str, str]:
    """Return the options asked for, else those of the VM that the variant knows."""
    if config:
        return dict(config)
    known = offer.variant.options
    return {key: value for key, value in vm.info.config.items() if key in known}


def _require_op(consumer: Consumer, op: str) -> None:
    if getattr(consumer.ops, op) is None:
        raise OP_NOT_IMPLEMENTED_BY_CONSUMER(
            f"{consumer.name} has no {op}, so it cannot be swapped", state=f"{op} NULL",
            where=consumer.name,
        )  # fmt: skip


def _only(one: Consumer, other: Consumer) -> tuple[str, ...]:
    """Return the ops that one has and the other has not."""
    theirs = other.ops.implemented()
    return tuple(op for op, there in one.ops.implemented().items() if there and not theirs[op])


def _require_safe(
    core: Core, vm: Vm, lost: tuple[str, ...], new: Consumer, held: Mapping[str, TableState]
) -> None:
    for op in lost:
        why = needed(op, core, vm, held)
        if why:
            raise SWAP_UNSAFE(
                f"{new.name} has no {op}, and {vm.info.label} needs it: {why}", state=why,
                rule=f"a swap must not lose {op} while live state relies on it", where=new.name,
            )  # fmt: skip


# --- the state -------------------------------------------------------------------------------
def _tables(core: Core, vm: Vm) -> dict[str, TableState]:
    """Return what the consumer's own tables hold, by their full names."""
    prefix = f"vm/{vm.info.vm}/{vm.info.platform}/"
    return {
        name: capture(table)
        for name, table in core.space.tables.items()
        if name.startswith(prefix) and not isinstance(table, Dense)
    }


def _compare(
    before: Mapping[str, TableState], after: Mapping[str, TableState], new: Consumer
) -> None:
    """After an import the tables hold exactly what they held: nothing left over or made up."""
    for name in sorted(before.keys() | after.keys()):
        if not same_table(before.get(name), after.get(name)):
            raise SWAP_STATE_LEFT(
                f"{new.name}: {name} does not hold what it held before the swap",
                state=name.split("/", 3)[-1], where=f"{new.name}.import_state",
            )  # fmt: skip


# --- pins ------------------------------------------------------------------------------------
def _rehold(core: Core, tx: Tx, vm: Vm, old: Consumer, new: Consumer) -> tuple[int, int]:
    """Give the mapped private pages the holds that the new consumer wants, and no others.

    ``unpin`` is not asked: it is about pages that were unmapped, and these stay mapped. A hold on
    any other page is one that the old consumer could not let go (or a fault's, under way); only a
    consumer with an ``unpin`` can have it.

    Returns:
        How many pages are held no more, and how many are held that were not.
    """
    private, _ = vm.mapped(0, MAX_GFN)
    pfns = distinct(private.pfns())
    pin: Pin | None = None
    if new.ops.pin is not None and pfns.size:
        pin = new.call(tx, "pin", private)
    if old.ops.pin is not None and new.ops.pin is None:
        _refuse_strays(core, vm, new)
    wanted = None if pin is None else pin_entry(vm, pin.purpose, pin.longterm)
    before = _held(core, vm, pfns)
    if wanted is not None:
        fresh = pfns[~core.ledger.held(wanted, pfns)]
        if pin is not None and pin.longterm:
            charge_memlock(core, vm, pin, fresh.size)
        core.ledger.hold(tx, wanted, fresh)
    for entry in pin_entries(core, vm):
        if entry != wanted:
            frames.drop(core, tx, entry, pfns[core.ledger.held(entry, pfns)])
    after = _held(core, vm, pfns)
    return int((before & ~after).sum()), int((after & ~before).sum())


def _held(core: Core, vm: Vm, pfns: I64) -> np.ndarray:
    held = np.zeros(pfns.size, dtype=np.bool_)
    for entry in pin_entries(core, vm):
        held |= core.ledger.held(entry, pfns)
    return held


def _refuse_strays(core: Core, vm: Vm, new: Consumer) -> None:
    left = strays(core, vm)
    if left.size:
        pfn = int(left[0])
        raise SWAP_UNSAFE(
            f"{new.name} has no unpin, and {left.size} pages of {vm.info.label} are held that are "
            "not mapped", page=f"pfn {pfn:#x}", state="held, not mapped",
            holders=core.ledger.holders(pfn), where=new.name,
        )  # fmt: skip


def _reclassified(core: Core, vm: Vm, old: Consumer, new: Consumer) -> int:
    """Count the folios that the hook decides about, if it decides otherwise from now on."""
    if (old.ops.migrate_folio is None) == (new.ops.migrate_folio is None):
        return 0
    count = 0
    for file in files_of(core, vm):
        present = file.frames.touched(0, file.info.size_pages)
        pfns = np.asarray(file.frames.get(present), dtype=np.int64) - 1
        count += int((governed(core, file, pfns) & ~core.host.poisoned(pfns)).sum())
    return count
