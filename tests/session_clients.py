"""Client processes for tests of the session socket: started in milliseconds, told what to do.

``Clients`` starts one process that has imported the client library and forks the others; each
``ClientProcess`` then does what ``do`` names: a method of its ``Session``, or one of ``_COMMANDS``.
They can be killed, forked and given another user.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 30.0


class ClientRefused(Exception):
    """The client's call raised; ``kind`` is its error's class, ``reason`` what the daemon said."""

    def __init__(self, kind: str, reason: str, errno: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind, self.reason, self.errno = kind, reason, errno


class ClientProcess:
    """One client process."""

    def __init__(self, control: socket.socket) -> None:
        control.settimeout(PATIENCE_SECONDS)
        self._control = control
        self._lines = control.makefile("r")
        self.pid: int = json.loads(self._lines.readline())["pid"]
        self.pidfd = os.pidfd_open(self.pid)
        self.session = 0
        self.token = ""

    def open(self, socket_dir: Path, **how: str) -> ClientProcess:
        """Have it open its session."""
        told = self.do("open", str(socket_dir), **how)
        self.session, self.token = told["session"], told["token"]
        return self

    def do(self, name: str, *args: Any, **named: Any) -> Any:
        """Have it do something, and return the result; bytes travel as {"hex": ...}."""
        self.begin(name, *args, **named)
        return self.end()

    def begin(self, name: str, *args: Any, **named: Any) -> None:
        """Have it do something, without waiting."""
        line = json.dumps({"do": name, "args": args, "named": named}, default=_hex)
        self._control.sendall(f"{line}\n".encode())

    def end(self) -> Any:
        """Wait for what ``begin`` began."""
        line = self._lines.readline()
        assert line, f"client {self.pid} is gone"
        told = json.loads(line, object_hook=_unhex)
        if "error" in told:
            raise ClientRefused(*told["error"])
        return told["result"]

    def kill(self) -> None:
        """End it by SIGKILL, and wait until its pidfd says so."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        self.wait_dead()

    def wait_dead(self) -> None:
        """Wait until its pidfd says that it has ended."""
        assert select.select([self.pidfd], [], [], PATIENCE_SECONDS)[0], "it does not end"

    def close(self) -> None:
        """Let the control connection go."""
        self._lines.close()
        self._control.close()
        os.close(self.pidfd)


