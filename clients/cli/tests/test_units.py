from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rmemctl.units import (
    PAGE_BYTES,
    parse_handle,
    parse_page,
    parse_pages,
    parse_setting,
    parse_size,
    range_text,
    size_text,
)

NUMBERS = st.integers(0, 1 << 52)


@given(NUMBERS)
def test_plain_numbers(number: int) -> None:
    assert parse_size(str(number)) == parse_size(hex(number)) == number
    assert parse_size(f"{number:_}") == number


@given(st.integers(0, 1 << 20), st.sampled_from(["K", "M", "G", "T"]))
def test_suffixes(number: int, suffix: str) -> None:
    expected = number * 1024 ** ("KMGT".index(suffix) + 1)
    for spelt in (suffix, suffix.lower(), f"{suffix}iB", f" {suffix}iB"):
        assert parse_size(f"{number}{spelt}") == expected
    assert parse_size(f"{number:#x}{suffix}") == expected


@given(NUMBERS)
def test_sizes_read_back_unless_they_are_long(nbytes: int) -> None:
    text = size_text(nbytes)
    if "." in text:
        number, unit = text.split()
        in_bytes = parse_size(f"1 {unit}")
        assert abs(float(number) * in_bytes - nbytes) <= 0.06 * in_bytes
    else:
        assert parse_size(text.removesuffix(" B")) == nbytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0"),
        (100, "100 B"),
        (4096, "4 KiB"),
        (499 * PAGE_BYTES, "1996 KiB"),
        (2 << 20, "2 MiB"),
        (60000 * PAGE_BYTES, "234.4 MiB"),
        (1 << 40, "1 TiB"),
    ],
)
def test_size_text(nbytes: int, text: str) -> None:
    assert size_text(nbytes) == text


@pytest.mark.parametrize("text", ["", "K", "-1", "1.5G", "0x", "4KB", "1 2", "12g4", "ten"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="no size or address"):
        parse_size(text)


@given(NUMBERS, st.integers(1, 1 << 40))
def test_page_ranges(start: int, npages: int) -> None:
    assert parse_pages(f"{start}+{npages}") == (start, npages)
    assert parse_pages(f"{start:#x}-{start + npages:#x}") == (start, npages)
    assert parse_pages(range_text(start, npages)) == (start, npages)
    assert parse_pages(hex(start)) == (start, 1)


@pytest.mark.parametrize("text", ["4+0", "4-4", "4-3"])
def test_empty_ranges(text: str) -> None:
    with pytest.raises(ValueError, match="is empty"):
        parse_pages(text)


@pytest.mark.parametrize("text", ["2M", "0+2M", "a", "1-2-3", "+1"])
def test_pages_are_counted_not_measured(text: str) -> None:
    with pytest.raises(ValueError, match="no page range"):
        parse_pages(text)


def test_page_and_handles() -> None:
    assert parse_page("0x42") == 66
    assert parse_handle("3", "vm") == parse_handle("vm/3", "vm") == 3
    assert parse_setting("a=b=c") == ("a", "b=c")
    for parse in (lambda: parse_page("1K"), lambda: parse_page("1+2")):
        with pytest.raises(ValueError, match="no page number"):
            parse()
    with pytest.raises(ValueError, match="is no vm"):
        parse_handle("file/3", "vm")
    with pytest.raises(ValueError, match="KEY=VALUE"):
        parse_setting("a")
