"""A session's conversation, on a thread of its own: HELLO, then requests until the end.

Owns receiving. Nothing a client sends reaches further than ``wire.decode`` unless it is whole, and
no descriptor it sends is ever installed in this process: there is no room for one, and the kernel
says that it dropped some.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence

import structlog

from rmem.v1 import session_pb2
from rmemd.access.callers import SOCKET, Access, Caller
from rmemd.engine.engine import Engine
from rmemd.errors import BAD_REQUEST, TOKEN_UNKNOWN, RmemError
from rmemd.model.sessions import SessionInfo
from rmemd.rpc.dispatch import name_error
from rmemd.rpc.observe import Observer
from rmemd.rpc.status import code_of, refusal_of
from rmemd.session import descriptors
from rmemd.session.connection import Connection
from rmemd.session.descriptors import Passed
from rmemd.session.expected import Expected, MakingWay
from rmemd.session.ops import Operations
from rmemd.session.wire import (
    DATAGRAM_MAX,
    Broken,
    Frame,
    Hello,
    Kind,
    Resume,
    Role,
    decode,
    decode_hello,
    decode_resume,
    frame,
    welcome,
)

# how a session ends, as the log has it
EOF, PROTOCOL, SILENT, REFUSED, SLOW = "eof", "protocol", "silent", "refused", "slow reader"
# not a session's end but the daemon's, after which another goes on with it
STOP = "stop"
# as plain numbers, since those of ``socket`` are slow to combine
_CUT_DESCRIPTORS, _CUT_BYTES = int(socket.MSG_CTRUNC), int(socket.MSG_TRUNC)
_CUT = _CUT_DESCRIPTORS | _CUT_BYTES

log = structlog.get_logger("rmemd.session")


class Gone(Exception):
    """The conversation is over; the message says why."""


class Talk:
    """One connection's conversation."""

    def __init__(
        self,
        connection: Connection,
        engine: Engine,
        access: Access,
        passed: Passed,
        expected: Expected,
        observers: Sequence[Observer] = (),
    ) -> None:
        self._observers = observers
        self._expected = expected
        self._connection = connection
        self._sock = connection.sock
        self._engine = engine
        self._access = access
        self._passed = passed
        self._buffer = bytearray(DATAGRAM_MAX + 1)
        self._view = memoryview(self._buffer)

    # --- HELLO -------------------------------------------------------------------------------
    def open(self) -> None:
        """Take the HELLO and answer it.

        Raises:
            Gone: there is no session.
        """
        try:
            data = self._receive()
        except BlockingIOError as silent:
            raise Gone(SILENT) from silent
        try:
            hello = decode_hello(data)
            resumed = decode_resume(hello.ticket) if hello.role == Role.RESUME else None
        except Broken as broken:
            raise self._refused(BAD_REQUEST(str(broken), field="hello"), PROTOCOL) from broken
        try:
            info, token = self._admit(hello) if resumed is None else self._go_on(resumed)
        except MakingWay as early:
            raise Gone(STOP) from early
        except Exception as error:
            raise self._refused(name_error(error, "hello"), REFUSED) from error
        if not self._connection.adopt(info):
            self._abandon(info)
        self._caller = Caller(info.tenant, info.role, info.session, info.vm, SOCKET)
        self._operations = Operations(
            self._engine, self._caller, self._connection.is_over, self._observers, self._passed
        )
        self._how = "session_opened" if resumed is None else "session_resumed"
        self._token = token
        self._info = info

    def greet(self) -> None:
        """Send the WELCOME; from then on the client may be told of things."""
        info = self._info
        self._send(
            welcome(
                info.session, info.vm, self._engine.revision, info.role, self._token, info.tenant, 0
            )
        )
        self._connection.welcomed()
        peer = self._connection.peer
        log.info(
            self._how, session=info.session, tenant=info.tenant, role=info.role,
            pid=peer.pid, uid=peer.uid, parent=info.parent,
        )  # fmt: skip

    def _admit(self, hello: Hello) -> tuple[SessionInfo, str]:
        info, token = self._opened(hello.role, hello.ticket)
        self._expected.remember(info.session, self._connection.peer)
        return info, token

    def _opened(self, role: int, ticket: bytes) -> tuple[SessionInfo, str]:
        peer, access = self._connection.peer, self._access
        if not ticket:
            self._require_known(peer.uid)
            wanted = Role(role).name.lower()
            return access.open(peer.tenant, wanted, SOCKET, peer.pid)
        info, token = access.redeem(ticket, SOCKET, peer.pid)
        if role and Role(role).name.lower() != info.role:
            access.close(info.session)
            raise BAD_REQUEST(f"the ticket is for a {info.role}", field="role")
        return info, token

    def _go_on(self, resumed: Resume) -> tuple[SessionInfo, str]:
        """Return a session that a daemon before this one had, to the process that opened it."""
        info = self._access.resume(resumed.session, resumed.token)
        self._expected.claim(info.session, self._connection.peer)
        return info, resumed.token

    def _require_known(self, uid: int) -> None:
        # in a private daemon the directory's mode has said so already
        if not self._access.policy.shared and uid not in (0, os.getuid()):
            raise TOKEN_UNKNOWN("no such ticket", for_log=f"uid {uid} has none", field="ticket")

    def _abandon(self, info: SessionInfo) -> None:
        """Let a session go whose client ended while it was opened."""
        with contextlib.suppress(RmemError):
            self._access.close(info.session)
        raise Gone(self._connection.why)

    # --- requests ----------------------------------------------------------------------------
    def serve(self) -> None:
        """Serve requests until the client or the session has gone.

        Raises:
            Gone: in the end.
        """
        while not self._connection.is_over():
            data = self._receive()
            try:
                request = decode(data, Kind.REQUEST)
            except Broken as broken:
                raise self._refused(BAD_REQUEST(str(broken), field="frame"), PROTOCOL) from broken
            self._answer(request)
        raise Gone(self._connection.why)

    def _answer(self, request: Frame) -> None:
        operations = self._operations
        reply = operations.serve(request)
        try:
            if operations.hands_over or self._connection.why == STOP:
                # the next daemon answers: what was carried out it does not do again
                raise Gone(STOP)
            if request.is_one_way:
                return
            self._send(reply.encode(), reply.fd)
        except BaseException:
            if reply.fd >= 0:
                operations.not_sent(reply)
            raise
        finally:
            if reply.fd >= 0:
                os.close(reply.fd)
        # from here on it is the client's, even if the daemon dies before it is read
        operations.answered()

    # --- datagrams ---------------------------------------------------------------------------
    def _receive(self) -> memoryview:
        try:
            n, _, flags, _ = self._sock.recvmsg_into([self._buffer])
        except ConnectionError as reset:
            # it closed its end with our replies unread
            raise Gone(EOF) from reset
        if flags & _CUT:
            what = "descriptors" if flags & _CUT_DESCRIPTORS else f"more than {DATAGRAM_MAX} bytes"
            raise self._refused(BAD_REQUEST(f"the datagram has {what}", field="frame"), PROTOCOL)
        if n == 0:
            raise Gone(EOF)
        return self._view[:n]

    def _send(self, datagram: bytes, fd: int = -1) -> None:
        try:
            if fd < 0:
                self._sock.send(datagram)
            else:
                descriptors.send(self._sock, datagram, fd)
        except BlockingIOError as full:
            raise Gone(SLOW) from full
        except ConnectionError as gone:
            raise Gone(EOF) from gone

    def _refused(self, refusal: RmemError, why: str) -> Gone:
        """Tell the client why it goes, if it listens."""
        log.info(
            "session_refused", reason=refusal.reason.name, message=refusal.message, why=why,
            for_log=refusal.details.for_log, pid=self._connection.peer.pid,
            uid=self._connection.peer.uid, session=self._connection.number,
        )  # fmt: skip
        with contextlib.suppress(OSError):
            self._sock.send(refused_frame(refusal, self._engine.revision), socket.MSG_DONTWAIT)
        return Gone(why)


def refused_frame(refusal: RmemError, revision: int) -> bytes:
    """Return the datagram that tells a client why there is no session for it (any more)."""
    message = session_pb2.SessionRefusal(
        message=refusal.message, code=code_of(refusal), refusal=refusal_of(refusal, revision)
    )
    return frame(Kind.REFUSED, 0, payload=message.SerializeToString())
