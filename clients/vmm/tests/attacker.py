"""A device's process that tries to get out of its grant (``python attacker.py FD``), for a test.

Owns the attempts. It becomes another user first, if it can, then redeems the ticket that it was
given and tries one thing after the other; each answer goes back as a row. What an attempt answers
is the daemon's reason, the kernel's errno, or "DONE": then it got through.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rmem.v1 import session_pb2
from rmem_client import Client, RmemError
from rmem_client.constants import PAGE_BYTES
from rmem_client.session import Session
from rmem_vmm.channel import Channel, Hangup

PR_SET_DUMPABLE = 4
PTRACE_ATTACH = 16
SYS_PIDFD_GETFD, SYS_PROCESS_VM_READV = 438, 310
F_ADD_SEALS, F_SEAL_WRITE = fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE
GUESSES = 64
Attempt = tuple[str, Callable[[], object]]

libc = ctypes.CDLL(None, use_errno=True)


def become(uid: int) -> None:
    """Give up root; stay a process whose /proc is its own, as a device started by its user is."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def outcome(attempt: Callable[[], object]) -> tuple[str, str]:
    """Return how an attempt ended, in a word, and what the daemon said, without numbers."""
    try:
        attempt()
    except RmemError as refusal:
        return refusal.reason, re.sub(r"\d+", "N", refusal.message)
    except OSError as error:
        return errno.errorcode[error.errno or 0], ""
    return "DONE", ""


def syscall(number: int, *args: int) -> int:
    """Make a system call; raise OSError as Python would."""
    result: int = libc.syscall(*map(ctypes.c_long, (number, *args)))
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result


