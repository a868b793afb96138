"""What one call does to one object, written from the reference and not from the engine.

Owns a sequential model for each kind of object: a file of a VM that converts by attributes, one
that converts in place, and a VM. States are plain tuples. Source: restrictedmem.md §2 (fallocate,
host fault, KVM_SET_MEMORY_ATTRIBUTES, in-place conversion), DESIGN §4.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

from linearizability.checker import Operation

NPAGES = 4
DONE = "done"
NO_SUCH_FILE, NO_SUCH_VM = "NO_SUCH_FILE", "NO_SUCH_VM"
HOST_SIGBUS, FOLIO_BUSY = "HOST_SIGBUS", "FOLIO_BUSY"
Answered = tuple[Hashable, Any]


@dataclass(frozen=True)
class Refused:
    """A call that was refused, with its reason."""

    reason: str


@dataclass(frozen=True)
class Halves:
    """A file whose private and shared half may both exist: pages of each, and the shared bytes."""

    private: frozenset[int] = frozenset()
    shared: frozenset[int] = frozenset()
    tags: tuple[int, ...] = (0,) * NPAGES
    open: bool = True


def halves(state: Halves, op: Operation) -> Answered:
    """Apply a call to a file of a VM that converts by attributes."""
    if not state.open:
        return state, Refused(NO_SUCH_FILE)
    match op.call:
        case "allocate":
            wanted = _pages(*op.args)
            return replace(state, private=state.private | wanted), len(wanted - state.private)
        case "punch":
            wanted = _pages(*op.args)
            return replace(state, private=state.private - wanted), len(wanted & state.private)
        case "read":
            # a touch of a hole faults a page in, reads do
            page = op.args[0]
            return replace(state, shared=state.shared | {page}), state.tags[page]
        case "write":
            page, tag = op.args
            tags = _put(state.tags, page, tag)
            return replace(state, shared=state.shared | {page}, tags=tags), DONE
        case "stat":
            return state, (len(state.private), len(state.shared))
        case "close":
            return replace(state, open=False), len(state.private) + len(state.shared)
    raise AssertionError(op.call)


@dataclass(frozen=True)
class Page:
    """A page where one frame serves either state; ``pins`` are on the frame that it has now."""

    private: bool = False
    present: bool = False
    tag: int = 0
    pins: frozenset[str] = frozenset()


@dataclass(frozen=True)
class InPlace:
    """A file that converts in place, and the pins that were taken of it."""

    pages: tuple[Page, ...] = (Page(),) * NPAGES
    pins: frozenset[str] = frozenset()
    open: bool = True


def in_place(state: InPlace, op: Operation) -> Answered:
    """Apply a call to a file that converts in place, shared at first, its bytes preserved."""
    # pins are of frames, which outlive their file while somebody holds them
    if op.call == "unpin":
        pages = tuple(replace(page, pins=page.pins - {op.args[0]}) for page in state.pages)
        return replace(state, pages=pages, pins=state.pins - {op.args[0]}), DONE
    if op.call == "pins":
        return state, tuple(sorted(state.pins))
    if not state.open:
        return state, Refused(NO_SUCH_FILE)
    if op.call == "stat":
        private = sum(page.present and page.private for page in state.pages)
        return state, (private, sum(page.present for page in state.pages) - private)
    if op.call == "close":
        return replace(state, open=False), sum(page.present for page in state.pages)
    first, count = op.args[0], 1 if op.call in ("read", "write") else op.args[1]
    wanted = state.pages[first : first + count]
    result, changed = _of_pages(op, wanted)
    pages = (*state.pages[:first], *changed, *state.pages[first + count :])
    pins = state.pins | {op.args[2]} if op.call == "pin" and result == DONE else state.pins
    return replace(state, pages=pages, pins=pins), result


def _of_pages(op: Operation, wanted: tuple[Page, ...]) -> tuple[Any, tuple[Page, ...]]:
    match op.call:
        case "allocate":
            return sum(not page.present for page in wanted), _touched(wanted)
        case "punch":
            # a punch leaves the attributes, and a pin of its frame to its holder
            punched = tuple(Page(page.private) for page in wanted)
            return sum(page.present for page in wanted), punched
        case "convert":
            return _convert(op.args[2], wanted)
    if any(page.private for page in wanted):
        return Refused(HOST_SIGBUS), wanted
    match op.call:
        case "read":
            return wanted[0].tag, _touched(wanted)
        case "write":
            return DONE, (replace(wanted[0], present=True, tag=op.args[1]),)
        case "pin":
            held = (replace(page, pins=page.pins | {op.args[2]}) for page in _touched(wanted))
            return DONE, tuple(held)
    raise AssertionError(op.call)


def _convert(private: bool, wanted: tuple[Page, ...]) -> tuple[Any, tuple[Page, ...]]:
    changing = [page for page in wanted if page.private != private]
    # to private needs refcount == nr_pages + 1: nobody but the page cache; to shared does not ask
    if private and any(page.pins for page in changing):
        return Refused(FOLIO_BUSY), wanted
    content = "preserved" if any(page.present for page in changing) else ""
    return (len(changing), content), tuple(replace(page, private=private) for page in wanted)


def _touched(wanted: tuple[Page, ...]) -> tuple[Page, ...]:
    return tuple(replace(page, present=True) for page in wanted)


def machine(state: tuple[bool, ...] | None, op: Operation) -> Answered:
    """Apply a call to a VM: its state is its pages' attributes, None before and after its life."""
    if op.call == "create":
        return (True,) * NPAGES, DONE
    if state is None:
        return None, Refused(NO_SUCH_VM)
    match op.call:
        case "set":
            first, count, private = op.args
            after = (*state[:first], *(private,) * count, *state[first + count :])
            return after, int(after == state)
        case "get":
            return state, state[op.args[0] : op.args[0] + op.args[1]]
        case "look":
            return state, "building"
        case "destroy":
            return None, DONE
    raise AssertionError(op.call)


def _pages(first: int, count: int) -> frozenset[int]:
    return frozenset(range(first, first + count))


def _put(tags: tuple[int, ...], at: int, tag: int) -> tuple[int, ...]:
    return (*tags[:at], tag, *tags[at + 1 :])


MODELS: dict[str, tuple[Hashable, Any]] = {
    "halves": (Halves(), halves), "in-place": (InPlace(), in_place), "machine": (None, machine),
}  # fmt: skip
