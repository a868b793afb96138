"""What the journal's bytes must be: exact, the same for the same values, readable by newer code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass
from enum import Enum, Flag, IntEnum
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from msgspec import Struct

from rmemd.hooks.types import KeySpec
from rmemd.hooks.writes import TableSpec, Write
from rmemd.model.files import Binding, FileInfo
from rmemd.model.host import Use
from rmemd.model.ledger import Entry
from rmemd.model.vms import Slot, Vcpu, VmInfo
from rmemd.store.arrays import DTYPES, SHORT
from rmemd.store.codec import (
    JournalUnreadable,
    NoteEntry,
    Record,
    decode,
    decode_value,
    encode_note,
    encode_record,
    encode_value,
)


class Colour(Enum):
    RED = "red"
    BLUE = (1, "blue")


class Level(IntEnum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Inner:
    name: str
    level: Level


@dataclass(frozen=True)
class Outer:
    inner: Inner
    more: tuple[Inner, ...] = ()
    derived: int = field(init=False, default=5)


@dataclass(frozen=True)
class Nothing:
    pass


class Pair(Struct, frozen=True):
    left: Inner
    right: tuple[Inner, ...] = ()


class Empty(Struct, frozen=True):
    pass


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    if isinstance(one, Write):
        return same((one.table, one.op, one.args), (other.table, other.op, other.args))
    if isinstance(one, Record):
        parts = ("revision", "label", "writes", "events", "digests")
        return all(same(getattr(one, part), getattr(other, part)) for part in parts)
    return bool(one == other)


VALUES = [
    None, True, False, 0, 1, 127, 128, 255, 256, -1, -128, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1,
    2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, -(2**200), 0.0, -1.5, 1e300, float("inf"),
    "", "text", "ž🐎", "\ud800", "x" * 254, "x" * 255, "x" * 70000, b"", b"\x00\xff", b"b" * 300,
    (), (1,), (1, "a", None), [1, [2, [3]]], {}, {"b": 1, "a": 2}, {(1, 2): {"x": b""}}, [()] * 300,
    frozenset(), frozenset({1, 2, 300}), frozenset({"a", b"a", (1, "z")}),
    Colour.RED, Colour.BLUE, Level.HIGH, Use.POISONED, [Level.LOW, Level.LOW, Colour.RED],
    Inner("a", Level.LOW), Outer(Inner("a", Level.LOW), (Inner("b", Level.HIGH),)), Nothing(),
    Pair(Inner("a", Level.LOW)), Pair(Inner("a", Level.LOW), (Inner("b", Level.HIGH),)), Empty(),
    KeySpec(3, "vm/1", integrity=True), Entry("vm/1", "secure EPT", True), Vcpu(0),
    Binding(0, 16, 1, 2, 0x100), Slot(0, 4, 0, 16, 1, 0), FileInfo(1, 1, 16, 3, True),
    VmInfo(1, "", "tdx", "tdx", True, False, 0, config={"a": "b"}, measurement=b"\x01" * 48),
    np.int64(5), np.uint8(255), np.uint64(2**64 - 1), np.float64(1.5), np.bool_(True),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_as_it_was(value: Any) -> None:
    assert same(decode_value(encode_value(value)), value)
    assert same(decode_value(encode_value([value, (value, value)])), [value, (value, value)])


def arrays() -> Iterator[Any]:
    """Every dtype in every form, ascending and noise too; and ones that wrap."""
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        for n in (0, 1, 2, SHORT, SHORT + 1, 300, 5000):
            count = np.arange(n)
            for numbers in (
                np.zeros(n), np.full(n, 3), count, count * 2, 7 - count, count // 100,
                count + 50 * (count // 64), np.maximum(count, 5), rng.integers(0, 2**62, n),
                *(np.cumsum(rng.integers(0, 2**bits + 1, n)) for bits in (4, 8, 16, 32)),
            ):  # fmt: skip
                with np.errstate(over="ignore"):
                    yield np.asarray(numbers).astype(np.int64).astype(dtype)


def test_arrays_come_back_whatever_shape_their_content_has() -> None:
    for array in arrays():
        found = decode_value(encode_value(array))
        assert same(found, array), (array.dtype, array[:10])
        assert found.flags.writeable


def test_extremes_of_a_dtype_come_back() -> None:
    for dtype in ("i1", "i8", "u1", "u8"):
        info = np.iinfo(dtype)
        for pattern in ([info.min, info.max], [info.max, info.min, info.min]):
            array = np.array(pattern * 20, dtype=dtype)
            assert same(decode_value(encode_value(array)), array)
            assert same(decode_value(encode_value(np.sort(array))), np.sort(array))


def test_not_a_number_and_both_zeros_come_back() -> None:
    zeros = np.array([0.0, -0.0] * 10)
    given = [zeros, -zeros, np.array([np.nan, 0.0, -0.0] * 10), zeros]
    for one, found in zip(given, decode_value(encode_value(given)), strict=True):
        assert one.tobytes() == found.tobytes()


def test_views_and_foreign_byte_orders_come_back_as_plain_arrays() -> None:
    for base in (np.arange(10), np.arange(1000), np.arange(1000)[::-3]):
        assert same(decode_value(encode_value(base[::2])), base[::2].copy())
        swapped = base.astype(">i8")
        assert same(decode_value(encode_value(swapped)), base.copy())
        assert encode_value(swapped) == encode_value(base)


def test_patterns_take_little_room() -> None:
    n = 1 << 18
    for array in (np.arange(n), np.full(n, 7), np.arange(n) * 2 + 1, np.arange(n) // (n // 10)):
        assert len(encode_value(array)) < 256
    scattered = np.sort(np.random.default_rng(1).integers(0, 50 * n, n))
    assert len(encode_value(scattered)) < scattered.nbytes // 4 + 64
    noise = np.random.default_rng(1).integers(0, 2**62, n)
    assert noise.nbytes < len(encode_value(noise)) < noise.nbytes + 64
    twice = encode_value([noise, noise.copy()])
    assert noise.nbytes < len(twice) < noise.nbytes + 64


# --- determinism ---------------------------------------------------------------------------------
def record(copy: bool) -> Record:
    """The same record of shared objects, or of copies of everything."""
    pfns = np.arange(100, 200)
    short = np.array([5, 9])
    noise = np.random.default_rng(2).integers(0, 2**60, 99)

    def given(array: Any) -> Any:
        return array.copy() if copy else array

    owner = "".join(["vm", "/1"]) if copy else "vm/1"
    return Record(
        7, "fault",
        (
            Write("", "create", (TableSpec("t", "dense", "u4", 0, 4096),)),
            Write("t", "put", (given(pfns), given(noise))),
            Write("t", "put", (given(pfns), 3)),
            Write("t", "put", (given(short), given(short))),
            Write("t", "fill", (0, 9, 1)),
            Write("t", "store", (64, given(noise))),
            Write("records", "set", ((1, "a"), Entry(owner, "pin", False))),
            Write("records", "set", ((2, "a"), Entry("vm/1", "pin", True))),
            Write("records", "drop", (Level.LOW,)),
            Write("", "destroy", ("t",)),
        ),
        (("populated", {"vm": 1, "gfn": 3}), ("vm_died", {"vm": 1, "reason": "x"})),
        ((given(pfns), given(pfns).astype(np.uint64)),),
    )  # fmt: skip


def test_a_record_comes_back_as_it_was() -> None:
    (found,) = decode(encode_record(record(copy=False)))
    assert same(found, record(copy=False))


def test_equal_records_are_equal_bytes_whatever_objects_they_are_made_of() -> None:
    assert encode_record(record(copy=True)) == encode_record(record(copy=False))
    (found,) = decode(encode_record(record(copy=True)))
    assert isinstance(found, Record)
    assert encode_record(found) == encode_record(record(copy=True))


def test_equal_sets_are_equal_bytes_whatever_order_they_were_made_in() -> None:
    items = [f"item {i}" for i in range(100)]
    one, other = frozenset(items), frozenset(items[::-1])
    assert encode_value(one) == encode_value(other)


def test_the_order_of_a_dict_is_kept() -> None:
    assert list(decode_value(encode_value({"z": 1, "a": 2}))) == ["z", "a"]


def test_what_repeats_is_written_once() -> None:
    pfns = np.random.default_rng(1).integers(0, 2**60, 1000)
    many = Record(1, "x", tuple(Write("host/use", "put", (pfns, i)) for i in range(20)))
    assert len(encode_record(many)) < pfns.nbytes + 400
    slots = [Slot(i, 4, 0, 16, 1, 0) for i in range(100)]
    assert len(encode_value(slots)) < 100 * 12 + 200


# --- entries -------------------------------------------------------------------------------------
def test_entries_one_after_another_come_back_in_order() -> None:
    entries: list[Record | NoteEntry] = [
        NoteEntry("token", "a", {"b": (1, 2)}, False),
        record(copy=False),
        NoteEntry("token", "a", None, True),
        record(copy=False),
    ]
    data = b"".join(
        encode_record(one) if isinstance(one, Record) else encode_note(one) for one in entries
    )
    for given in (data, memoryview(data), memoryview(b"x" + data)[1:]):
        found = decode(given)
        assert len(found) == 4
        assert all(map(same, found, entries))
    assert decode(b"") == []


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_note_comes_back_whatever_its_key_and_its_value_are(value: Any) -> None:
    for whole in (value, (value,), (value, value, 7)):
        for note in (NoteEntry("kind", whole, 5, False), NoteEntry("kind", (3,), whole, True),
                     NoteEntry("kind", whole, whole, False)):  # fmt: skip
            (found,) = decode(encode_note(note))
            assert same(found, note)


def test_a_note_of_other_parts_than_it_says_is_refused() -> None:
    note = encode_note(NoteEntry("", (1, 2), (3,), False))
    at = note.index(bytes((2, 1, 1, 2, 3)))
    for nkey in (1, 3, 4, 127, 0xE0):
        with pytest.raises(JournalUnreadable):
            decode(note[:at] + bytes((nkey,)) + note[at + 1 :])


def test_an_entry_that_was_cut_or_is_unknown_is_refused() -> None:
    data = encode_note(NoteEntry("kind", "key", [1, 2, 3], False))
    for length in range(1, len(data)):
        with pytest.raises(JournalUnreadable):
            decode(data[:length])
    with pytest.raises(JournalUnreadable, match="version"):
        decode(b"\x7f" + data[1:])
    length = int.from_bytes(data[1:5], "little")
    for other in (length - 1, length + 1):
        with pytest.raises(JournalUnreadable):
            decode(data[:1] + other.to_bytes(4, "little") + data[5:])


def test_damaged_bytes_are_refused_or_say_something_else_but_raise_nothing_else() -> None:
    data = encode_record(record(copy=False))
    rng = np.random.default_rng(3)
    for _ in range(3000):
        damaged = bytearray(data)
        damaged[rng.integers(0, len(data))] = rng.integers(0, 256)
        try:
            decode(bytes(damaged))
        except JournalUnreadable:
            continue


def test_a_written_array_may_change_afterwards() -> None:
    for n in (3, 1000):
        array = np.random.default_rng(1).integers(0, 2**60, n)
        write = Write("t", "put", (array, array))
        data = encode_record(Record(1, "x", (write,)))
        before = array.copy()
        array[:] = 0
        (found,) = decode(data)
        assert isinstance(found, Record)
        assert (found.writes[0].args[0] == before).all()
        assert (found.writes[0].args[1] == before).all()


def test_a_read_array_is_no_view_of_what_was_read() -> None:
    for n in (3, 1000):
        data = bytearray(encode_value(np.random.default_rng(1).integers(0, 2**60, n)))
        found = decode_value(data)
        before = found.copy()
        data[:] = bytes(len(data))
        assert (found == before).all()


# --- what is refused -----------------------------------------------------------------------------
@dataclass
class Thawed:
    name: str


class ThawedStruct(Struct):
    name: str


class Marks(Flag):
    ONE = 1
    TWO = 2


class Text(str):
    __slots__ = ()


@dataclass(frozen=True)
class Holding:
    what: Any


def local_dataclass() -> Any:
    @dataclass(frozen=True)
    class Local:
        pass

    return Local()


@pytest.mark.parametrize(
    "value",
    [object(), {1}, bytearray(b"a"), Thawed("a"), ThawedStruct("a"), Text("a"), print, int, 1j,
     local_dataclass(), np.zeros((2, 2)), np.array(["a"]), np.array([object()]),
     np.datetime64("2020-01-01"), Holding(object()), Marks.ONE | Marks.TWO],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_not_plain_is_refused_when_written(value: Any) -> None:
    with pytest.raises(TypeError):
        encode_value(value)
    with pytest.raises(TypeError):
        encode_record(Record(1, "x", (Write("t", "set", (1, (value,))),)))


@pytest.mark.parametrize("op", ["restore", "insert", "attach", "bogus"])
def test_inverse_writes_are_refused(op: str) -> None:
    with pytest.raises(TypeError, match=op):
        encode_record(Record(1, "x", (Write("t", op, (1, 2, 3)),)))


def test_whatever_nests_too_deep_to_be_read_cannot_be_written() -> None:
    def nested(value: Any, depth: int) -> Any:
        for _ in range(depth):
            value = Holding((value,))
        return value

    def written(depth: int) -> bytes | None:
        try:
            return encode_value(nested(1, depth))
        except RecursionError:
            return None

    deepest = 0
    # the state is read back by a process that has less on its stack, never more
    while (data := written(deepest + 1)) is not None:
        assert isinstance(decode_value(data), Holding)
        deepest += 1
    assert deepest > 50


# --- other shapes of a class ---------------------------------------------------------------------
@pytest.fixture
def module() -> Iterator[ModuleType]:
    """A module whose classes change between writing and reading."""
    made = ModuleType("rmemd_test_shapes")
    sys.modules[made.__name__] = made
    yield made
    del sys.modules[made.__name__]


def shape(module: ModuleType, *fields: Any) -> Any:
    """Give the module's class ``Thing`` these fields."""
    cls = make_dataclass("Thing", fields, frozen=True)
    cls.__module__ = module.__name__
    module.Thing = cls  # type: ignore[attr-defined]
    return cls