class Attacker:
    """The attempts, with what the VMM told of what there is."""

    def __init__(self, said: dict[str, Any], session: Session, client: Client) -> None:
        self.said = said
        self.session = session
        self.client = client
        self.directory = said["socket_dir"]
        self.pid = said["daemon_pid"]

    def attempts(self) -> Iterator[Attempt]:
        """Yield every attempt."""
        yield from self.granted()
        yield from self.beyond()
        yield from self.others()
        yield from self.host_only()
        yield from self.identities()
        yield from self.descriptors()
        if os.getuid() != self.said["daemon_uid"]:
            yield from self.as_another_user()

    def granted(self) -> Iterator[Attempt]:
        """What must go through: else all refusals below prove nothing."""
        s, part, at, n = self.session, self.said["part"], self.said["offset"], PAGE_BYTES
        yield "read the granted range", lambda: s.read_shared(part, at, n)
        yield "write the granted range", lambda: s.write_shared(part, at, b"x" * n)
        yield "pin the granted range", lambda: s.unpin(s.pin(part, at, n))
        yield "map the whole file granted", lambda: os.close(s.fd(self.said["whole"]))

    def beyond(self) -> Iterator[Attempt]:
        s, part, at, n = self.session, self.said["part"], self.said["offset"], PAGE_BYTES
        yield "read the page before", lambda: s.read_shared(part, at - n, n)
        yield "read across its end", lambda: s.read_shared(part, at + n, 2 * n)
        yield "write the page after", lambda: s.write_shared(part, at + 2 * n, b"x")
        yield "pin the page after", lambda: s.pin(part, at + 2 * n, n)
        yield "take the file's descriptor", lambda: s.fd(part)
        yield (
            "write what is granted to read",
            lambda: s.write_shared(self.said["readable"], 0, b"x"),
        )
        yield "writable descriptor of that", lambda: s.fd(self.said["readable"])
        yield "read it by gRPC", lambda: self.client.files.read_shared(part, 0, n)
        yield "pin it by gRPC", lambda: self.client.files.pin(part, 0, n, purpose="DMA")

    def others(self) -> Iterator[Attempt]:
        s, n, close = self.session, PAGE_BYTES, self.client.sessions.close
        for whose in ("own tenant's", "other tenant's", "absent"):
            it = self.said[whose]
            yield f"read the {whose} file", lambda it=it: s.read_shared(it["file"], 0, n)
            yield f"descriptor of the {whose} file", lambda it=it: s.fd(it["file"])
            yield f"let the {whose} pin go", lambda it=it: s.unpin(it["pin"])
            yield f"unpin the {whose} pin by gRPC", lambda it=it: self.client.files.unpin(it["pin"])
            yield f"look at the {whose} file", lambda it=it: self.client.files.get(it["file"])
            yield f"close the {whose} session", lambda it=it: close(it["session"])

    def host_only(self) -> Iterator[Attempt]:
        c, vm, file = self.client, self.said["own tenant's"]["vm"], self.said["part"]
        yield "read guest memory", lambda: self.session.read_guest(vm, 0, 0, 16)
        yield "convert memory", lambda: self.session.convert(vm, 0, PAGE_BYTES, private=False)
        yield "fault memory in", lambda: self.session.fault(vm, 0, PAGE_BYTES)
        yield "register page faults", lambda: self.session.register_faults(file, 0, PAGE_BYTES)
        yield "take references", lambda: self.session.get(file, 0, PAGE_BYTES)
        yield "make a VM", lambda: c.vms.create("gup")
        yield "look at the VM", lambda: c.vms.get(vm)
        yield "destroy the VM", lambda: c.vms.destroy(vm)
        yield "run the vCPU", lambda: c.vcpus.run(vm, 0)
        yield "make a file", lambda: c.files.create(vm, PAGE_BYTES)
        yield "punch the file", lambda: c.files.punch(file, 0, PAGE_BYTES)
        yield "convert the file", lambda: c.files.convert(file, 0, PAGE_BYTES, private=True)
        yield "close the file", lambda: c.files.close(file)
        yield "list the files", lambda: c.files.list()
        yield "list the sessions", lambda: c.sessions.list()
        yield "read a frame", lambda: c.host.read_physical(0)
        yield "migrate frames", lambda: c.host.migrate(pfns=[(0, 1)])
        yield "watch events", lambda: next(iter(c.watch()))
        grant = session_pb2.Grant(file=file, length_bytes=PAGE_BYTES)
        device = session_pb2.ROLE_DEVICE
        yield "grant itself more", lambda: c.sessions.create_ticket(device, grants=[grant])
        yield "revoke a grant", lambda: c.sessions.revoke(file, 0, PAGE_BYTES)

    def identities(self) -> Iterator[Attempt]:
        yield "call without a token", lambda: self._call("")
        yield f"guess {GUESSES} tokens", lambda: self._guess()
        yield "flip a bit of the token", lambda: self._call(flipped(self.session.token))
        yield "replay the ticket", lambda: self._redeem(bytes.fromhex(self.said["ticket"]))
        yield "guess a ticket", lambda: self._redeem(secrets.token_bytes(32))
        yield "token of a session that ended", self._stale_token
        yield "token at the TCP door", lambda: self._call(self.session.token, self.said["tcp"])
        yield "TCP door without a token", lambda: self._call("", self.said["tcp"])

    def descriptors(self) -> Iterator[Attempt]:
        fd = self.session.fd(self.said["whole"])
        size = os.fstat(fd).st_size
        yield "shrink the memfd", lambda: os.ftruncate(fd, 0)
        yield "grow the memfd", lambda: os.ftruncate(fd, 2 * size)
        yield "write past its end", lambda: os.pwrite(fd, b"x", size)
        yield "seal it against writes", lambda: fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_WRITE)
        readable = self.session.fd(self.said["readable"], read_only=True)
        yield "write a read-only descriptor", lambda: os.pwrite(readable, b"x", 0)
        yield (
            "map it writable",
            lambda: mmap.mmap(readable, PAGE_BYTES, mmap.MAP_SHARED, mmap.PROT_WRITE),
        )

    def as_another_user(self) -> Iterator[Attempt]:
        """What the kernel refuses to another user, and allows to the daemon's own."""
        readable = self.session.fd(self.said["readable"], read_only=True)
        mine = f"/proc/self/fd/{readable}"
        yield "reopen it for writing by /proc", lambda: os.close(os.open(mine, os.O_RDWR))
        yield "change its mode", lambda: os.fchmod(readable, 0o666)
        yield "list the daemon's descriptors", lambda: [*Path(f"/proc/{self.pid}/fd").iterdir()]
        yield "open one of them", lambda: os.open(f"/proc/{self.pid}/fd/3", os.O_RDONLY)
        yield "open the daemon's memory", lambda: os.open(f"/proc/{self.pid}/mem", os.O_RDONLY)
        yield "pidfd_getfd from the daemon", self._getfd
        yield "process_vm_readv of the daemon", self._vm_readv
        yield "ptrace the daemon", self._ptrace
        yield "signal the daemon", lambda: os.kill(self.pid, 0)
        yield "lock the daemon's directory", lambda: os.open(f"{self.directory}/x", os.O_CREAT)
        yield "become admin", lambda: Session.open(self.directory, role="admin").close()
        yield "be a VMM, and read the file", self._as_a_vmm

    def _call(self, token: str, tcp: str = "") -> None:
        to: dict[str, Any] = {"address": tcp, "insecure": True} if tcp else {
            "socket_dir": self.directory
        }  # fmt: skip
        with Client(token=token, reconnect_s=0, **to) as client:
            # where a token is good, this is what a device may do
            client.files.read_shared(self.said["part"], self.said["offset"], 16)

    def _guess(self) -> None:
        refusals = set()
        for _ in range(GUESSES):
            try:
                self._call(secrets.token_hex(32))
            except RmemError as refusal:
                refusals.add(refusal.reason)
                last = refusal
            else:
                return
        assert len(refusals) == 1
        raise last

    def _redeem(self, ticket: bytes) -> None:
        Session.open(self.directory, ticket=ticket).close()

    def _stale_token(self) -> None:
        with Session.open(self.directory, ticket=bytes.fromhex(self.said["second"])) as session:
            token = session.token
            self._call(token)
        self._call(token)

    def _as_a_vmm(self) -> None:
        with Session.open(self.directory, role="host") as mine:
            mine.read_shared(self.said["part"], self.said["offset"], PAGE_BYTES)

    def _getfd(self) -> None:
        pidfd = os.pidfd_open(self.pid)
        try:
            os.close(syscall(SYS_PIDFD_GETFD, pidfd, 3, 0))
        finally:
            os.close(pidfd)

    def _vm_readv(self) -> None:
        class Iovec(ctypes.Structure):
            _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))

        room = ctypes.create_string_buffer(8)
        here = Iovec(ctypes.addressof(room), 8)
        there = Iovec(0x400000, 8)
        args = (ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0)
        syscall(SYS_PROCESS_VM_READV, self.pid, *args)

    def _ptrace(self) -> None:
        libc.ptrace.restype = ctypes.c_long
        if libc.ptrace(PTRACE_ATTACH, self.pid, 0, 0) < 0:
            raise OSError(ctypes.get_errno(), "")


