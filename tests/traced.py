"""Recordings for tests: an engine recorded while something is done, and a life that guests lead."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from random import Random

from guests import Guest

from rmemd.engine.engine import Engine
from rmemd.engine.programme import Opcode
from rmemd.errors import RmemError
from rmemd.trace.format import Trace, read
from rmemd.trace.player import Changes
from rmemd.trace.recorder import LIMIT_BYTES, Recorder
from rmemd.trace.replayer import Replayed, replay
from rmemd.trace.state import digests, total
from rmemd.units import PAGE_SIZE

UNCHANGED = Changes()


class Recording:
    """A recording; ``data`` and ``trace`` are there once it has ended."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.data = b""

    @property
    def trace(self) -> Trace:
        """Return it as it is read."""
        return read(io.BytesIO(self.data))

    def replayed(self, changes: Changes = UNCHANGED, keep_going: bool = False) -> Replayed:
        """Do it again."""
        return replay(self.trace, changes, keep_going)


@contextmanager
def recording(
    engine: Engine, state_every: int = 0, limit_bytes: int = LIMIT_BYTES
) -> Iterator[Recording]:
    """Record an engine for a while."""
    recorder = Recorder(engine, limit_bytes, key=b"a test's", state_every=state_every)
    found = Recording(recorder)
    recorder.start()
    try:
        yield found
    finally:
        recorder.stop()
        found.data = recorder.sink.read(0, recorder.sink.size)
        recorder.sink.close()


def state_of(engine: Engine) -> str:
    """Return the digest of an engine's whole state."""
    return total(digests(engine.core.space, sorted(engine.core.registry.platforms)))


def assert_same(found: Recording, engine: Engine | None = None) -> None:
    """Require that a replay does the same, and comes to the state that the engine is in."""
    done = found.replayed()
    assert [one.text for one in done.divergences] == []
    if engine is not None:
        assert done.digest == state_of(engine)


def launch(engine: Engine, consumer: str, in_place: bool | None = None) -> Guest:
    """Make a guest with an image of its own, and have it write where it can."""
    guest = Guest(engine, consumer, npages=64, in_place=in_place, finalized=False)
    with suppress(RmemError):
        guest.populate(0, bytes(range(256)) * (2 * PAGE_SIZE // 256))
    if guest.consumer.ops.finalize is not None:
        engine.finalize(guest.vm)
    guest.fault(0, 32)
    guest.fill(8, 8, 7)
    return guest


def live(engine: Engine, guests: list[Guest], seed: int, steps: int) -> None:
    """Have a VMM and its guests do whatever comes to mind under a seed; much of it is refused."""
    random = Random(seed)
    for _ in range(steps):
        guest, page, n = random.choice(guests), random.randrange(48), random.randrange(1, 16)
        private, what = random.random() < 0.7, random.randrange(12)
        with suppress(RmemError):
            _do(engine, guest, what, page, n, private, random)


def _do(
    engine: Engine, guest: Guest, what: int, page: int, n: int, private: bool, random: Random
) -> None:
    data = random.randbytes(random.randrange(1, 9000))
    if what == 0:
        guest.fault(page, n)
    elif what == 1:
        guest.convert(page, n, private)
    elif what == 2:
        found = guest.frames(0, 64)
        engine.migrate(found[found >= 0][:n], node=random.choice((None, 0, 1)))
    elif what == 3:
        guest.punch(page, n)
    elif what == 4:
        guest.allocate(page, n)
    elif what == 5:
        guest.write(page, n, random.randrange(9), private=private)
    elif what == 6:
        guest.check(page, n, 7, private=private)
    elif what == 7:
        engine.write_guest(guest.vm, 0, guest.gpa(page), data, private)
    elif what == 8:
        engine.compact(random.randrange(2))
    elif what == 9:
        engine.write_shared(guest.file, page * PAGE_SIZE, data)
        engine.read_shared(guest.file, page * PAGE_SIZE, len(data))
    elif what == 10:
        pin = engine.pin(guest.file, page * PAGE_SIZE, n * PAGE_SIZE, "DMA", "a device")
        engine.migrate(guest.frames(page, n))
        engine.unpin(pin)
    else:
        guest.run(guest.do(Opcode.SHARE, page, n), lazy=True)
