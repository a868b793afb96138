"""The log gives back what was appended, up to the first byte that is wrong, whatever happens."""

from __future__ import annotations

import errno
import os
import resource
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fcntl import F_ADD_SEALS, F_GETFD, F_SEAL_GROW, FD_CLOEXEC, fcntl
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rmemd.store import log as log_module
from rmemd.store.codec import JournalUnreadable
from rmemd.store.log import Found, Log

Fds = tuple[int, int]


@pytest.fixture
def make_fds() -> Iterator[Callable[..., Fds]]:
    """Make two memfds that hold these bytes; they are closed at the end."""
    made: list[int] = []

    def make(*contents: bytes) -> Fds:
        for number in range(2):
            fd = os.memfd_create("test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            made.append(fd)
            os.pwrite(fd, contents[number] if contents else b"", 0)
        return made[-2], made[-1]

    yield make
    for fd in made:
        os.close(fd)


def begun(fds: Fds | None = None, header: dict[str, Any] | None = None) -> Log:
    """A log with a checkpoint of two frames."""
    log = Log(fds)
    checkpointed(log, header or {"life": "one"}, [b"state 1", b"state 2"])
    return log


def checkpointed(log: Log, header: dict[str, Any], payloads: list[bytes]) -> None:
    checkpoint = log.begin_checkpoint(header)
    for payload in payloads:
        checkpoint.write(payload)
    checkpoint.commit()


def contents(fds: Fds) -> tuple[bytes, bytes]:
    one, other = (os.pread(fd, os.fstat(fd).st_size, 0) for fd in fds)
    return one, other


def frames(found: Found | None) -> list[bytes]:
    assert found is not None
    return list(found.frames)


# --- what is written is read ---------------------------------------------------------------------
def test_a_new_log_holds_nothing_and_takes_nothing_before_its_first_checkpoint() -> None:
    log = Log()
    assert log.found is None
    assert Log.read(log.fds) is None
    assert (log.generation, log.size_bytes, log.since_checkpoint_bytes) == (0, 0, 0)
    with pytest.raises(ValueError, match="checkpoint"):
        log.append(b"early")
    log.close()


def test_the_memfds_are_ours_alone() -> None:
    log = Log()
    for fd in log.fds:
        assert os.fstat(fd).st_mode & 0o777 == 0o600
        assert fcntl(fd, F_GETFD) & FD_CLOEXEC
    log.close()
    for fd in log.fds:
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(fd)


def test_frames_come_back_in_order_with_the_header(make_fds: Callable[..., Fds]) -> None:
    header = {"life": "one", "revision": 3, "more": (1, b"x")}
    log = begun(make_fds(), header)
    payloads = [b"", b"a", os.urandom(70000), b"b" * 300]
    for payload in payloads:
        log.append(payload)
    for found in (Log.read(log.fds), Log(log.fds).found):
        assert found is not None
        assert (found.header, found.generation, found.checkpoint, found.cut) == (header, 1, 2, 0)
        assert list(found.frames) == [b"state 1", b"state 2", *payloads]


def test_a_log_goes_on_after_it_was_reopened(make_fds: Callable[..., Fds]) -> None:
    fds = make_fds()
    log = begun(fds)
    for number in range(20):
        log.append(b"%d" % number)
        if number % 5 == 4:
            checkpointed(log, {"at": number}, frames(Log.read(fds)))
        sizes = (log.generation, log.size_bytes, log.since_checkpoint_bytes)
        log = Log(fds)
        assert (log.generation, log.size_bytes, log.since_checkpoint_bytes) == sizes
    expected = [b"state 1", b"state 2", *(b"%d" % number for number in range(20))]
    assert frames(Log.read(fds)) == expected
    assert log.generation == 5


def test_sizes_say_how_much_was_appended(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    assert log.since_checkpoint_bytes == 0
    size = log.size_bytes
    log.append(b"x" * 100)
    assert log.since_checkpoint_bytes == log.size_bytes - size
    assert 100 < log.since_checkpoint_bytes < 120
    assert log.size_bytes == os.fstat(log.fds[1]).st_size
    checkpointed(log, {}, [])
    assert log.since_checkpoint_bytes == 0


# --- checkpoints ---------------------------------------------------------------------------------
def test_generations_take_turns_and_the_older_memfd_is_emptied(
    make_fds: Callable[..., Fds],
) -> None:
    log = begun(make_fds())
    for generation in (2, 3, 4):
        checkpointed(log, {"generation": generation}, [b"all"])
        assert log.generation == generation
        assert contents(log.fds)[1 - generation % 2] == b""
        found = Log.read(log.fds)
        assert found is not None
        assert found.header == {"generation": generation}
        assert frames(found) == [b"all"]


def test_until_it_is_committed_a_checkpoint_changes_nothing(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    log.append(b"one")
    before = frames(Log.read(log.fds))
    checkpoint = log.begin_checkpoint({"new": True})
    checkpoint.write(b"new state")
    assert frames(Log.read(log.fds)) == before
    with pytest.raises(ValueError, match="checkpoint"):
        log.append(b"lost")
    with pytest.raises(ValueError, match="checkpoint"):
        log.begin_checkpoint({})
    checkpoint.abandon()
    for act in (lambda: checkpoint.write(b""), checkpoint.commit):
        with pytest.raises(ValueError, match="over"):
            act()
    log.append(b"two")
    assert frames(Log.read(log.fds)) == [*before, b"two"]
    checkpointed(log, {}, [b"next"])
    assert frames(Log.read(log.fds)) == [b"next"]


def test_a_checkpoint_that_its_writer_left_is_given_up(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    with log.begin_checkpoint({}) as checkpoint:
        checkpoint.write(b"half")
    assert contents(log.fds)[0] == b""
    log.append(b"one")
    with log.begin_checkpoint({}) as checkpoint:
        checkpoint.write(b"state")
        checkpoint.commit()
    assert frames(Log.read(log.fds)) == [b"state"]


def test_a_reopened_log_drops_a_checkpoint_that_was_under_way(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    log.begin_checkpoint({}).write(b"new state")
    again = Log(log.fds)
    assert contents(log.fds)[0] == b""
    again.append(b"two")
    assert frames(Log.read(log.fds)) == [b"state 1", b"state 2", b"two"]


def test_between_any_two_calls_of_a_checkpoint_one_generation_is_whole(
    make_fds: Callable[..., Fds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill can come there: what is read is all of the older one, or all of the newer."""
    log = begun(make_fds())
    log.append(b"one")
    old, new = frames(Log.read(log.fds)), [b"state", b"more state"]
    looks: list[list[bytes]] = []

    def looking(call: Callable[..., Any]) -> Callable[..., Any]:
        def looked(*args: Any) -> Any:
            looks.append(frames(Log.read(log.fds)))
            done = call(*args)
            looks.append(frames(Log.read(log.fds)))
            return done

        return looked

    for name in ("pwritev", "pwrite", "ftruncate"):
        monkeypatch.setattr(os, name, looking(getattr(os, name)))
    checkpointed(log, {}, new)
    assert len(looks) >= 2 * (len(new) + 2)
    turned = looks.index(new)
    assert looks == [old] * turned + [new] * (len(looks) - turned)


# --- cuts and damage -----------------------------------------------------------------------------
def boundaries(log: Log, payloads: list[bytes]) -> list[int]:
    """Append payloads; the sizes after the checkpoint and after each of them."""
    ends = [log.size_bytes]
    for payload in payloads:
        log.append(payload)
        ends.append(log.size_bytes)
    return ends


def test_cut_at_any_byte_the_log_gives_the_frames_before_and_goes_on(
    make_fds: Callable[..., Fds],
) -> None:
    log = begun(make_fds())
    payloads = [b"first", b"", b"third " * 5, b"x"]
    ends = boundaries(log, payloads)
    whole = contents(log.fds)[1]
    state = [b"state 1", b"state 2"]
    for length in range(ends[0], len(whole) + 1):
        fds = make_fds(b"", whole[:length])
        whole_frames = sum(end <= length for end in ends) - 1
        again = Log(fds)
        assert again.found is not None
        assert frames(again.found) == [*state, *payloads[:whole_frames]]
        assert again.found.cut == length - ends[whole_frames]
        assert os.fstat(fds[1]).st_size == ends[whole_frames]
        again.append(b"after")
        assert frames(Log.read(fds)) == [*state, *payloads[:whole_frames], b"after"]


def test_a_first_checkpoint_that_was_cut_is_no_log_yet(make_fds: Callable[..., Fds]) -> None:
    whole = contents(begun(make_fds()).fds)[1]
    for length in range(len(whole)):
        fds = make_fds(b"", whole[:length])
        assert Log.read(fds) is None
        again = begun(fds)
        assert again.found is None
        assert frames(Log.read(fds)) == [b"state 1", b"state 2"]


def test_cut_at_any_byte_of_a_checkpoint_one_generation_is_whole(
    make_fds: Callable[..., Fds],
) -> None:
    log = begun(make_fds())
    log.append(b"one")
    log.append(b"two")
    old = contents(log.fds)[1]
    checkpointed(log, {"generation": 2}, [b"state", b"more state"])
    new = contents(log.fds)[0]
    for length in range(len(new) + 1):
        fds = make_fds(new[:length], old)
        again = Log(fds)
        done = length == len(new)
        assert again.generation == 1 + done
        expected = [b"state", b"more state"] if done else [b"state 1", b"state 2", b"one", b"two"]
        assert frames(again.found) == expected
        assert contents(fds)[done] == b""
        again.append(b"after")
        checkpointed(again, {}, frames(Log.read(fds)))
        assert frames(Log.read(fds)) == [*expected, b"after"]


def test_a_flipped_bit_ends_the_log_before_its_frame(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    payloads = [b"first", b"second " * 3, b"third"]
    ends = boundaries(log, payloads)
    whole = contents(log.fds)[1]
    for bit in range(ends[0] * 8, len(whole) * 8):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        fds = make_fds(b"", bytes(damaged))
        good = sum(end <= bit // 8 for end in ends) - 1
        found = Log(fds).found
        assert frames(found) == [b"state 1", b"state 2", *payloads[:good]]
        assert os.fstat(fds[1]).st_size == ends[good]


def test_a_frame_is_not_taken_behind_another_than_it_was_written_behind(
    make_fds: Callable[..., Fds],
) -> None:
    """Leftovers of an older tail are not taken for frames of a new one."""
    log = begun(make_fds())
    ends = boundaries(log, [b"one", b"two", b"six"])
    whole = contents(log.fds)[1]
    for moved in (
        whole[: ends[0]] + whole[ends[1] :],
        whole[: ends[0]] + whole[ends[1] : ends[2]] + whole[ends[0] : ends[1]] + whole[ends[2] :],
    ):
        assert frames(Log.read(make_fds(b"", moved))) == [b"state 1", b"state 2"]


def test_zeros_and_noise_after_the_end_are_no_frames(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    whole = contents(log.fds)[1]
    rng = np.random.default_rng(1)
    for tail in (bytes(1), bytes(8), bytes(5000), *(rng.bytes(n) for n in range(1, 64))):
        found = Log.read(make_fds(b"", whole + tail))
        assert found is not None
        assert found.cut == len(tail)
        assert frames(found) == [b"state 1", b"state 2"]


def test_a_frame_of_nothing_at_all_ends_the_log(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    whole = contents(log.fds)[1]
    crc = zlib.crc32(bytes(4), log._pen.crc)
    found = Log.read(make_fds(b"", whole + bytes(4) + crc.to_bytes(4, "little")))
    assert found is not None
    assert found.cut == 8


def test_damage_in_the_only_checkpoint_is_said(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    checkpointed(log, {}, [b"state"])
    log.append(b"one")
    whole = contents(log.fds)[0]
    damaged = bytearray(whole)
    damaged[whole.index(b"state")] ^= 1
    with pytest.raises(JournalUnreadable, match="damaged"):
        Log(make_fds(bytes(damaged), b""))


# --- logs that are not for us --------------------------------------------------------------------
def test_a_log_of_another_boot_is_refused(
    make_fds: Callable[..., Fds], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log = begun(make_fds())
    other = tmp_path / "boot_id"
    other.write_text("00000000-1111-2222-3333-444444444444\n")
    monkeypatch.setattr(log_module, "BOOT_ID", other)
    with pytest.raises(JournalUnreadable, match=r"boot .* this is boot 00000000-1111"):
        Log(log.fds)


@pytest.mark.parametrize("where", ["rmemd.store.log.FORMAT", "rmemd.store.codec.FORMAT"])
def test_a_log_of_another_format_is_refused(
    make_fds: Callable[..., Fds], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    log = begun(make_fds())
    before = contents(log.fds)
    monkeypatch.setattr(where, 99)
    with pytest.raises(JournalUnreadable, match=r"format 1\.4"):
        Log(log.fds)
    assert contents(log.fds) == before


def test_memfds_that_changed_places_are_refused(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    with pytest.raises(JournalUnreadable, match="places"):
        Log(log.fds[::-1])


def test_something_else_than_a_log_is_refused(make_fds: Callable[..., Fds]) -> None:
    with pytest.raises(JournalUnreadable):
        Log(make_fds(b"", b"something else, and longer than any header of ours would ever be"))


# --- a system that refuses -----------------------------------------------------------------------
@contextmanager
def longest_file(nbytes: int) -> Iterator[None]:
    """Have the kernel refuse to write past ``nbytes`` (EFBIG), after a short write up to there."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_append_that_fails_half_way_leaves_the_log_at_its_end(
    make_fds: Callable[..., Fds],
) -> None:
    log = begun(make_fds())
    log.append(b"one")
    before, size = contents(log.fds), log.size_bytes
    for room in (0, 1, 8, 9, 50, 5000):
        with longest_file(size + room), pytest.raises(OSError, match="too large"):
            log.append(b"x" * 10000)
        assert contents(log.fds) == before
        assert log.size_bytes == size
    log.append(b"two")
    assert frames(Log.read(log.fds)) == [b"state 1", b"state 2", b"one", b"two"]


def test_a_sealed_memfd_refuses_and_loses_nothing(make_fds: Callable[..., Fds]) -> None:
    log = begun(make_fds())
    log.append(b"one")
    fcntl(log.fds[1], F_ADD_SEALS, F_SEAL_GROW)
    with pytest.raises(PermissionError):
        log.append(b"x" * 10000)
    assert frames(Log.read(log.fds)) == [b"state 1", b"state 2", b"one"]
    checkpointed(log, {}, [b"elsewhere"])
    assert frames(Log.read(log.fds)) == [b"elsewhere"]


@pytest.mark.parametrize("fails_at", ["opening", "write", "commit"])
def test_a_checkpoint_that_fails_is_given_up_and_the_log_goes_on(
    make_fds: Callable[..., Fds], fails_at: str
) -> None:
    log = begun(make_fds())
    log.append(b"one")
    checkpoint = None if fails_at == "opening" else log.begin_checkpoint({})
    size = os.fstat(log.fds[0]).st_size
    acts: dict[str, Callable[[], object]] = {
        "opening": lambda: log.begin_checkpoint({}),
        "write": lambda: checkpoint and checkpoint.write(b"x" * 5000),
        "commit": lambda: checkpoint and checkpoint.commit(),
    }
    with longest_file(size + 4), pytest.raises(OSError, match="too large"):
        acts[fails_at]()
    assert contents(log.fds)[0] == b""
    log.append(b"two")
    assert frames(Log.read(log.fds)) == [b"state 1", b"state 2", b"one", b"two"]
    checkpointed(log, {}, [b"state"])
    assert frames(Log.read(log.fds)) == [b"state"]


def test_short_writes_and_short_reads_are_gone_on_with(
    make_fds: Callable[..., Fds], monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, pwritev, pread = os.pwrite, os.pwritev, os.pread

    def some(fd: int, buffers: list[bytes], at: int) -> int:
        return pwrite(fd, b"".join(buffers)[:5], at)

    log = begun(make_fds())
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", some)
        patched.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data[:3]), at))
        for payload in (b"", b"ab", b"payload " * 10):
            log.append(payload)
    assert os.pwritev is pwritev
    expected = [b"state 1", b"state 2", b"", b"ab", b"payload " * 10]
    assert frames(Log.read(log.fds)) == expected
    monkeypatch.setattr(os, "pread", lambda fd, n, at: pread(fd, min(n, 7), at))
    assert frames(Log.read(log.fds)) == expected


def test_a_full_system_whose_leftovers_cannot_be_cut_off_harms_no_later_frame(
    make_fds: Callable[..., Fds], monkeypatch: pytest.MonkeyPatch
) -> None:
    log = begun(make_fds())
    pwrite = os.pwrite

    def full(fd: int, buffers: list[bytes], at: int) -> int:
        pwrite(fd, b"".join(buffers)[:-1], at)
        raise OSError(errno.ENOSPC, "full")

    def refuse(*_: int) -> None:
        raise OSError(errno.EIO, "cannot")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", full)
        patched.setattr(os, "ftruncate", refuse)
        with pytest.raises(OSError, match="full"):
            log.append(b"x" * 1000)
    log.append(b"one")
    found = Log.read(log.fds)
    assert frames(found) == [b"state 1", b"state 2", b"one"]
    assert found is not None
    assert found.cut > 900
