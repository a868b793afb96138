"""A device's process can reach nothing but its grant: every way out is tried, and listed."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from rmem.v1 import session_pb2
from rmem_client import Client
from rmem_client.constants import PAGE_BYTES
from rmem_client.session import Session
from rmem_vmm.channel import Channel, Hangup
from rmem_vmm.daemon import rmemd_command

ATTACKER = Path(__file__).with_name("attacker.py")
NOBODY, STRANGER = 65534, 65533
ROOT = os.getuid() == 0
PATIENCE_SECONDS = 60.0

DONE = "DONE"
ABSENT_FILE, ABSENT_PIN = "NO_SUCH_FILE", "NO_SUCH_PIN"
# what must be answered; an attempt that is not listed here fails the test
WANTED: dict[str, str] = {
    "read the granted range": DONE,
    "write the granted range": DONE,
    "pin the granted range": DONE,
    "map the whole file granted": DONE,
    "read the page before": "NOT_GRANTED",
    "read across its end": "NOT_GRANTED",
    "write the page after": "NOT_GRANTED",
    "pin the page after": "NOT_GRANTED",
    "take the file's descriptor": "NOT_GRANTED",
    "write what is granted to read": "NOT_GRANTED",
    "writable descriptor of that": "NOT_GRANTED",
    "read it by gRPC": "NOT_GRANTED",
    "pin it by gRPC": "NOT_GRANTED",
    **{
        f"{what} the {whose} {thing}": answer
        for whose in ("own tenant's", "other tenant's", "absent")
        for what, thing, answer in (
            ("read", "file", ABSENT_FILE),
            ("descriptor of", "file", ABSENT_FILE),
            ("let", "pin go", ABSENT_PIN),
            ("unpin", "pin by gRPC", ABSENT_PIN),
            ("look at", "file", ABSENT_FILE),
            ("close", "session", "NO_SUCH_SESSION"),
        )
    },
    **dict.fromkeys(
        (
            "read guest memory", "convert memory", "fault memory in", "register page faults",
            "take references", "make a VM", "look at the VM", "destroy the VM", "run the vCPU",
            "make a file", "punch the file", "convert the file", "close the file",
            "list the files", "list the sessions", "read a frame", "migrate frames",
            "watch events", "grant itself more", "revoke a grant",
        ),
        "ROLE_DENIED",
    ),
    "call without a token": "TOKEN_REQUIRED",
    "guess 64 tokens": "TOKEN_UNKNOWN",
    "flip a bit of the token": "TOKEN_UNKNOWN",
    "replay the ticket": "TOKEN_UNKNOWN",
    "guess a ticket": "TOKEN_UNKNOWN",
    "token of a session that ended": "TOKEN_UNKNOWN",
    "token at the TCP door": "TOKEN_UNKNOWN",
    "TCP door without a token": ABSENT_FILE,
    "shrink the memfd": "EPERM",
    "grow the memfd": "EPERM",
    "write past its end": "EPERM",
    "seal it against writes": "EPERM",
    "write a read-only descriptor": "EBADF",
    "map it writable": "EACCES",
}  # fmt: skip
# by the kernel, to another user than the daemon's
WANTED_OF_ANOTHER_USER = {
    "reopen it for writing by /proc": "EACCES",
    "change its mode": "EPERM",
    "list the daemon's descriptors": "EACCES",
    "open one of them": "EACCES",
    "open the daemon's memory": "EACCES",
    "pidfd_getfd from the daemon": "EPERM",
    "process_vm_readv of the daemon": "EPERM",
    "ptrace the daemon": "EPERM",
    "signal the daemon": "EPERM",
    "lock the daemon's directory": "EACCES",
    "become admin": "ROLE_DENIED",
    "be a VMM, and read the file": ABSENT_FILE,
}
WHY_SKIPPED = "skipped: the test does not run as root, so the device has the daemon's own uid"


class Shared:
    """A daemon that other users may come to, with a TCP door."""

    def __init__(self, directory: Path) -> None:
        ready, theirs = os.pipe()
        self.socket_dir = directory / "s"
        self._log = directory / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    *rmemd_command(), "serve", "--socket-dir", str(self.socket_dir),
                    "--host-memory", "64M", "--set", "access.mode=shared", "--log-json",
                    "--no-keeper", "--tcp", "127.0.0.1:0", "--insecure", "--ready-fd", str(theirs),
                ],
                pass_fds=[theirs], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        os.close(theirs)
        with os.fdopen(ready, "rb") as told:
            assert told.readline(), self._log.read_text()

    @property
    def tcp(self) -> str:
        events = [json.loads(line) for line in self._log.read_text().splitlines()]
        return str(next(event["tcp"] for event in events if event["event"] == "serving"))


@pytest.fixture
def daemon_for_all(short_directory: Path) -> Iterator[Shared]:
    daemon = Shared(short_directory)
    yield daemon
    daemon.process.terminate()
    assert daemon.process.wait(PATIENCE_SECONDS) == 0


class Stranger:
    """A process that is started with one descriptor and becomes another user."""

    def __init__(self, said: dict[str, Any]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel = Channel(ours)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, str(ATTACKER), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={}, cwd="/",
            )  # fmt: skip
        self._channel.send(said)

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._channel.close()
        self.process.wait(PATIENCE_SECONDS)

    def next(self) -> dict[str, Any]:
        assert select.select([self._channel], [], [], PATIENCE_SECONDS)[0], "it is silent"
        try:
            return self._channel.receive()[0]
        except Hangup:
            pytest.fail(f"it ended with status {self.process.wait(PATIENCE_SECONDS)}")

    def rows(self) -> dict[str, tuple[str, str]]:
        """What was tried: the answer in a word, and what the daemon said."""
        rows: dict[str, tuple[str, str]] = {}
        while (said := self.next())["event"] == "row":
            rows[said["attempt"]] = said["answer"], said["text"]
        return rows


def grants_of(client: Client, part: int, whole: int, readable: int) -> list[session_pb2.Grant]:
    offset, size = 4 * PAGE_BYTES, 16 * PAGE_BYTES
    return [
        session_pb2.Grant(file=part, offset_bytes=offset, length_bytes=2 * PAGE_BYTES),
        session_pb2.Grant(file=whole, length_bytes=size),
        session_pb2.Grant(file=readable, length_bytes=size, read_only=True),
    ]


def show(rows: dict[str, str]) -> None:
    table = Table("attempt", "answer", title="A device's process, and what it was answered")
    for attempt, answer in rows.items():
        table.add_row(attempt, answer)
    Console(width=100).print(table)


def test_a_device_process_reaches_nothing_but_its_grant(daemon_for_all: Shared) -> None:
    directory = str(daemon_for_all.socket_dir)
    common = {"socket_dir": directory, "daemon_uid": os.getuid()}
    stranger = {"do": "tenant", "uid": STRANGER if ROOT else None, **common}
    with (
        Session.open(directory, role="host") as session,
        Client(directory, token=session.token) as client,
        Stranger(stranger) as tenant,
    ):
        other = tenant.next()
        vm = client.vms.create("gup")
        client.vcpus.create(vm)
        files = [client.files.create(vm, 16 * PAGE_BYTES) for _ in range(4)]
        part, whole, readable, ungranted = files
        pin = session.pin(ungranted, 0, PAGE_BYTES)
        grants = grants_of(client, part, whole, readable)
        tickets = [
            client.sessions.create_ticket(session_pb2.ROLE_DEVICE, grants=grants).hex()
            for _ in range(2)
        ]
        said = {
            "do": "attack", "uid": NOBODY if ROOT else None, **common, "ticket": tickets[0],
            "second": tickets[1], "part": part, "offset": 4 * PAGE_BYTES, "whole": whole,
            "readable": readable, "tcp": daemon_for_all.tcp,
            "daemon_pid": daemon_for_all.process.pid,
            "own tenant's": {"vm": vm, "file": ungranted, "pin": pin, "session": session.number},
            "other tenant's": other,
            "absent": {"vm": 999, "file": 999, "pin": 999, "session": 999},
        }  # fmt: skip
        with Stranger(said) as attacker:
            told = attacker.rows()
        rows = {attempt: answer for attempt, (answer, _) in told.items()}
        wanted = dict(WANTED)
        if ROOT:
            wanted |= WANTED_OF_ANOTHER_USER
        skipped = {} if ROOT else dict.fromkeys(WANTED_OF_ANOTHER_USER, WHY_SKIPPED)
        show(rows | skipped)
        assert rows == wanted
        # what is another's and what does not exist look the same
        for attempt in rows:
            if "absent" in attempt:
                for whose in ("own tenant's", "other tenant's"):
                    assert told[attempt.replace("absent", whose)] == told[attempt]
        # and all of it is as it was
        assert client.vms.get(vm).vm == vm
        assert [client.files.get(file).size_bytes for file in files] == [16 * PAGE_BYTES] * 4
        assert [held.pin for held in client.files.pins(ungranted).pins] == [pin]
