"""For every op of every plugin, what is thrown in it leaves the whole state equal to before.

Each case makes one engine call whose first transaction runs the op, three times with the op broken
(raising before it ran, raising after it ran and wrote, answering nonsense) and once as it is: the
state is the same before each broken call and after it, and the call succeeds in the end, which
shows that it was the op that failed and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from guests import ACCEPTS, Guest, consumers, make_engine
from msgspec.structs import replace

from rmemd.engine.engine import Engine
from rmemd.engine.invariants import check
from rmemd.engine.programme import Opcode
from rmemd.errors import PLUGIN_NONSENSE, PLUGIN_RAISED, PluginFault, RmemError
from rmemd.hooks import (
    AccessAnswer,
    Agent,
    CallAction,
    CallAnswer,
    GuestException,
    HostAnswer,
    PageStates,
)
from rmemd.hooks.tables import same_state
from rmemd.units import PAGE_SIZE

CONSUMERS = consumers()


@dataclass
class Broken:
    """An op that goes wrong: ``how`` is "before", "after" or what it answers instead."""

    original: Callable[..., Any]
    how: Any
    hits: int = 0

    def __call__(self, *args: Any) -> Any:
        self.hits += 1
        if isinstance(self.how, str) and self.how == "before":
            raise ZeroDivisionError("broken before")
        self.original(*args)
        if isinstance(self.how, str):
            raise ZeroDivisionError("broken after")
        return self.how


# --- engine calls, each after what makes it possible ---------------------------------------------
def _launched(engine: Engine, consumer: str, **options: Any) -> Guest:
    """Pages 0..3 are mapped and written; 8..11 are mapped and untouched; 16..19 only allocated."""
    guest = Guest(engine, consumer, **options)
    guest.fault(0, 4)
    guest.fill(0, 4, seed=1)
    guest.fault(8, 4)
    if guest.private:
        guest.allocate(16, 4)
    return guest


def fault(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: guest.fault(24, 4)


def access(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    engine.set_programme(guest.vm, 0, (guest.do(Opcode.TOUCH, 0),))
    return guest, lambda: engine.run_vcpu(guest.vm, 0)


def call(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    opcode = ACCEPTS.get(guest.platform, Opcode.SHARE)
    page = 8 if guest.platform in ACCEPTS else 0
    engine.set_programme(guest.vm, 0, (guest.do(opcode, page, 2),))
    return guest, lambda: engine.run_vcpu(guest.vm, 0)


def leave(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    """A vCPU that is in the guest already, because it could not leave, and has nothing to do."""
    guest = _launched(engine, consumer)
    whole = guest.consumer.ops
    guest.consumer.ops = replace(whole, leave=Broken(whole.leave, "before"))
    with pytest.raises(PluginFault):
        guest.run(guest.do(Opcode.TOUCH, 0))
    guest.consumer.ops = whole
    assert engine.core.vms.get(guest.vm).vcpu(0).inside
    return guest, lambda: engine.run_vcpu(guest.vm, 0)


def convert(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer, in_place=True)
    return guest, lambda: guest.convert(16, 4, private=False)


def attributes(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: guest.convert(0, 4, private=False)


def populate(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = Guest(engine, consumer, finalized=False)
    guest.populate(0, bytes(range(256)) * 16)
    return guest, lambda: guest.populate(8, b"\xa5" * (4 * PAGE_SIZE))


def finalize(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = Guest(engine, consumer, finalized=False)
    guest.populate(0, bytes(range(256)) * 16)
    return guest, lambda: engine.finalize(guest.vm)


def punch(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: guest.punch(0, 4)


def delete_slot(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: engine.set_memory_region(guest.vm, 0, 4, guest.gpa(0), 0)


def close(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: engine.close_file(guest.file)


def destroy(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: engine.destroy_vm(guest.vm)


def poison(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: engine.poison(int(guest.pfns(0)[0]))


def migrate(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)

    def move() -> None:
        for moved in engine.migrate(guest.pfns(0, 4)).moves:
            if moved.refusal is not None:
                raise moved.refusal

    return guest, move


def inspect(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: engine.page(int(guest.pfns(0)[0]))


def swap(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    return guest, lambda: engine.swap_consumer(guest.vm)


def create(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    return _launched(engine, consumer), lambda: engine.create_vm(consumer)


def read(engine: Engine, consumer: str) -> tuple[Guest, Callable[[], Any]]:
    guest = _launched(engine, consumer)
    pfn = int(guest.pfns(0)[0])
    return guest, lambda: engine.read_physical(pfn, 1, Agent.HOST_KERNEL)


Scenario = Callable[[Engine, str], tuple[Guest, Callable[[], Any]]]
# the calls that run an op in their first transaction
SCENARIOS: dict[str, tuple[Scenario, ...]] = {
    "invalidate_start": (attributes, convert, punch, delete_slot, close, destroy, poison, migrate),
    "invalidate_end": (attributes, convert, punch, delete_slot, close, destroy, poison, migrate),
    "prepare": (fault,),
    "map": (fault,),
    "pin": (fault,),
    "unpin": (close, destroy),
    "migrate_folio": (migrate,),
    "convert": (convert,),
    "populate": (populate,),
    "finalize": (finalize,),
    "enter": (access, call),
    "leave": (leave,),
    "guest_access": (access,),
    "guest_call": (call,),
    "error": (poison,),
    "page_state": (inspect,),
    "export_state": (swap,),
}
# what is asked of an object before it is the VM's consumer (test_swap.py breaks it for each), and
# when a state is reopened (test_reopen.py)
ELSEWHERE = frozenset(("import_state", "resume"))
PLATFORM_SCENARIOS: dict[str, tuple[Scenario, ...]] = {
    "make_consumer": (create,),
    "destroy_consumer": (destroy,),
    "host_access": (read,),
    "free": (close,),
}
NONSENSE: dict[str, tuple[Any, ...]] = {
    "make_consumer": (None,),
    "guest_access": (AccessAnswer(None), AccessAnswer(np.full(1, 9, dtype=np.uint8))),  # type: ignore[arg-type]
    "guest_call": (
        CallAnswer("done"),  # type: ignore[arg-type]
        CallAnswer(CallAction.DONE, done=-1),
        CallAnswer(CallAction.DONE, done=99),
        CallAnswer(CallAction.DONE),
        CallAnswer(CallAction.CONVERT),
        CallAnswer(CallAction.EXCEPTION),
    ),
    "host_access": (HostAnswer(None), HostAnswer(np.full(1, 9, dtype=np.uint8))),  # type: ignore[arg-type]
    "page_state": (PageStates(None, ()), PageStates(np.zeros(1, dtype=np.uint8), ())),  # type: ignore[arg-type]
    "unpin": (np.zeros(1, dtype=np.bool_), np.zeros(8, dtype=np.int64)),
    "free": (np.zeros(1, dtype=np.bool_), None),
}


def _possible(consumer: str, private: bool, in_place: bool, movable: bool, name: str) -> bool:
    """Return whether a call can succeed for a consumer; what it refuses is tested elsewhere."""
    if consumer.startswith("pkvm") and name in ("delete_slot",):
        return False
    if consumer == "pkvm-today" and name == "punch":
        return False
    return {
        "attributes": private and not in_place,
        "convert": private and consumer != "null",
        "migrate": movable or not private,
        # the anonymous frames of an ordinary VM are not in the private half
        "punch": private,
    }.get(name, True)


def _cases() -> list[Any]:
    engine = make_engine()
    found = []
    for consumer in CONSUMERS:
        offer = engine.core.registry.offers[consumer]
        variant, ops = offer.variant, offer.ops
        in_place = variant.personalities[0] == "in-place"
        for op, scenarios in SCENARIOS.items():
            if getattr(ops, op) is None:
                continue
            possible = [
                s for s in scenarios
                if _possible(
                    consumer, variant.private_memory, in_place, ops.migrate_folio is not None,
                    s.__name__,
                )
            ]  # fmt: skip
            assert possible, f"no call reaches {consumer}.{op}"
            found += [
                pytest.param(consumer, op, s, id=f"{consumer}-{op}-{s.__name__}") for s in possible
            ]
    engine.close()
    return found


def _platform_cases() -> list[Any]:
    engine = make_engine()
    found = []
    for name, platform in engine.core.registry.platforms.items():
        consumer = next(c for c in CONSUMERS if engine.core.registry.offers[c].platform == name)
        found += [
            pytest.param(consumer, op, s, id=f"{name}-{op}-{s.__name__}")
            for op, scenarios in PLATFORM_SCENARIOS.items()
            if getattr(platform.ops, op) is not None
            for s in scenarios
        ]
    engine.close()
    return found


def _everything(engine: Engine) -> tuple[dict[str, Any], int, int]:
    core = engine.core
    assert set(core.consumers) == {vm.info.vm for vm in core.vms.all()}
    return core.space.snapshot(), core.journal.revision, len(core.journal.events_after(0))


def _prove(engine: Engine, holder: Any, op: str, where: str, trigger: Callable[[], Any]) -> None:
    """Break ``holder.ops.op`` in each way, and compare everything there is around the call."""
    whole = holder.ops
    before = _everything(engine)
    for how in ("before", "after", *NONSENSE.get(op, ()), object()):
        if op == "make_consumer" and not isinstance(how, str) and how is not None:
            continue
        broken = Broken(getattr(whole, op), how)
        holder.ops = replace(whole, **{op: broken})
        with pytest.raises(PluginFault) as fault:
            trigger()
        holder.ops = whole
        assert broken.hits > 0
        reason = PLUGIN_RAISED if isinstance(how, str) else PLUGIN_NONSENSE
        assert fault.value.reason is reason
        assert fault.value.details.where == where
        after = _everything(engine)
        assert same_state(before[0], after[0]) == []
        assert before[2] == after[2], "a watcher was told of what did not happen"
        # a vCPU that entered the guest and left it again leaves records, and no trace in the state
        ran = [
            record.label for record in engine.core.journal.records if record.revision > before[1]
        ]
        assert set(ran) <= {"enter", "leave"}
        before = (before[0], engine.revision, before[2])
        assert engine.core.space.holders == []
    assert check(engine.core) == []
    try:
        trigger()
    except RmemError as refusal:
        pytest.fail(f"the call fails even with the op whole: {refusal}")
    assert check(engine.core) == []


@pytest.mark.parametrize(("consumer", "op", "scenario"), _cases())
def test_a_consumers_op_that_fails_changes_nothing(
    engine: Engine, consumer: str, op: str, scenario: Scenario
) -> None:
    guest, trigger = scenario(engine, consumer)
    _prove(engine, guest.consumer, op, f"{guest.consumer.name}.{op}", trigger)


@pytest.mark.parametrize(("consumer", "op", "scenario"), _platform_cases())
def test_a_platforms_op_that_fails_changes_nothing(
    engine: Engine, consumer: str, op: str, scenario: Scenario
) -> None:
    guest, trigger = scenario(engine, consumer)
    platform = engine.core.registry.platforms[guest.platform]
    _prove(engine, platform, op, f"{guest.platform}.{op}", trigger)


def test_every_op_of_every_consumer_is_among_the_cases(engine: Engine) -> None:
    implemented = {
        (consumer, op)
        for consumer, offer in engine.core.registry.offers.items()
        for op, there in offer.ops.implemented().items()
        if there and op not in ELSEWHERE
    }
    covered = {(case.values[0], case.values[1]) for case in _cases()}
    assert covered == implemented


def test_a_guest_call_can_end_in_an_exception(engine: Engine) -> None:
    guest = _launched(engine, "tdx-today")
    ops = guest.consumer.ops
    taken = GuestException("#GP", 0, "no such leaf")
    answer = CallAnswer(CallAction.EXCEPTION, exception=taken)
    guest.consumer.ops = replace(ops, guest_call=lambda *args: answer)
    exited = guest.run(guest.do(Opcode.ACCEPT, 8))
    assert exited.reason.name == "SHUTDOWN"
    assert "#GP 0x0: no such leaf (accept), unhandled" in exited.text