def flipped(token: str) -> str:
    """Return a token with one bit changed."""
    return token[:-1] + format(int(token[-1], 16) ^ 1, "x")


def be_a_tenant(channel: Channel, said: dict[str, Any]) -> None:
    """Be somebody else's VMM, with a VM, a file and a pin, until told to go."""
    with (
        Session.open(said["socket_dir"], role="host") as session,
        Client(said["socket_dir"], token=session.token) as client,
    ):
        vm = client.vms.create("gup")
        file = client.files.create(vm, 16 * PAGE_BYTES)
        pin = session.pin(file, 0, PAGE_BYTES)
        mine = {"vm": vm, "file": file, "pin": pin, "session": session.number}
        channel.send({"event": "ready", **mine})
        with suppress(Hangup):
            channel.receive()


def main() -> None:
    channel = Channel.inherited(int(sys.argv[1]))
    said, _ = channel.receive()
    if said["uid"] is not None:
        become(said["uid"])
    if said["do"] == "tenant":
        return be_a_tenant(channel, said)
    with (
        Session.open(said["socket_dir"], ticket=bytes.fromhex(said["ticket"])) as session,
        Client(said["socket_dir"], token=session.token) as client,
    ):
        for what, attempt in Attacker(said, session, client).attempts():
            answer, text = outcome(attempt)
            channel.send({"event": "row", "attempt": what, "answer": answer, "text": text})
    channel.send({"event": "done"})


if __name__ == "__main__":
    main()
