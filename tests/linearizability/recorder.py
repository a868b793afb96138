"""Records histories: a daemon, client processes, a few objects each, and who overlapped whom.

Owns ``Recorder``. The objects of a batch are made beforehand, so that all clients find them; the
making of a VM is the first call of its history.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from daemons import Rpc

from linearizability.checker import Operation, Verdict, check
from linearizability.models import DONE, MODELS, NPAGES
from linearizability.worker import PAGE, PATIENCE_SECONDS, Round, Target, serve

CLIENTS = 6
# more calls of one object at a time would be more orders than a search can go over
CLIENTS_MAX = 16
CALLS = 5
BATCH = 25
# PERSONALITY_ATTRIBUTES, PERSONALITY_IN_PLACE, and a file's MMAP | INIT_SHARED
ATTRIBUTES, IN_PLACE, SHARED_AT_FIRST = 1, 2, 3
MAKER = -1


@dataclass(frozen=True)
class Recorded:
    """A history: its objects' kinds, and the calls on each."""

    number: int
    kinds: tuple[str, ...]
    objects: tuple[list[Operation], ...]

    @property
    def operations(self) -> int:
        """Return how many calls it has."""
        return sum(map(len, self.objects))

    def verdicts(self, *, revisions: bool = True) -> list[Verdict]:
        """Check each object by itself: linearizability is local."""
        return [
            check(calls, *MODELS[kind], revisions=revisions)
            for kind, calls in zip(self.kinds, self.objects, strict=True)
        ]


def overlaps(calls: list[Operation]) -> list[int]:
    """Return for each call how many of the same object were open while it was, itself included."""
    return [
        sum(other.invoked <= one.returned and one.invoked <= other.returned for other in calls)
        for one in calls
    ]


def median_overlap(histories: list[Recorded]) -> float:
    """Return the median of ``overlaps`` over all calls."""
    return median(n for one in histories for calls in one.objects for n in overlaps(calls))


class Recorder:
    """Client processes of one daemon."""

    def __init__(self, socket_dir: Path, seed: int, clients: int = CLIENTS) -> None:
        assert clients <= CLIENTS_MAX, clients
        context = multiprocessing.get_context("spawn")
        self._rpc = Rpc(socket_dir / "rmemd.sock")
        barrier = context.Barrier(clients)
        self._pipes, self._processes = [], []
        for client in range(clients):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(client, seed, str(socket_dir), barrier, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            self._receive(pipe)
        # a VM of each way to convert, whose files the histories are about
        self._homes = {
            "halves": self._make_vm(ATTRIBUTES)[0], "in-place": self._make_vm(IN_PLACE)[0]
        }  # fmt: skip

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self._processes:
            process.join(PATIENCE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        for pipe in self._pipes:
            pipe.close()
        self._rpc.close()

    def record(self, histories: int, first: int = 0) -> Iterator[Recorded]:
        """Record histories, a batch at a time."""
        for begin in range(first, first + histories, BATCH):
            yield from self._batch(range(begin, min(begin + BATCH, first + histories)))

    def _batch(self, numbers: range) -> list[Recorded]:
        made = [self._objects(number) for number in numbers]
        rounds = [
            Round(number, targets, CALLS)
            for number, (targets, _) in zip(numbers, made, strict=True)
        ]
        for pipe in self._pipes:
            pipe.send(rounds)
        played = [self._receive(pipe) for pipe in self._pipes]
        found = []
        for at, (one, (targets, creation)) in enumerate(zip(rounds, made, strict=True)):
            objects: tuple[list[Operation], ...] = tuple([] for _ in targets)
            objects[1].append(creation)
            for index, operation in (call for client in played for call in client[at]):
                objects[index].append(operation)
            found.append(Recorded(one.history, tuple(t.kind for t in targets), objects))
        for targets, _ in made:
            self._remove(targets)
        return with_floors(found)

    def _objects(self, number: int) -> tuple[tuple[Target, ...], Operation]:
        kind = ("halves", "in-place")[number % 2]
        made = self._rpc.call(
            "CreateFile", vm=self._homes[kind], size_bytes=NPAGES * PAGE, flags=SHARED_AT_FIRST
        )
        assert made.ok, made
        vm, creation = self._make_vm(ATTRIBUTES)
        return (Target(kind, made.reply.file), Target("machine", vm)), creation

    def _make_vm(self, personality: int) -> tuple[int, Operation]:
        invoked = time.monotonic_ns()
        made = self._rpc.call("CreateVm", consumer="sw-protected", personality=personality)
        assert made.ok, made
        returned, reply = time.monotonic_ns(), made.reply
        return reply.vm, Operation(
            MAKER, "create", (), invoked, returned, DONE, reply.revision, exact=True, commits=True,
            door="grpc",
        )  # fmt: skip

    def _remove(self, targets: tuple[Target, ...]) -> None:
        # what a history has removed already is refused
        self._rpc.call("CloseFile", file=targets[0].number)
        self._rpc.call("DestroyVm", vm=targets[1].number)

    def _receive(self, pipe: Any) -> Any:
        assert pipe.poll(3 * PATIENCE_SECONDS), "a client process does not answer"
        return pipe.recv()


def with_floors(histories: list[Recorded]) -> list[Recorded]:
    """Tell every call the highest revision in a reply that came before it, of whatever object."""
    calls = [op for one in histories for ops in one.objects for op in ops]
    replies = sorted((op.returned, op.revision or 0) for op in calls)
    floors: dict[int, int] = {}
    highest = at = 0
    for op in sorted(calls, key=lambda op: op.invoked):
        while replies[at : at + 1] and replies[at][0] < op.invoked:
            highest = max(highest, replies[at][1])
            at += 1
        floors[id(op)] = highest
    return [
        replace(
            one,
            objects=tuple([replace(op, floor=floors[id(op)]) for op in ops] for ops in one.objects),
        )
        for one in histories
    ]
