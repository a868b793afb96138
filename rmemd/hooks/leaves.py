"""What sparse arrays are made of: leaves of 4096 entries, and nodes of 4096 leaves.

Owns the shape, and how indices are taken leaf by leaf; what an array holds is ``sparse``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from rmemd.units import I64, distinct

LEAF_SHIFT = 12
LEAF = 1 << LEAF_SHIFT
NODE_SHIFT = 12
LEAVES = 1 << NODE_SHIFT
NODE_PAGES_SHIFT = LEAF_SHIFT + NODE_SHIFT

Array = NDArray[Any]


class Node:
    """4096 leaves: a value per uniform leaf, and bytes for the mixed ones."""

    __slots__ = ("mixed", "uniform")

    def __init__(self, dtype: DTypeLike, value: int) -> None:
        self.uniform: Array = np.full(LEAVES, value, dtype=dtype)
        self.mixed: dict[int, Array] = {}


def by_leaf(indices: I64) -> Iterator[tuple[int, Any]]:
    """Yield (leaf id, selector) so that each leaf's entries are handled at once."""
    leaves = indices >> LEAF_SHIFT
    first = int(leaves[0])
    if not np.count_nonzero(leaves != first):
        yield first, slice(None)
        return
    if (np.diff(leaves) >= 0).all():
        bounds = np.flatnonzero(np.diff(leaves)) + 1
        edges = [0, *bounds.tolist(), indices.size]
        for lo, hi in pairwise(edges):
            yield int(leaves[lo]), slice(lo, hi)
        return
    for leaf in distinct(leaves).tolist():
        yield leaf, np.flatnonzero(leaves == leaf)
