"""Real handshakes refused by a real gRPC server: the reasons are events, all else is as before."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from daemons import PATIENCE_SECONDS, eventually, read_line

from rmemd.daemon.certs import Made, Wanted, make

CLIENT, OLD = "spiffe://rmemd.test/a", "spiffe://rmemd.test/old"
# does what the daemon does, without the daemon; says when it serves, and ends as it is told
SERVER = """
import ctypes, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import grpc, structlog
from rmemd.daemon import logs
from rmemd.daemon.corelog import CoreLog

directory = Path(sys.argv[1])
logs.configure("info", True)
core = CoreLog()
core.start()
read = lambda name: (directory / name).read_bytes()
credentials = grpc.ssl_server_credentials(
    [(read("server.key"), read("server.pem"))], read("ca.pem"), require_client_auth=True)
server = grpc.server(ThreadPoolExecutor(2))
port = server.add_secure_port("127.0.0.1:0", credentials)
server.start()
print(port, flush=True)
libc = ctypes.CDLL(None)
for line in sys.stdin:
    match line.split():
        case ["python", text]:
            print(text, file=sys.stderr)
        case ["native", text]:
            libc.write(2, text.encode() + b"\\n", len(text) + 1)
        case ["core", text]:
            line = f"E1122 11:24:04.622900   12055 chttp2_server.cc:88] {text}\\n".encode()
            libc.write(2, line, len(line))
        case ["unfinished"]:
            libc.write(2, b"I1122 and no end", 16)
        case ["log", text]:
            structlog.get_logger().info(text)
        case ["flood", count]:
            for number in range(int(count)):
                libc.write(2, b"%08d\\n" % number, 9)
        case ["abort"]:
            libc.abort()
        case ["end"]:
            break
    print("done", flush=True)
server.stop(0).wait()
core.close()
core.close()
print("after", file=sys.stderr)
libc.write(2, b"and native\\n", 11)
"""


@dataclass
class Server:
    """The process, its port, and what it wrote to its stderr."""

    process: subprocess.Popen[str]
    path: Path
    port: int

    def tell(self, command: str) -> None:
        """Have it do something, and wait until it is done."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        assert read_line(self.process.stdout.fileno()) == "done\n"

    def end(self, command: str = "end") -> str:
        """Have it end; return all that it wrote."""
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.close()
        self.process.wait(PATIENCE_SECONDS)
        return self.written

    @property
    def written(self) -> str:
        """Return what it wrote so far."""
        return self.path.read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        """Return the events of that name so far."""
        lines = [json.loads(x) for x in self.written.splitlines() if x.startswith("{")]
        return [line for line in lines if line["event"] == name]


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("certs"), Wanted(clients=(CLIENT,), expired=(OLD,)))


@pytest.fixture
def server(certs: Made, tmp_path: Path) -> Iterator[Server]:
    path = tmp_path / "stderr"
    with path.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, certs.directory], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=stderr, text=True,
            env={k: v for k, v in os.environ.items() if k not in ("GRPC_VERBOSITY", "GRPC_TRACE")},
        )  # fmt: skip
    assert process.stdout is not None
    yield Server(process, path, int(read_line(process.stdout.fileno())))
    process.kill()
    process.wait(PATIENCE_SECONDS)
    for stream in (process.stdin, process.stdout):
        if stream is not None and not stream.closed:
            stream.close()


def knock(port: int, made: Made, name: str = "", ca: Made | None = None) -> None:
    """Shake hands as a client with that certificate, and wait until the server has had enough."""
    context = ssl.create_default_context(cafile=made.files["ca"][0])
    context.set_alpn_protocols(["h2"])
    if name:
        context.load_cert_chain(*(ca or made).files[name])
    with (
        socket.create_connection(("127.0.0.1", port), PATIENCE_SECONDS) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as tls,
        contextlib.suppress(OSError),
    ):
        assert tls.recv(1) == b""


@pytest.mark.parametrize(
    ("who", "reason"),
    [
        ("", "the peer has no certificate"),
        ("client-old", "the peer's certificate has expired"),
        ("server", "the peer's certificate is not for clients"),
    ],
)
def test_a_refused_handshake_is_an_event(
    server: Server, certs: Made, who: str, reason: str
) -> None:
    knock(server.port, certs, who)
    (told,) = eventually(lambda: server.tell("log tick") or server.events("tls_refused"))
    assert told["reason"] == reason
    assert told["level"] == "warning"
    assert "Handshake failed" not in server.end()


def test_a_certificate_of_another_ca(server: Server, certs: Made, tmp_path: Path) -> None:
    other = make(tmp_path / "other", Wanted(clients=(CLIENT,)))
    knock(server.port, certs, "client-a", other)
    (told,) = eventually(lambda: server.tell("log tick") or server.events("tls_refused"))
    assert told["reason"] == "the peer's certificate is of another CA"


def test_no_tls_at_all(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_SECONDS) as plain:
        plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(OSError):
            assert plain.recv(1) == b""
    (told,) = eventually(lambda: server.tell("log tick") or server.events("tls_refused"))
    assert told["reason"] == "the peer speaks HTTP without TLS"


def test_all_else_passes_through_and_in_order(server: Server) -> None:
    for number in range(50):
        server.tell(f"{'native' if number % 2 else 'python'} line{number}")
    server.tell("core broken")
    server.tell("unfinished")
    written = server.end()
    (told,) = server.events("grpc_core")
    assert (told["level"], told["text"]) == ("error", "broken")
    others = [line for line in written.splitlines() if not line.startswith("{")]
    # what had no end yet when the pipe was closed comes before what was written after
    assert others == [*(f"line{n}" for n in range(50)), "I1122 and no endafter", "and native"]


def test_nothing_is_lost_when_it_ends_at_once(server: Server) -> None:
    """Far more than a pipe holds, and the end right after it."""
    written = server.end("flood 300000")
    expected = "".join(f"{number:08}\n" for number in range(300000))
    assert written == expected + "after\nand native\n"


# a write that keeps the interpreter, so that the thread has not run when the end comes
ABRUPT = """
import ctypes
from rmemd.daemon.corelog import CoreLog

libc = ctypes.PyDLL(None)
for number in range(300):
    core = CoreLog()
    core.start()
    libc.write(2, b"%04d\\n" % number, 5)
    core.close()
"""


def test_nothing_is_lost_when_it_ends_before_it_was_read() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ABRUPT], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "".join(f"{number:04}\n" for number in range(300))


def test_nothing_is_lost_by_who_does_not_close() -> None:
    code = (
        "import sys; from rmemd.daemon.corelog import CoreLog; CoreLog().start(); "
        "sys.stderr.write('x' * 3000000 + '\\n'); sys.exit('cannot start')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "x" * 3000000 + "\ncannot start\n"


def test_a_crash_is_still_told(server: Server) -> None:
    server.tell("log before")
    written = server.end("abort")
    assert server.process.returncode == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in written
    assert '"event": "before"' in written
