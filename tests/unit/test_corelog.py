"""gRPC core's lines: told from all else in whatever pieces they come, and put in plain words."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from rmemd.daemon import corelog
from rmemd.daemon.corelog import LINE_MAX_BYTES, Lines

HEAD = "I1122 11:24:04.622900   12055 ssl_transport_security.cc:2563] "
FAILED = "Handshake failed with error SSL_ERROR_SSL: error:{}:SSL routines:OPENSSL_internal:{}"
CORE = [
    HEAD + FAILED.format("1000007d", "CERTIFICATE_VERIFY_FAILED: certificate has expired"),
    "E0000 00:00:1763810644.622900   12055 server.cc:7] what the core says before it has a log",
    "W1122 11:24:04.622900 1 a.cc:1] ",
]
OTHER = [
    "", "I", "I1122", "I1122 ", "I1122 11:24", "I think so", "Traceback (most recent call last):",
    '{"event": "serving"}', "W123 x", "F12345", "\0\xff not text", " " + CORE[0],
]  # fmt: skip


class Sink:
    """What was passed through and reported, in order."""

    def __init__(self) -> None:
        self.passed = b""
        self.reported: list[str] = []
        self.lines = Lines(self._pass, self.reported.append)

    def _pass(self, data: bytes) -> None:
        self.passed += data


def encoded(line: str) -> bytes:
    return line.encode("latin-1")


@given(
    st.lists(st.sampled_from([*CORE, *OTHER]), max_size=12),
    st.lists(st.integers(0, 400), max_size=12),
    st.sampled_from(OTHER),
)
def test_nothing_is_lost_or_changed_however_it_is_cut(
    lines: list[str], cuts: list[int], last: str
) -> None:
    data = b"".join(encoded(line) + b"\n" for line in lines) + encoded(last)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    sink = Sink()
    for start, end in pairwise(edges):
        sink.lines.feed(data[start:end])
    sink.lines.end()
    assert sink.reported == [line for line in lines if line in CORE]
    rest = [line for line in lines if line not in CORE]
    assert sink.passed == b"".join(encoded(line) + b"\n" for line in rest) + encoded(last)


def test_what_cannot_be_the_core_s_does_not_wait_for_its_end() -> None:
    sink = Sink()
    sink.lines.feed(b"no end in sig")
    assert sink.passed == b"no end in sig"
    # the rest of that line is not the core's, whatever it looks like
    sink.lines.feed(encoded(CORE[0]) + b"\n")
    assert not sink.reported


def test_a_line_without_end_is_not_kept_for_ever() -> None:
    sink = Sink()
    data = b"I1122 " + b"x" * LINE_MAX_BYTES
    sink.lines.feed(data)
    assert sink.passed == data


@pytest.mark.parametrize(
    ("error", "reason", "detail"),
    [
        ("CERTIFICATE_VERIFY_FAILED: certificate has expired",
         "the peer's certificate has expired",
         "CERTIFICATE_VERIFY_FAILED: certificate has expired"),
        ("CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
         "the peer's certificate is of another CA",
         "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate"),
        ("CERTIFICATE_VERIFY_FAILED: something new",
         "the peer's certificate was refused: something new",
         "CERTIFICATE_VERIFY_FAILED: something new"),
        ("PEER_DID_NOT_RETURN_A_CERTIFICATE: Invalid certificate verification context",
         "the peer has no certificate", "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        ("WRONG_VERSION_NUMBER: Invalid certificate verification context",
         "the peer does not speak TLS", "WRONG_VERSION_NUMBER"),
        ("NO_SUCH_THING_YET", "no such thing yet", "NO_SUCH_THING_YET"),
    ],
)  # fmt: skip
def test_refusals_in_plain_words(error: str, reason: str, detail: str) -> None:
    with capture_logs() as logged:
        corelog.report(HEAD + FAILED.format("10000000", error))
    assert logged == [
        {"event": "tls_refused", "log_level": "warning", "reason": reason, "detail": detail}
    ]


def test_a_handshake_error_of_another_form_is_told_as_it_is() -> None:
    with capture_logs() as logged:
        corelog.report(HEAD + "Handshake failed with error SSL_ERROR_SYSCALL: gone")
    assert logged[0]["reason"] == "gone"


@pytest.mark.parametrize(
    ("letter", "level"), [("I", "info"), ("W", "warning"), ("E", "error"), ("F", "critical")]
)
def test_other_lines_keep_level_and_text(letter: str, level: str) -> None:
    with capture_logs() as logged:
        corelog.report(f"{letter}1122 11:24:04.622900   12055 chttp2_server.cc:88] Out of fds: 24")
    assert logged == [
        {"event": "grpc_core", "log_level": level, "level": level, "text": "Out of fds: 24",
         "source": "chttp2_server.cc:88"}
    ]  # fmt: skip
