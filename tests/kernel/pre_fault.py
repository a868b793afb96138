"""Runners for pre_fault_memory_test.c: KVM_PRE_FAULT_MEMORY against a slot that comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from errno import ENOENT

from helpers import Guest, halted, make_guest, touch, vm_of
from kernel.catalogue import Bench, runs

from rmemd.errors import NO_MEMSLOT, RmemError
from rmemd.model.vms import GUEST_MEMFD
from rmemd.units import PAGE_SIZE, PMD_PAGES

FILE = "pre_fault_memory_test.c"
MB2 = PMD_PAGES * PAGE_SIZE
NPAGES = PMD_PAGES + 1
# what the slot does at the one moment when the fault has looked its page up
RACES = ("nothing", "deleted and re-added", "deleted")


@dataclass
class PreFaulting:
    """A guest whose slot of 2M+4K is deleted, and added again, while it is pre-faulted.

    Attributes:
        private: whether its memory is private.
        race: one of RACES.
        calls: (bytes left before, bytes left after, errno) of every call made.
    """

    guest: Guest
    private: bool
    race: str
    calls: list[tuple[int, int, int]] = field(default_factory=list)

    def delete(self) -> None:
        """Delete the slot."""
        guest = self.guest
        guest.engine.set_memory_region(guest.vm, 0, 0, guest.gpa, 0)

    def add(self) -> None:
        """Add the slot again."""
        guest, file = self.guest, self.guest.file if self.private else 0
        flags = GUEST_MEMFD if self.private else 0
        guest.engine.set_memory_region(guest.vm, 0, flags, guest.gpa, guest.size, file=file)

    def pre_fault(self, offset: int, size: int) -> tuple[int, int]:
        """Pre-fault until all is done or the slot does not cover it; return (left, errno)."""
        raced = self.race == "nothing"

        def hold(step: str) -> None:
            nonlocal raced
            if step == "fault: looked up" and not raced:
                raced = True
                self.delete()
                if self.race == "deleted and re-added":
                    self.add()

        core, left = self.guest.engine.core, size
        core.hold = hold
        try:
            while True:
                at = self.guest.gpa + offset + size - left
                before, error = left, 0
                try:
                    left = self.guest.engine.pre_fault(self.guest.vm, at, left).left_bytes
                except RmemError as refused:
                    error = refused.errno if refused.reason is NO_MEMSLOT else -1
                self.calls.append((before, left, error))
                if not left:
                    return left, error
                if error and vm_of(self.guest.engine, self.guest.vm).slots.get(0) is not None:
                    return left, error
                if error:
                    self.add()
        finally:
            core.hold = None


def _kinds(bench: Bench) -> Iterator[tuple[Callable[[], Guest], bool]]:
    engine = bench.engine
    yield lambda: make_guest(engine, "gup", NPAGES, restricted=False), False
    shared = {"in_place": False, "starts_private": False, "restricted": False}
    yield lambda: make_guest(engine, "sw-protected", NPAGES, **shared), False
    for in_place in (False, True):
        yield (
            lambda in_place=in_place: make_guest(  # type: ignore[misc]
                engine, "sw-protected", NPAGES, in_place=in_place
            ),
            True,
        )


def _each(bench: Bench) -> Iterator[PreFaulting]:
    for make, private in _kinds(bench):
        for race in RACES:
            guest = make()
            yield PreFaulting(guest, private, race)
            bench.engine.destroy_vm(guest.vm)
            if private:
                bench.engine.close_file(guest.file)


@runs(FILE, "pre_fault_memory",
      "type 0 shared, SW_PROTECTED shared, SW_PROTECTED private; slot 2M+4K deleted and re-added "
      "meanwhile: 2M from its start")  # fmt: skip
def whole(bench: Bench) -> None:
    for it in _each(bench):
        assert it.pre_fault(0, MB2) == (0, 0)


@runs(FILE, "pre_fault_memory", "same: 2 pages of which the second lies past the slot")
def one_of_two(bench: Bench) -> None:
    for it in _each(bench):
        assert it.pre_fault(MB2, 2 * PAGE_SIZE) == (PAGE_SIZE, ENOENT)


@runs(FILE, "pre_fault_memory", "same: one page entirely past the slot")
def past_the_slot(bench: Bench) -> None:
    for it in _each(bench):
        assert it.pre_fault(MB2 + PAGE_SIZE, PAGE_SIZE) == (PAGE_SIZE, ENOENT)


@runs(FILE, "pre_fault_memory", "every single call")
def every_call(bench: Bench) -> None:
    for it in _each(bench):
        it.pre_fault(0, MB2)
        it.pre_fault(MB2, 2 * PAGE_SIZE)
        it.pre_fault(MB2 + PAGE_SIZE, PAGE_SIZE)
        assert len(it.calls) >= 4
        for before, after, errno in it.calls:
            assert (after < before) == (errno == 0)


@runs(FILE, "pre_fault_memory", "afterwards the guest reads every page of the slot")
def then_read(bench: Bench) -> None:
    for it in _each(bench):
        it.pre_fault(0, MB2)
        it.pre_fault(MB2, 2 * PAGE_SIZE)
        guest = it.guest
        exited = halted(guest.run(touch(guest.gpa, guest.size, private=it.private)))
        assert exited.vcpu.instructions == 1
