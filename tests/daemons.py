"""The real daemon as a process, and a client that speaks gRPC to any of its methods.

``Daemon`` starts ``rmemd serve``, waits on the ready descriptor and never sleeps, keeps the log,
and ends by SIGTERM. ``Rpc`` calls methods by their descriptors, with messages or raw bytes, so that
a test can go over every RPC there is.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import grpc
from google.longrunning import operations_pb2
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from rmem.v1 import (
    consumer_pb2,
    file_pb2,
    host_pb2,
    job_pb2,
    session_pb2,
    trace_pb2,
    types_pb2,
    vcpu_pb2,
    vm_pb2,
    watch_pb2,
)
from rmem_client import Client

BIN = Path(sys.executable).parent
# for tests that read the daemon's /proc/PID/fd, which is root's alone of a process without dumps
DEBUGGABLE = ("--set", "daemon.debuggable=true")
PATIENCE_SECONDS = 30.0
MODULES = (
    consumer_pb2, file_pb2, host_pb2, job_pb2, operations_pb2, session_pb2, trace_pb2, vcpu_pb2,
    vm_pb2, watch_pb2,
)  # fmt: skip
METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for module in MODULES
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
SERVICES = sorted({method.containing_service.full_name for method in METHODS.values()})
CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", 16 << 20),
]


class Daemon:
    """A process that runs ``rmemd serve`` in ``directory/socket``; its log is kept beside it.

    It has no keeper unless ``--keeper`` is among the options, so that a killed one is gone. With a
    keeper, ``process`` is that, and ``pid`` the daemon itself; ``kill`` ends both.

    Attributes:
        program: what ``rmemd`` is run by, if not by the script of this environment.
    """

    program: tuple[str, ...] = ()

    def __init__(
        self, directory: Path, *options: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.directory = directory
        self.socket_dir = directory / "socket"
        self.socket = self.socket_dir / "rmemd.sock"
        self.options = options
        self.is_kept = "--keeper" in options
        self.env = {**os.environ, **(env or {})}
        self.ready_line = ""
        self._log_path = directory / "log"
        self._signalled = False
        self._clients: list[Any] = []

    # --- the process -------------------------------------------------------------------------
    def spawn(self) -> int:
        """Start the process; return the reading end of the ready descriptor."""
        self.directory.mkdir(parents=True, exist_ok=True)
        ready, ready_of_daemon = os.pipe()
        command = [
            *(self.program or (str(BIN / "rmemd"),)), "serve", "--config", os.devnull,
            "--socket-dir", str(self.socket_dir),
            "--ready-fd", str(ready_of_daemon), *([] if self.is_kept else ["--no-keeper"]),
            *self.options,
        ]  # fmt: skip
        with self._log_path.open("ab") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                pass_fds=[ready_of_daemon], env=self.env,
            )  # fmt: skip
        os.close(ready_of_daemon)
        return ready

    def start(self) -> Daemon:
        """Start the process and wait until it says that it serves."""
        ready = self.spawn()
        self.ready_line = read_line(ready)
        os.close(ready)
        if not self.ready_line:
            self.kill()
            raise AssertionError(f"the daemon did not start:\n{self.log}")
        return self

    def stop(self) -> None:
        """End the daemon by SIGTERM; it must drain and exit with 0."""
        self.signal(signal.SIGTERM)
        code = self.wait()
        assert code == 0, f"exit code {code}:\n{self.log}"
        assert not self.socket.exists(), "the socket is still there"

    def signal(self, number: signal.Signals) -> None:
        """Send the signal that ends the daemon, once: a second one would end it at once."""
        if not self._signalled and self.process.poll() is None:
            self._signalled = True
            self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for the process to end and return its exit code."""
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the daemon did not end:\n{self.log}") from None
        finally:
            self.close_clients()

    def kill(self) -> None:
        """End the daemon by SIGKILL, and the keeper with it."""
        if self.is_kept and self.process.poll() is None:
            # a keeper that was asked to end starts nothing more, and has nothing left to end
            self.process.terminate()
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
        else:
            self.process.kill()
        self.process.wait(PATIENCE_SECONDS)
        self.close_clients()

    @property
    def pid(self) -> int:
        """Return the process that serves, which a keeper may have started; it must serve."""
        if not self.is_kept:
            return self.process.pid
        with Client(self.socket_dir) as client:
            return client.host.get().daemon_pid

    def kill_served(self) -> int:
        """Kill the process that serves, as a crash would; return which it was."""
        killed = self.pid
        os.kill(killed, signal.SIGKILL)
        return killed

    @property
    def log(self) -> str:
        """Return what the daemon has written to stdout and stderr so far."""
        return self._log_path.read_text()

    @property
    def log_lines(self) -> list[dict[str, Any]]:
        """Return the log's lines, each of which is a JSON object."""
        return [json.loads(line) for line in self.log.splitlines()]

    def fds(self) -> dict[str, str]:
        """Return the daemon's open descriptors and what they are; start it with DEBUGGABLE."""
        found = {}
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                found[entry.name] = str(entry.readlink())
            except FileNotFoundError:  # closed while we looked
                continue
        return found

    # --- clients -----------------------------------------------------------------------------
    def client(self, **options: Any) -> Client:
        """Return a new client; it is closed with the daemon."""
        made = Client(self.socket_dir, **options)
        self._clients.append(made)
        return made

    def rpc(self) -> Rpc:
        """Return a new channel; it is closed with the daemon."""
        made = Rpc(self.socket)
        self._clients.append(made)
        return made

    def close_clients(self) -> None:
        """Close every client that was made."""
        while self._clients:
            self._clients.pop().close()


