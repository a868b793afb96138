"""More short runs for planted bugs: about steps, places and what is kept beyond the process."""

from __future__ import annotations

from guests import Guest

from planted.scenarios import SCENARIOS, Violated, scenario, well
from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.engine.frames import MPOL_BIND
from rmemd.store.keeping import Keeping
from rmemd.units import PAGE_SIZE

__all__ = ["SCENARIOS", "Violated"]


class _Names(Keeping):
    """Knows what it was given, by name, and keeps none of it."""

    def __init__(self) -> None:
        super().__init__()
        self._names: set[str] = set()

    @property
    def names(self) -> list[str]:
        return sorted(self._names)

    def keep(self, name: str, fd: int) -> None:
        self._names.add(name)

    def drop(self, name: str) -> None:
        self._names.discard(name)


@scenario
def hooks_and_bytes_keep_to_their_steps(engine: Engine) -> None:
    """I25: hooks are asked with the lock held, and many bytes move without it."""
    guest = Guest(engine, "sw-protected", npages=32, in_place=True)
    guest.convert(0, 32, private=True)
    guest.fault(0, 32)
    guest.convert(0, 16, private=False)
    guest.convert(0, 16, private=True)
    well(engine)
    other = Guest(engine, "tdx-relocate", npages=32)
    other.fill(0, 32, seed=3)
    engine.migrate(other.frames(0, 32))


@scenario
def pages_lie_where_their_policy_says(engine: Engine) -> None:
    """I22: a page is on a node of its policy."""
    guest = Guest(engine, "null", npages=16)
    engine.set_policy(guest.file, 0, 8 * PAGE_SIZE, MPOL_BIND, (1,))
    guest.allocate(0, 16)


@scenario
def what_is_kept_is_what_is_there(engine: Engine) -> None:
    """I20: each file's memfd is kept as long as the file is there, and no longer."""
    keeper = Engine(Options(nframes=1024), Guard(clock=lambda: 0.0), _Names())
    guest = Guest(keeper, "sw-protected", npages=4)
    guest.convert(0, 4, private=False)
    keeper.write_shared(guest.file, 0, b"x")
    well(keeper)
    keeper.destroy_vm(guest.vm)
    keeper.close_file(guest.file)
    well(keeper)
    keeper.close()


@scenario
def an_overdue_hook_freezes_its_vm(engine: Engine) -> None:
    """I25: a hook that took too long freezes its VM in its own transaction."""
    guest = Guest(engine, "null", npages=4)
    engine.core.guard.overdue.append((guest.vm, "null.map", 3.0))
    engine.open_session("uid:1", "host", "lease")
