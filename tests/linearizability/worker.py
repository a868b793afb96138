"""A client process: seeded calls on a few objects, over both doors, each with what came back.

Owns the way from a model's call to gRPC or to the session socket, and back to a result in the
model's words. Processes of one recording do each history together: a barrier begins it for all.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from threading import Barrier
from typing import Any

import grpc
from daemons import Answer, Rpc

from linearizability.checker import OPEN, Operation
from linearizability.models import DONE, NPAGES, Refused
from rmem_client.errors import RmemError
from rmem_client.session import Session

PAGE = 4096
PRIVATE = 8
KEEP_SIZE, PUNCH = 1, 3
GRPC, SESSION = "grpc", "session"
# calls that either door has; the others are gRPC's alone
BOTH_DOORS = {"read", "write", "pin", "unpin", "convert", "set"}
# queries, which are answered with the very revision that they looked at
EXACT = {"stat", "pins", "get", "look"}
WEIGHTS = {
    "halves": {"allocate": 3, "punch": 3, "read": 3, "write": 4, "stat": 4},
    "in-place": {
        "pin": 4, "unpin": 2, "pins": 3, "convert": 4, "read": 2, "write": 3, "punch": 1,
        "allocate": 1, "stat": 3,
    },
    "machine": {"set": 5, "get": 5, "look": 1},
}  # fmt: skip
ENDS = {"halves": "close", "in-place": "close", "machine": "destroy"}
END_CHANCE = 0.04
# of gRPC calls, those that are given so little time that their answer is often not waited for
HURRIED_CHANCE, HURRIED_SECONDS = 0.03, 0.0004
PATIENCE_SECONDS = 20.0
_OF_VMS = {
    "set": "SetMemoryAttributes", "get": "GetMemoryAttributes", "look": "GetVm",
    "destroy": "DestroyVm",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """An object of a history: ``kind`` names its model, ``gpa`` is where a VM's range begins."""

    kind: str
    number: int
    gpa: int = 0


@dataclass(frozen=True)
class Round:
    """One history to be made: its objects, and how many calls each client makes."""

    history: int
    targets: tuple[Target, ...]
    calls: int