def test_newer_code_reads_older_records_by_the_names_of_the_fields(module: ModuleType) -> None:
    old = shape(module, "a", "gone", "b")
    data = encode_value([old(1, "dropped text", 2), old(3, "dropped text", 4), "dropped text"])
    new = shape(module, "b", ("added", int, field(default=9)), ("a", int, field(default=0)))
    assert decode_value(data) == [new(b=2, added=9, a=1), new(b=4, added=9, a=3), "dropped text"]


def test_a_new_field_without_a_default_is_refused_on_reading(module: ModuleType) -> None:
    data = encode_value(shape(module, "a")(1))
    shape(module, "a", "b")
    with pytest.raises(JournalUnreadable):
        decode_value(data)


def test_a_class_that_is_gone_or_something_else_now_is_refused(module: ModuleType) -> None:
    data = encode_value(shape(module, "a")(1))
    for other in (dict, lambda a: a, 5):
        module.Thing = other  # type: ignore[attr-defined]
        with pytest.raises(JournalUnreadable, match="Thing"):
            decode_value(data)
    del module.Thing
    with pytest.raises(JournalUnreadable, match="Thing"):
        decode_value(data)
    del sys.modules[module.__name__]
    try:
        with pytest.raises(JournalUnreadable, match=module.__name__):
            decode_value(data)
    finally:
        sys.modules[module.__name__] = module


def test_a_member_that_is_gone_is_refused(module: ModuleType) -> None:
    module.State = Enum("State", ["ON", "OFF"], module=module.__name__)  # type: ignore[misc,attr-defined]
    data = encode_value(module.State.OFF)
    assert decode_value(data) is module.State.OFF
    module.State = Enum("State", ["ON"], module=module.__name__)  # type: ignore[misc,attr-defined]
    with pytest.raises(JournalUnreadable):
        decode_value(data)
