"""What gRPC's core writes to descriptor 2, as events of our log.

Owns descriptor 2 while TCP is served. Why a TLS handshake was refused is told nowhere but there: to
the client the socket is closed, and no handler ever sees the call. So descriptor 2 becomes a pipe;
a thread turns the core's lines into events and passes all else through to the real stderr, byte for
byte and in order. Our own log writes to the real stderr directly (``logs.stream``).

Nothing is lost at an orderly end: ``close`` puts the real stderr back and then drains the pipe. Of
a process that is killed, or that aborts in C, the lines that the thread has not read by then are
lost with the pipe (the core's own last words before an abort may be among them); Python's fault
handler therefore writes to the real stderr. With GRPC_VERBOSITY=NONE the core says nothing, nor do
we.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import fcntl
import os
import re
import select
import sys
import threading
from collections.abc import Callable

import structlog

from rmemd.daemon import logs

STDERR = 2
# so that a writer that holds the interpreter does not come to wait for the thread that drains
PIPE_BYTES = 1 << 20
# an unfinished line up to this long is kept until it is known whether it is the core's
LINE_MAX_BYTES = 1 << 16
_LINE = re.compile(
    r"(?P<level>[IWEF])\d{4} \S+ +\d+ (?P<file>[^\s:]+):(?P<line>\d+)\] (?P<text>.*)", re.DOTALL
)
_LEVELS = {"I": "info", "W": "warning", "E": "error", "F": "critical"}
_HANDSHAKE = re.compile(r"Handshake failed with error \S+ (?P<why>.*)", re.DOTALL)
_OPENSSL = re.compile(r"error:[0-9a-f]+:SSL routines:\w+:(?P<reason>\w+):? ?(?P<detail>.*)")
# what the operator wants to hear, by OpenSSL's reason or the verifier's detail
_PLAIN = {
    "certificate has expired": "the peer's certificate has expired",
    "certificate is not yet valid": "the peer's certificate is not valid yet",
    "unable to get local issuer certificate": "the peer's certificate is of another CA",
    "unable to verify the first certificate": "the peer's certificate is of another CA",
    "self signed certificate": "the peer's certificate is of no CA",
    "self signed certificate in certificate chain": "the peer's certificate is of another CA",
    "certificate signature failure": "the peer's certificate was not signed by the CA it names",
    "unsupported certificate purpose": "the peer's certificate is not for clients",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer has no certificate",
    "WRONG_VERSION_NUMBER": "the peer does not speak TLS",
    "HTTP_REQUEST": "the peer speaks HTTP without TLS",
    "UNSUPPORTED_PROTOCOL": "the peer speaks an older TLS only",
    "NO_SHARED_CIPHER": "the peer knows no cipher that we take",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not know our CA",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer does not take our certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "the peer finds our certificate expired",
}

log = structlog.get_logger("rmemd.grpc")


class CoreLog:
    """Descriptor 2 as a pipe, from ``start`` to ``close``. One at a time in a process."""

    def __init__(self) -> None:
        self._open = False

    def start(self) -> None:
        """Take descriptor 2.

        Raises:
            OSError: no descriptors are left.
        """
        sys.stderr.flush()
        self._real = fcntl.fcntl(STDERR, fcntl.F_DUPFD_CLOEXEC, 3)
        self._read, write = os.pipe2(os.O_CLOEXEC)
        self._told, self._tell = os.pipe2(os.O_CLOEXEC)
        # refused where the user has too many large pipes already: then it is a small one
        with contextlib.suppress(OSError):
            fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        os.set_blocking(self._read, False)
        self._stream = os.fdopen(self._real, "w", buffering=1, closefd=False, errors="replace")
        logs.stream.redirect(self._stream)
        self._traced = not faulthandler.is_enabled()
        if self._traced:
            faulthandler.enable(self._real)
        os.dup2(write, STDERR)
        os.close(write)
        self._thread = threading.Thread(target=self._drain, name="corelog", daemon=True)
        self._thread.start()
        self._open = True
        # a daemon that fails to start says why on its way out
        atexit.register(self.close)

    def close(self) -> None:
        """Put the real stderr back and pass on what is left; a second time does nothing."""
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        sys.stderr.flush()
        os.dup2(self._real, STDERR)
        os.close(self._tell)
        self._thread.join()
        if self._traced:
            faulthandler.disable()
        self._stream.flush()
        logs.stream.redirect(None)
        for fd in (self._read, self._told, self._real):
            os.close(fd)

    def _drain(self) -> None:
        lines = Lines(self._pass_through, report)
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        poll.register(self._told, select.POLLIN)
        over = False
        while not over:
            poll.poll()
            # asked before the pipe is emptied: what is written before ``close`` is in it by then
            over = bool(select.select([self._told], [], [], 0)[0])
            with contextlib.suppress(BlockingIOError):
                while data := os.read(self._read, LINE_MAX_BYTES):
                    lines.feed(data)
        lines.end()

    def _pass_through(self, data: bytes) -> None:
        while data:
            try:
                data = data[os.write(self._real, data) :]
            except BlockingIOError:
                select.select([], [self._real], [])
            except OSError:
                # nobody reads our stderr any more; who wrote must not wait for that
                return


class Lines:
    """Tells the core's lines from all other bytes, in whatever pieces they come."""

    def __init__(
        self, pass_through: Callable[[bytes], None], report: Callable[[str], None]
    ) -> None:
        self._pass_through, self._report = pass_through, report
        self._kept = b""
        self._at_start = True

    def feed(self, data: bytes) -> None:
        """Take the next bytes."""
        *whole, rest = (self._kept + data).split(b"\n")
        self._kept = b""
        for line in whole:
            self._line(line)
        if self._at_start and _may_be_core(rest) and len(rest) < LINE_MAX_BYTES:
            self._kept = rest
        elif rest:
            self._pass_through(rest)
            self._at_start = False

    def end(self) -> None:
        """Pass on what is left: a line that never ended is nobody's."""
        if self._kept:
            self._pass_through(self._kept)
            self._kept = b""

    def _line(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        if self._at_start and _LINE.fullmatch(text):
            self._report(text)
        else:
            self._pass_through(line + b"\n")
        self._at_start = True


def _may_be_core(start: bytes) -> bool:
    """Return whether a line that begins so may be the core's ("I1122 ")."""
    return re.fullmatch(rb"[IWEF](\d{0,4}|\d{4} )", start[:6]) is not None


def report(text: str) -> None:
    """Log one of the core's lines: ``tls_refused`` with the reason, else ``grpc_core``."""
    match = _LINE.fullmatch(text)
    assert match is not None
    refused = _HANDSHAKE.match(match["text"])
    if refused is not None:
        reason, detail = _reason(refused["why"])
        log.warning("tls_refused", reason=reason, detail=detail)
    else:
        level = _LEVELS[match["level"]]
        source = f"{match['file']}:{match['line']}"
        getattr(log, level)("grpc_core", level=level, text=match["text"], source=source)


def _reason(why: str) -> tuple[str, str]:
    """Return the reason in plain words, and OpenSSL's own."""
    match = _OPENSSL.match(why)
    if match is None:
        return why, why
    reason, detail = match["reason"], match["detail"].strip()
    if reason == "CERTIFICATE_VERIFY_FAILED":
        plain = _PLAIN.get(detail, f"the peer's certificate was refused: {detail}")
        return plain, f"{reason}: {detail}"
    # the detail that core adds to other reasons is of the verifier, which had no part in it
    return _PLAIN.get(reason, reason.replace("_", " ").lower()), reason
