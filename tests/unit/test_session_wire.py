"""The session socket's layout: docs, daemon and client say the same; the decoder takes anything."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmem_client import sessioncalls as calls
from rmem_client import sessionwire as theirs
from rmemd.access.rules import RULES
from rmemd.session import wire

DOC = Path(__file__).parents[2] / "docs" / "session.md"
FORMATS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q"}
STRUCTS = {
    "header": "FRAME", "hello": "HELLO", "welcome": "WELCOME", "request": "RECORD",
    "result": "RESULT", "notice": "NOTICE",
}  # fmt: skip


def table(first: str) -> list[list[str]]:
    """Return the rows of the table of the page whose head begins with a word."""
    lines = DOC.read_text().splitlines()
    heads = [i for i, line in enumerate(lines[1:]) if line.startswith("|---")]
    at = next(i for i in heads if lines[i].startswith(f"| {first} |"))
    rows = []
    for line in lines[at + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_every_struct_is_as_the_page_has_it() -> None:
    rows = table("frame")
    assert {name for name, *_ in rows} == set(STRUCTS)
    for name, size, fields in rows:
        layout = "<" + "".join(FORMATS[field.split(":")[1]] for field in fields.split())
        for side in (wire, theirs):
            struct = getattr(side, STRUCTS[name])
            assert (struct.format, struct.size) == (layout, int(size)), (name, side.__name__)
    request = next(fields for name, _, fields in rows if name == "request")
    assert [field.split(":")[0] for field in request.split()] == list(wire.Record._fields)


@pytest.mark.parametrize(
    ("head", "enum"),
    [("kind", wire.Kind), ("role", wire.Role), ("flag", wire.Flag), ("notice", wire.NoticeKind)],
)
def test_every_number_is_as_the_page_has_it(head: str, enum: type) -> None:
    assert {row[0]: int(row[1]) for row in table(head)} == {one.name: int(one) for one in enum}


def test_every_op_is_as_the_page_has_it() -> None:
    rows = table("op")
    assert {row[0]: int(row[1]) for row in rows} == {op.name: int(op) for op in wire.Op}
    assert {op.name: int(op) for op in wire.Op} == {op.name: int(op) for op in theirs.Op}
    for name, number, *cells, payload, flags, roles, _ in rows:
        use = wire.USES[int(number)]
        used = {
            field
            for field, cell in zip(("object", "start", "length", "value"), cells, strict=True)
            if cell != "-"
        }
        assert (used, payload != "-") == (set(use.fields), use.payload), name
        known = 0 if flags == "-" else sum(wire.Flag[flag] for flag in flags.split())
        assert known == use.flags, name
        allowed = set(roles.split()) | ({"admin"} if "host" in roles.split() else set())
        assert allowed == set(RULES[f"Session/{name}"].roles), name


def test_the_clients_numbers_are_the_daemons() -> None:
    for name in ("MAGIC", "VERSION", "RECORDS_MAX", "PAYLOAD_MAX", "DATAGRAM_MAX"):
        assert getattr(wire, name) == getattr(theirs, name), name
    assert {kind.name: int(kind) for kind in wire.Kind} == {k.name: int(k) for k in theirs.Kind}
    assert {name.lower(): int(role) for name, role in wire.Role.__members__.items() if role} == {
        name: number for name, number in theirs.ROLES.items() if name
    }
    assert {int(k): k.name.lower() for k in wire.NoticeKind} == theirs.NOTICE_KINDS
    assert (theirs.STOP, theirs.ONE_WAY) == (wire.FrameFlag.STOP, wire.FrameFlag.ONE_WAY)
    assert tuple(map(int, wire.Flag)) == (theirs.PRIVATE, theirs.READ_ONLY, theirs.KEEP)
    assert (theirs.PRIVATE, theirs.WRITE) == (wire.NoticeFlag.PRIVATE, wire.NoticeFlag.WRITE)


def test_the_limits_are_in_the_page() -> None:
    text = " ".join(DOC.read_text().split())
    assert f"{wire.RECORDS_MAX} records and {wire.PAYLOAD_MAX >> 10} KiB of payload" in text
    assert f"`magic` is {wire.MAGIC:#06X}".replace("0X", "0x") in text
    assert re.search(rf"`version` {wire.VERSION}\b", text)


# --- both ways -----------------------------------------------------------------------------------
def test_what_a_client_asks_is_what_the_daemon_reads() -> None:
    asked = [
        calls.pin(3, 4096, 8192, "DMA").record,
        calls.write_shared(4, 5, b"bytes").record,
        calls.unpin(7).record,
        calls.put([1, 2]).record,
    ]
    frame = wire.decode(memoryview(theirs.request(9, asked, theirs.STOP)), wire.Kind.REQUEST)
    assert (frame.sequence, frame.count, frame.stops) == (9, 4, True)
    for tag, (record, call) in enumerate(
        zip(map(wire.Record._make, wire.RECORD.iter_unpack(frame.records)), asked, strict=True)
    ):
        assert record.tag == tag
        assert (record.op, record.object, record.start, record.length, record.value) == call[:5]
        end = record.payload_offset + record.payload_length
        assert bytes(frame.payload[record.payload_offset : end]) == call.payload


def test_what_the_daemon_answers_is_what_a_client_reads() -> None:
    reply = wire.Reply(11)
    reply.done(0, 42, 100, b"abc")
    reply.refused(1, 11, 10, 101, b"", 3)
    reply.done(2, 1 << 63, 102)
    datagram = theirs.decode(memoryview(reply.encode()))
    assert (datagram.kind, datagram.sequence) == (theirs.Kind.REPLY, 11)
    one, two, three = theirs.results(datagram)
    assert (one.value, one.revision, one.data, one.error) == (42, 100, b"abc", None)
    assert (two.value, two.error.errno, type(two.error).__name__) == (3, 11, "Busy")
    assert three.value == 1 << 63


def test_a_refusal_without_room_keeps_its_numbers() -> None:
    reply = wire.Reply(1)
    reply.done(0, 0, 1, bytes(wire.PAYLOAD_MAX))
    reply.refused(1, 22, 3, 1, b"text", 0)
    assert len(reply.encode()) == wire.FRAME.size + 2 * wire.RESULT.size + wire.PAYLOAD_MAX
    assert len(reply.encode()) <= wire.DATAGRAM_MAX


def test_the_welcome_is_read_back() -> None:
    data = wire.welcome(7, 8, 9, "guest", "to", "uid:1", 0)
    got = theirs.welcome(theirs.decode(memoryview(data)).body)
    assert got[:6] == (7, 8, 9, "guest", "to", "uid:1")


# --- anything ------------------------------------------------------------------------------------
def frames() -> st.SearchStrategy[bytes]:
    """Datagrams of which each part may be wrong."""
    heads = st.builds(
        wire.FRAME.pack,
        st.sampled_from([wire.MAGIC, 0]), st.sampled_from([wire.VERSION, 0, 2]),
        st.integers(0, 8), st.integers(0, 0xFFFF) | st.integers(0, 3), st.integers(0, 3),
        st.integers(0, 0xFFFFFFFF) | st.integers(0, 200), st.integers(0, 0xFFFFFFFF),
    )  # fmt: skip
    return st.builds(lambda head, body: head + body, heads, st.binary(max_size=300))


@given(st.binary(max_size=300) | frames())
def test_the_decoder_takes_anything(data: bytes) -> None:
    for kind in wire.Kind:
        try:
            frame = wire.decode(memoryview(data), kind)
        except wire.Broken:
            continue
        assert frame.kind == kind
        assert len(frame.records) == frame.count * wire.RECORD.size
        assert wire.FRAME.size + len(frame.records) + len(frame.payload) == len(data)


@given(st.binary(max_size=300) | frames())
def test_a_hello_is_whole_or_broken(data: bytes) -> None:
    try:
        hello = wire.decode_hello(memoryview(data))
    except wire.Broken:
        return
    assert hello.role in set(wire.Role)
    assert len(data) == wire.FRAME.size + wire.HELLO.size + len(hello.ticket)


@given(st.integers(0, 4), st.binary(max_size=100))
def test_a_good_hello_is_read(role: int, ticket: bytes) -> None:
    name = {number: name for name, number in theirs.ROLES.items()}[role]
    assert wire.decode_hello(memoryview(theirs.hello(name, ticket))) == wire.Hello(role, ticket)
