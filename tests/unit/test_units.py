"""Page arithmetic beside numpy's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rmemd.units import distinct


@given(st.lists(st.integers(-3, 40)), st.sampled_from(["i8", "u4", "u1"]))
def test_distinct_is_unique(numbers: list[int], dtype: str) -> None:
    array = np.abs(np.array(numbers, dtype=np.int64)).astype(dtype)
    found = distinct(array)
    assert found.dtype == array.dtype
    assert np.array_equal(found, np.unique(array))
