"""Messages between a VMM and its children: JSON datagrams with file descriptors beside them.

Owns the socketpair and the children at its ends. A child is started with one descriptor and an
empty environment: whatever it may know or hold (a ticket, doorbells, a disk) comes in messages, as
vhost-user does it. A child that ends is noticed as the end of its channel.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

MESSAGE_MAX = 128 * 1024
FDS_MAX = 8
# a child that was asked and says nothing for so long is stuck
SILENCE_SECONDS = 60.0

Message = dict[str, Any]


class ChildFailed(Exception):
    """A child ended, failed or is stuck; the message says which and how."""


class Hangup(Exception):
    """The other end of a channel is gone."""


class Channel:
    """One end of a pair of sockets that keeps messages apart.

    Args:
        own: the socket, which the channel owns from now on.
    """

    def __init__(self, own: socket.socket) -> None:
        self._socket = own

    @classmethod
    def inherited(cls, fd: int) -> Channel:
        """Return the channel that this process was started with."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """Return its descriptor, for ``select``."""
        return self._socket.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send a message, with copies of descriptors.

        Raises:
            Hangup: nobody is there.
        """
        data = json.dumps(message).encode()
        try:
            if fds:
                socket.send_fds(self._socket, [data], list(fds))
            else:
                self._socket.send(data)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise Hangup from error

    def receive(self) -> tuple[Message, list[int]]:
        """Wait for a message; return it and its descriptors.

        Raises:
            Hangup: the other end is gone.
        """
        try:
            data, fds, _, _ = socket.recv_fds(self._socket, MESSAGE_MAX, FDS_MAX)
        except ConnectionResetError as error:
            raise Hangup from error
        if not data:
            raise Hangup
        message: Message = json.loads(data)
        return message, fds

    def ask(self, message: Message) -> Message:
        """Send a message and wait for the next one, which is its answer."""
        self.send(message)
        return self.receive()[0]

    def close(self) -> None:
        """Hang up."""
        self._socket.close()


def be_child(serve: Callable[[Channel], None], *failures: type[Exception]) -> int:
    """Be a child with a channel, whose number is the first argument; return the exit status.

    Args:
        serve: what it does, until it is done or nobody is at the other end.
        failures: what ends it with a message that says why.
    """
    channel = Channel.inherited(int(sys.argv[1]))
    try:
        serve(channel)
    except Hangup:
        return os.EX_OK
    except failures as error:
        channel.send({"event": "failed", "text": f"{type(error).__name__}: {error}"})
        return os.EX_SOFTWARE
    return os.EX_OK


class Child:
    """A process of the VMM, and the channel to it.

    Args:
        name: how messages call it.
        module: the module that it runs.
        uid: the user and group that it becomes; ``None``: this one's.

    Attributes:
        name: how messages call it.
        channel: the VMM's end.
        process: the process.
        session: its session with the daemon, once it is ready.
    """

    session = 0

    def __init__(self, name: str, module: str, *, uid: int | None = None) -> None:
        self.name = name
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel = Channel(ours)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env={}, user=uid, group=uid,
                extra_groups=None if uid is None else [], cwd="/",
            )  # fmt: skip

    def tell(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send it a message.

        Raises:
            ChildFailed: it has ended.
        """
        try:
            self.channel.send(message, fds)
        except Hangup:
            raise self.ended() from None

    def next(self, timeout_s: float = SILENCE_SECONDS) -> Message:
        """Wait for what it says next.

        Raises:
            ChildFailed: it ended, said that it failed, or is silent.
        """
        readable, _, _ = select.select([self.channel], [], [], timeout_s)
        if not readable:
            raise ChildFailed(f"{self.name} is silent")
        try:
            message, _ = self.channel.receive()
        except Hangup:
            raise self.ended() from None
        if message.get("event") == "failed":
            raise ChildFailed(f"{self.name}: {message['text']}")
        return message

    def ended(self) -> ChildFailed:
        """Return its end as an error."""
        return ChildFailed(f"{self.name} ended with status {self.process.wait(SILENCE_SECONDS)}")

    def finish(self) -> None:
        """Hang up, and wait until it has ended well.

        Raises:
            ChildFailed: it did not.
        """
        self.channel.close()
        if self.process.wait(SILENCE_SECONDS):
            raise ChildFailed(f"{self.name} ended with status {self.process.returncode}")

    def kill(self) -> None:
        """End it at once, if it still runs."""
        self.channel.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