class Clients:
    """Starts client processes; all of them end with it."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="rmem-clients-")
        path = Path(self._directory.name)
        # a client that has become somebody else connects back too
        path.chmod(0o711)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path / "control"))
        (path / "control").chmod(0o666)
        self._listener.listen(64)
        self._listener.settimeout(PATIENCE_SECONDS)
        self._forker = subprocess.Popen(
            [sys.executable, __file__, str(path / "control")], stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        self._made: list[ClientProcess] = []

    def __call__(self) -> ClientProcess:
        """Start one."""
        assert self._forker.stdin is not None
        self._forker.stdin.write(b".")
        self._forker.stdin.flush()
        control, _ = self._listener.accept()
        self._made.append(ClientProcess(control))
        return self._made[-1]

    def close(self) -> None:
        """End every process, children of clients included."""
        os.killpg(self._forker.pid, signal.SIGKILL)
        self._forker.wait(PATIENCE_SECONDS)
        assert self._forker.stdin is not None
        self._forker.stdin.close()
        for one in self._made:
            one.close()
        self._listener.close()
        self._directory.cleanup()


def _hex(value: object) -> object:
    assert isinstance(value, (bytes, bytearray)), value
    return {"hex": value.hex()}


def _unhex(found: dict[str, Any]) -> Any:
    return bytes.fromhex(found["hex"]) if found.keys() == {"hex"} else found


# --- in the client process -----------------------------------------------------------------------
class _Client:
    session: Any = None

    def __init__(self) -> None:
        self.held: list[Any] = []

    def do_open(self, socket_dir: str, role: str = "", ticket: str = "") -> Any:
        from rmem_client.session import Session

        self.session = Session.open(socket_dir, role=role, ticket=bytes.fromhex(ticket))
        s = self.session
        return {
            "session": s.number, "token": s.token, "tenant": s.tenant, "role": s.role, "vm": s.vm
        }  # fmt: skip

    def do_become(self, uid: int) -> None:
        os.setgroups([])
        os.setgid(uid)
        os.setuid(uid)

    def do_fork(self) -> int:
        """Make a child that has all that we have, and does nothing."""
        child = os.fork()
        if not child:
            while True:
                signal.pause()
        return child

    def do_map(self, file: int, read_only: bool = False) -> int:
        memory = self.session.shared_memory(file, read_only=read_only)
        memory.__enter__()
        self.held.append(memory)
        return len(memory.view)

    def do_peek(self, offset: int, length: int) -> bytes:
        return bytes(self.held[-1].view[offset : offset + length])

    def do_poke(self, offset: int, data: bytes) -> None:
        self.held[-1].view[offset : offset + len(data)] = data

    def do_many(self, name: str, calls: list[list[Any]]) -> list[Any]:
        return [getattr(self.session, name)(*args) for args in calls]

    def do_notice(self, timeout_s: float = PATIENCE_SECONDS) -> Any:
        notice = self.session.next_notice(timeout_s)
        return notice and vars(notice)

    def do_send(self, data: bytes, nfds: int = 0) -> None:
        """Send a datagram as it is, with descriptors."""
        sock = self.session._sock._sock if self.session else self.raw
        opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(nfds)]
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", opened))
        sock.sendmsg([data], [rights] if nfds else [])
        for fd in opened:
            os.close(fd)

    def do_connect(self, socket_dir: str) -> None:
        """Connect without a word."""
        self.raw = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.raw.settimeout(PATIENCE_SECONDS)
        self.raw.connect(f"{socket_dir}/session.sock")

    def do_resume_in_child(self, socket_dir: str, session: int, token: str) -> str:
        """Have a child, with all that it inherited, take the session up; return what it is told."""
        from rmem_client.sessionwire import Kind, decode, resume

        told, tells = os.pipe()
        if not os.fork():
            try:
                self.do_connect(socket_dir)
                self.raw.send(resume(session, token))
                kind = decode(memoryview(self.raw.recv(1 << 18))).kind
                os.write(tells, Kind(kind).name.encode())
            finally:
                os._exit(0)
        os.close(tells)
        with os.fdopen(told) as pipe:
            return pipe.read()

    def do_receive(self) -> bytes:
        """Return the next datagram, empty at the end."""
        try:
            return self.raw.recv(1 << 18)
        except ConnectionError:
            return b""

    def do_reopen(self, file: int, read_only: bool) -> str:
        """Get a descriptor and try to open it again for writing, through /proc."""
        fd = self.session.fd(file, read_only=read_only)
        try:
            os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
            return "opened"
        except PermissionError:
            return "refused"
        finally:
            os.close(fd)

    def do_grow(self, file: int) -> list[str]:
        """Get a descriptor, and try what its seals forbid."""
        import fcntl

        fd = self.session.fd(file)
        size = os.fstat(fd).st_size
        tried = {
            "shrink": lambda: os.ftruncate(fd, size - 4096),
            "grow": lambda: os.ftruncate(fd, size + 4096),
            "write past the end": lambda: os.pwrite(fd, b"x", size),
            "seal writes": lambda: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
        }
        done = []
        for what, attempt in tried.items():
            try:
                attempt()
                done.append(what)
            except OSError:
                pass
        os.close(fd)
        return done


def _serve(path: str) -> None:
    control = socket.socket(socket.AF_UNIX)
    control.connect(path)
    control.sendall(f"{json.dumps({'pid': os.getpid()})}\n".encode())
    client = _Client()
    for line in control.makefile("r"):
        asked = json.loads(line, object_hook=_unhex)
        call = getattr(client, f"do_{asked['do']}", None) or getattr(client.session, asked["do"])
        try:
            told: Any = {"result": call(*asked["args"], **asked["named"])}
        except Exception as error:
            reason, errno = getattr(error, "reason", ""), getattr(error, "errno_name", "")
            told = {"error": [type(error).__name__, reason, errno, str(error)]}
        control.sendall(f"{json.dumps(told, default=_hex)}\n".encode())
    os._exit(0)


def main(path: str) -> None:
    """Fork a client for every byte on stdin."""
    # what a client of another user may no longer be able to read
    import rmem_client.errors
    import rmem_client.session  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while os.read(0, 1):
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            try:
                _serve(path)
            finally:
                os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
