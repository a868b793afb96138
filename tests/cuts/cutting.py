"""Cuts and flipped bits of a recorded journal, and what the log makes of each.

Owns the check of a reader: after a cut at byte c, the frames that end at c or before, and no other;
after a flipped bit, the frames before the one that has it. Reading all of a log at each of its
bytes would take the square of its length, so at every byte the log's own step from one frame to the
next is asked, with what it carries over from the frames before; and at a sample, all of it is read.
"""

from __future__ import annotations

import os
import random
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate

from rmemd.store import log as log_module
from rmemd.store.log import JournalUnreadable, Log

from .recorded import Generation, Recorded

# of a generation's cuts, and of all flips, those that are read from the beginning
CUTS_READ, FLIPS_READ = 40, 500


@dataclass
class Figure:
    """What was tried, and what came out wrong.

    Attributes:
        cuts: places where a journal was cut.
        flips: bits that were flipped, one at a time.
        reads: how many of these journals were read from their beginning.
        wrong: a line for each that gave another prefix.
    """

    cuts: int = 0
    flips: int = 0
    reads: int = 0
    wrong: list[str] = field(default_factory=list)


def check_journal(recorded: Recorded, flips: int, seed: int) -> Figure:
    """Cut a journal at every byte, and flip bits of it."""
    figure, rng = Figure(), random.Random(seed)
    for one, older in zip(recorded.generations, (None, *recorded.generations), strict=False):
        _cut_everywhere(figure, recorded, one, older, rng)
    _flip_bits(figure, recorded, flips, rng)
    return figure


# --- cuts ----------------------------------------------------------------------------------------
def _cut_everywhere(
    figure: Figure,
    recorded: Recorded,
    one: Generation,
    older: Generation | None,
    rng: random.Random,
) -> None:
    """Cut a generation at every byte, as a kill has at one time or another.

    The generation before it is there in whole, as it was until this one's checkpoint was closed.
    """
    size = len(one.content)
    sampled = {size, *rng.sample(range(size), min(size, CUTS_READ))}
    with _memfds(one, older) as fds:
        fd = fds[one.number % 2]
        for frame in range(len(one.ends), -1, -1):
            begin = one.begin(frame)
            end = one.ends[frame] if frame < len(one.ends) else size + 1
            cut_off = _at(fd, one, frame)
            for cut in range(end - 1, begin - 1, -1):
                os.ftruncate(fd, cut)
                cut_off.size = cut
                if log_module._next_frame(cut_off) is not None:
                    figure.wrong.append(f"generation {one.number} cut at {cut}: a part is taken")
                if cut in sampled:
                    figure.reads += 1
                    figure.wrong += _misread(recorded, fds, one, older, cut)
            if frame and not _is_whole(fd, one, frame - 1):
                figure.wrong.append(f"generation {one.number} cut at {begin}: a frame is lost")
            figure.cuts += end - begin


def _at(fd: int, one: Generation, frame: int) -> log_module._Scan:
    """Return how far the log has read a memfd when it comes to a frame."""
    return log_module._Scan(fd, os.fstat(fd).st_size, one.begin(frame), one.crc_before(frame))


def _is_whole(fd: int, one: Generation, frame: int) -> bool:
    found = log_module._next_frame(_at(fd, one, frame))
    return found is not None and found[0][1:] == one.payload(frame)


def _misread(
    recorded: Recorded, fds: tuple[int, int], one: Generation, older: Generation | None, cut: int
) -> list[str]:
    """Read a log that was cut, from its beginning; return what is wrong with what is found."""
    left, upto = (one, cut) if cut >= one.closed_at else (older, 0)
    if left is older and older is not None:
        upto = len(older.content)
    what = f"generation {one.number} cut at {cut}"
    try:
        found = Log.read(fds)
    except JournalUnreadable as refusal:
        return [f"{what}: {refusal}"]
    if left is None or found is None:
        return [] if left is found else [f"{what}: {found}, not {left and left.number}"]
    return _differing(what, recorded, found, left, upto)


def _differing(
    what: str, recorded: Recorded, found: log_module.Found, one: Generation, upto: int
) -> list[str]:
    expected = one.payloads(upto)
    same = (
        found.generation == one.number
        and found.header == recorded.header
        and found.checkpoint == len(one.payloads(one.closed_at))
        and list(found.frames) == expected
    )
    return [] if same else [f"{what}: other frames than the first {len(expected)}"]


# --- flips ---------------------------------------------------------------------------------------
def _flip_bits(figure: Figure, recorded: Recorded, flips: int, rng: random.Random) -> None:
    """Flip single bits, each drawn among all bits of all generations.

    Of a generation that is read, the one before it has been let go.
    """
    begins = list(accumulate((len(one.content) for one in recorded.generations), initial=0))
    drawn = sorted((rng.randrange(begins[-1]), rng.randrange(8)) for _ in range(flips))
    read = set(rng.sample(range(flips), min(flips, FLIPS_READ)))
    for number, (byte, bit) in enumerate(drawn):
        at = bisect_right(begins, byte) - 1
        one = recorded.generations[at]
        figure.flips += 1
        with _memfds(one) as fds:
            figure.wrong += _flip(recorded, fds, one, (byte - begins[at], bit), number in read)
        figure.reads += number in read


def _flip(
    recorded: Recorded, fds: tuple[int, int], one: Generation, where: tuple[int, int], read: bool
) -> list[str]:
    byte, bit = where
    fd, frame = fds[one.number % 2], one.whole(byte)
    os.pwrite(fd, bytes((one.content[byte] ^ 1 << bit,)), byte)
    what = f"generation {one.number}, bit {bit} of byte {byte} flipped"
    if log_module._next_frame(_at(fd, one, frame)) is not None:
        return [f"{what}: its frame is taken"]
    if not read:
        return []
    try:
        found = Log.read(fds)
    except JournalUnreadable:
        # what cannot be told from the beginning of a log is refused
        return [] if byte < one.closed_at else [f"{what}: refused"]
    if byte < one.closed_at or found is None:
        return [f"{what}: {found} is a guess"]
    return _differing(what, recorded, found, one, byte)


@contextmanager
def _memfds(*generations: Generation | None) -> Iterator[tuple[int, int]]:
    """Make a log's two memfds, with the generations that are in them."""
    fds = (os.memfd_create("cut-0"), os.memfd_create("cut-1"))
    try:
        for one in generations:
            if one is not None:
                os.pwrite(fds[one.number % 2], one.content, 0)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)