class Worker:
    """One client, with a session and a channel in that session's name."""

    def __init__(self, client: int, seed: int, socket_dir: str) -> None:
        self._client, self._seed = client, seed
        self._session = Session.open(socket_dir)
        self._rpc = Rpc(Path(socket_dir) / "rmemd.sock", self._session.token)
        self._pins: dict[int, dict[str, int]] = {}

    def close(self) -> None:
        """Let both doors go, and with the session its pins."""
        self._rpc.close()
        self._session.close()

    def play(self, one: Round) -> list[tuple[int, Operation]]:
        """Make this client's calls of a history; return each with its object's index."""
        random = Random(f"{self._seed}/{one.history}/{self._client}")
        self._pins = {}
        made = []
        for step in range(one.calls):
            at = random.randrange(len(one.targets))
            call, args = self._choose(random, one.targets[at], f"{self._client}.{step}")
            made.append((at, self._make(random, one.targets[at], call, args)))
        return made

    def _choose(self, random: Random, target: Target, label: str) -> tuple[str, tuple[Any, ...]]:
        if random.random() < END_CHANCE:
            return ENDS[target.kind], ()
        weights = WEIGHTS[target.kind]
        (call,) = random.choices(list(weights), list(weights.values()))
        first = random.randrange(NPAGES)
        count = random.randint(1, NPAGES - first)
        mine = self._pins.setdefault(target.number, {})
        if call == "unpin":
            # only its own, while it has one
            return ("unpin", (random.choice(list(mine)),)) if mine else ("pins", ())
        args: tuple[Any, ...] = {
            "allocate": (first, count), "punch": (first, count), "get": (first, count),
            "set": (first, count, random.random() < 0.5),
            "convert": (first, count, random.random() < 0.5),
            "pin": (first, count, label), "read": (first,),
            "write": (first, random.getrandbits(62) + 1),
        }.get(call, ())  # fmt: skip
        return call, args

    def _make(self, random: Random, target: Target, call: str, args: tuple[Any, ...]) -> Operation:
        door = random.choice((GRPC, SESSION)) if call in BOTH_DOORS else GRPC
        hurried = door == GRPC and random.random() < HURRIED_CHANCE
        deadline = HURRIED_SECONDS if hurried else PATIENCE_SECONDS
        invoked = time.monotonic_ns()
        if door == SESSION:
            revision, result = self._by_session(target, call, args)
        else:
            revision, result = self._by_grpc(target, call, args, deadline)
        returned = time.monotonic_ns() if revision else OPEN
        if call == "unpin":
            del self._pins[target.number][args[0]]
        looked = call in EXACT and not isinstance(result, Refused)
        # each of these calls is one commit at most, and is answered with that
        commits = has_committed(call, result)
        return Operation(
            self._client, call, args, invoked, returned, result, revision or None,
            bool(revision) and (looked or commits), commits, door=door,
        )  # fmt: skip

    # --- the session socket --------------------------------------------------------------------
    def _by_session(self, target: Target, call: str, args: tuple[Any, ...]) -> tuple[int, Any]:
        session, number = self._session, target.number
        lo = args[0] * PAGE if call != "unpin" else 0
        asks: dict[str, Callable[[], Any]] = {
            "read": lambda: _tag(session.read_shared(number, lo, 8)),
            "write": lambda: session.write_shared(number, lo, struct.pack("<q", args[1])),
            "pin": lambda: self._pinned(target, args, session.pin(
                number, lo, args[1] * PAGE, args[2])),
            "unpin": lambda: session.unpin(self._pins[number][args[0]]),
            "convert": lambda: tuple(
                session.convert_file(number, lo, args[1] * PAGE, private=args[2])),
            "set": lambda: int(not session.convert(
                number, target.gpa + lo, args[1] * PAGE, private=args[2])),
        }  # fmt: skip
        try:
            result = asks[call]()
        except RmemError as error:
            return error.revision, Refused(error.reason)
        # the newest that it was told, which is this reply's: it has one call open at a time
        return session.revision, DONE if result is None else result

    # --- gRPC ----------------------------------------------------------------------------------
    def _by_grpc(
        self, target: Target, call: str, args: tuple[Any, ...], deadline: float
    ) -> tuple[int, Any]:
        method, fields = self._request(target, call, args)
        answer = self._rpc.call(method, deadline=deadline, **fields)
        if answer.ok:
            return answer.reply.revision, self._result(target, call, args, answer)
        if answer.refusal is not None and answer.reason:
            return answer.refusal.revision, Refused(answer.reason)
        assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED, (method, answer)
        return 0, None

    def _request(
        self, target: Target, call: str, args: tuple[Any, ...]
    ) -> tuple[str, dict[str, Any]]:
        number = target.number
        if target.kind == "machine":
            at = {"gpa": target.gpa + args[0] * PAGE, "size_bytes": args[1] * PAGE} if args else {}
            if call == "set":
                at = {"ranges": [{**at, "attributes": PRIVATE * args[2]}]}
            return _OF_VMS[call], {"vm": number, **at}
        if call == "unpin":
            return "UnpinPages", {"pin": self._pins[number][args[0]]}
        if call == "pins":
            return "ListPins", {}
        lo = {"offset_bytes": args[0] * PAGE} if args else {}
        span = {**lo, "length_bytes": args[1] * PAGE} if len(args) > 1 and call != "write" else lo
        method, fields = {
            "allocate": ("Fallocate", {**span, "mode": KEEP_SIZE}),
            "punch": ("Fallocate", {**span, "mode": PUNCH}),
            "read": ("ReadShared", {**lo, "length_bytes": 8}),
            "write": ("WriteShared", lo),
            "stat": ("GetFile", {}),
            "pin": ("PinPages", span),
            "convert": ("ConvertFile", lo),
            "close": ("CloseFile", {}),
        }[call]
        return method, {"file": number, **fields, **_more(call, args)}

    def _result(self, target: Target, call: str, args: tuple[Any, ...], answer: Answer) -> Any:
        reply = answer.reply
        match call:
            case "allocate" | "punch":
                return reply.pages
            case "read":
                return _tag(reply.data)
            case "stat":
                return reply.file.private_pages, reply.file.shared_pages
            case "close":
                return reply.freed_pages
            case "pin":
                return self._pinned(target, args, reply.pin)
            case "pins":
                mine = [pin.purpose for pin in reply.pins if pin.file == target.number]
                return tuple(sorted(mine))
            case "convert":
                return reply.changed_pages, reply.content
            case "set":
                return reply.unchanged_ranges
            case "get":
                return tuple(
                    bool(run.attributes)
                    for run in reply.runs
                    for _ in range(run.size_bytes // PAGE)
                )
            case "look":
                return reply.vm.state
        return DONE

    def _pinned(self, target: Target, args: tuple[Any, ...], handle: int) -> str:
        self._pins.setdefault(target.number, {})[args[2]] = handle
        return DONE


def has_committed(call: str, result: Any) -> bool:
    """Return whether a reply says that the call changed what the journal records."""
    if isinstance(result, Refused) or result is None:
        return False
    if call in ("allocate", "punch"):
        return bool(result)
    if call == "convert":
        return bool(result[0])
    if call == "set":
        return not result
    return call in ("pin", "unpin", "close", "create", "destroy")


def _more(call: str, args: tuple[Any, ...]) -> dict[str, Any]:
    if call == "write":
        return {"data": struct.pack("<q", args[1])}
    if call == "pin":
        return {"purpose": args[2], "holder": "history"}
    if call == "convert":
        return {"size_bytes": args[1] * PAGE, "attributes": PRIVATE * args[2]}
    return {}


def _tag(data: bytes) -> int:
    return int(struct.unpack("<q", data)[0])


def serve(client: int, seed: int, socket_dir: str, barrier: Barrier, pipe: Connection) -> None:
    """Play the rounds that come through the pipe, until it says None."""
    worker = Worker(client, seed, socket_dir)
    pipe.send("ready")
    while (rounds := pipe.recv()) is not None:
        made = []
        for one in rounds:
            barrier.wait(PATIENCE_SECONDS)
            made.append(worker.play(one))
        pipe.send(made)
    worker.close()