def read_line(fd: int, patience: float = PATIENCE_SECONDS) -> str:
    """Read from a pipe up to the end of a line, or its end."""
    data = b""
    end = time.monotonic() + patience
    while not data.endswith(b"\n"):
        if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
            raise AssertionError(f"nothing to read within {patience} s, after {data!r}")
        piece = os.read(fd, 4096)
        if not piece:
            break
        data += piece
    return data.decode()


def eventually(question: Callable[[], Any], patience: float = PATIENCE_SECONDS) -> Any:
    """Ask until the answer is true, and return it; every question must itself take its time."""
    end = time.monotonic() + patience
    while True:
        answer = question()
        if answer or time.monotonic() > end:
            return answer


def run_cli(daemon: Daemon, *args: str, patience: float = 60) -> subprocess.CompletedProcess[str]:
    """Run rmemctl against a daemon."""
    command = [str(BIN / "rmemctl"), "--socket-dir", str(daemon.socket_dir), *args]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=patience, env=daemon.env, check=False
    )


# --- calls by descriptor -------------------------------------------------------------------------
@dataclass
class Answer:
    """What came back of a call: a reply, or a status with its details."""

    method: str
    code: grpc.StatusCode
    message: str = ""
    reply: Any = None
    status: Any = None

    @property
    def ok(self) -> bool:
        """Return whether the call was not refused."""
        return self.code is grpc.StatusCode.OK

    @cached_property
    def refusal(self) -> types_pb2.Refusal | None:
        """Return the Refusal detail."""
        return self._detail(types_pb2.Refusal())

    @cached_property
    def info(self) -> error_details_pb2.ErrorInfo | None:
        """Return the ErrorInfo detail."""
        return self._detail(error_details_pb2.ErrorInfo())

    @property
    def reason(self) -> str:
        """Return the refusal's reason, "" without one."""
        return self.refusal.reason if self.refusal is not None else ""

    def _detail(self, empty: Any) -> Any:
        for packed in self.status.details if self.status is not None else ():
            if packed.Unpack(empty):
                return empty
        return None


class Rpc:
    """A channel to a daemon's socket."""

    def __init__(self, socket: Path, token: str = "") -> None:
        self.channel = grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS)
        self.metadata = [("rmem-token", token)] if token else []

    @classmethod
    def over(cls, channel: grpc.Channel) -> Rpc:
        """Return one over another channel."""
        made = cls.__new__(cls)
        made.channel, made.metadata = channel, []
        return made

    def close(self) -> None:
        """Close the channel."""
        self.channel.close()

    def call(
        self,
        name: str,
        request: Message | None = None,
        deadline: float = 20.0,
        metadata: Sequence[tuple[str, str]] = (),
        **fields: Any,
    ) -> Answer:
        """Call a method with a message of its type, or one made of fields."""  # fmt: skip
        if request is None:
            request = GetMessageClass(METHODS[name].input_type)(**fields)
        return self.call_raw(name, request.SerializeToString(), deadline, metadata)

    def call_raw(
        self,
        name: str,
        data: bytes,
        deadline: float = 20.0,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Answer:
        """Call a method with bytes; of a stream, take the first message."""
        sent = [*self.metadata, *metadata]
        method = METHODS[name]
        path = f"/{method.containing_service.full_name}/{name}"
        decode = GetMessageClass(method.output_type).FromString
        try:
            if method.server_streaming:
                stream = self.channel.unary_stream(path, None, decode)(
                    data, timeout=deadline, metadata=sent
                )
                reply = next(stream)
                stream.cancel()
            else:
                reply = self.channel.unary_unary(path, None, decode)(
                    data, timeout=deadline, metadata=sent
                )
        except grpc.RpcError as error:
            return _refused(name, error)
        return Answer(name, grpc.StatusCode.OK, reply=reply)


def _refused(name: str, error: Any) -> Answer:
    return Answer(name, error.code(), error.details() or "", status=rpc_status.from_call(error))


def services() -> Iterator[Any]:
    """Yield every service's descriptor."""
    for module in MODULES:
        yield from module.DESCRIPTOR.services_by_name.values()
