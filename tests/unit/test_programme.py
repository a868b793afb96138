"""Guest programmes: which are refused, naming the instruction, and the bytes that they write."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmemd.engine.programme import INSTRUCTIONS_MAX, Instruction, Opcode, Pattern, check, make_rows
from rmemd.errors import InvalidArgument
from rmemd.units import MAX_GFN, PAGE_SIZE, pages

END = MAX_GFN * PAGE_SIZE
GOOD = Instruction(Opcode.TOUCH, 0, 1)
MASK = (1 << 64) - 1


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (Instruction(Opcode.TOUCH, 0, 0), "gpa"),
        (Instruction(Opcode.WRITE, -1, 8), "gpa"),
        (Instruction(Opcode.CHECK, END, 1), "gpa"),
        (Instruction(Opcode.CHECK, END - 1, 2), "gpa"),
        (Instruction(Opcode.COPY, 0, 8, value=END), "gpa"),
        (Instruction(Opcode.ACCEPT, 1, PAGE_SIZE), "gpa"),
        (Instruction(Opcode.SHARE, 0, 100), "gpa"),
        (Instruction(Opcode.VALIDATE, 0, PAGE_SIZE, level=2), "level"),
        (Instruction(Opcode.LOOP, value=9), "value"),
        (Instruction(Opcode.LOOP, value=0, times=-1), "value"),
        (Instruction(Opcode.WRITE, 0, 8, value=256), "value"),
    ],
)  # fmt: skip
def test_what_could_not_run_is_refused_by_index_and_field(bad: Instruction, field: str) -> None:
    check((GOOD, GOOD))
    with pytest.raises(InvalidArgument) as caught:
        check((GOOD, bad))
    assert caught.value.details.field == f"programme[1].{field}"


@pytest.mark.parametrize(
    "good",
    [
        Instruction(Opcode.CHECK, END - 1, 1),
        Instruction(Opcode.WRITE, 5, 9000, Pattern.WORDS, value=1 << 40),
        Instruction(Opcode.ACCEPT, PAGE_SIZE, 2 * PAGE_SIZE, level=1),
        Instruction(Opcode.LOOP, value=0, times=3),
        Instruction(Opcode.HALT),
        Instruction(Opcode.SIGNAL, value=77),
    ],
)
def test_what_can_run_is_taken(good: Instruction) -> None:
    check((good,))


def test_a_programme_has_a_longest_length() -> None:
    check((GOOD,) * INSTRUCTIONS_MAX)
    with pytest.raises(InvalidArgument):
        check((GOOD,) * (INSTRUCTIONS_MAX + 1))


def _word(seed: int, number: int) -> int:
    """Return splitmix64's output for a word of guest memory, in plain integers."""
    x = (number + seed * 0x9E3779B97F4A7C15) & MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


@given(st.integers(0, 1 << 40), st.integers(0, MAX_GFN - 2), st.integers(0, 511))
def test_words_depend_on_seed_and_address_only(seed: int, gfn: int, word: int) -> None:
    rows = make_rows(Pattern.WORDS, seed, pages(gfn, 2))
    assert rows.shape == (2, PAGE_SIZE)
    found = rows.reshape(-1).view("<u8")
    assert int(found[word]) == _word(seed, gfn * 512 + word)
    assert int(found[512 + word]) == _word(seed, (gfn + 1) * 512 + word)


def test_words_repeat_nowhere_and_bytes_everywhere() -> None:
    words = make_rows(Pattern.WORDS, 1, pages(100, 64)).reshape(-1).view("<u8")
    assert np.unique(words).size == words.size
    assert (make_rows(Pattern.BYTE, 0xA7, pages(3, 2)) == 0xA7).all()
