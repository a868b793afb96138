"""A keeper in the process of a test: what is kept, and what an engine finds after a crash."""

from __future__ import annotations

from typing import Any

from rmemd.engine.core import Options
from rmemd.engine.engine import Engine
from rmemd.testing import keeping
from rmemd.testing.keeping import Kept

__all__ = ["Kept", "kept_engine", "reopened"]


def kept_engine(kept: Kept, **options: Any) -> Engine:
    """Make an engine whose memory outlives it; with the same ``kept`` again, it is reopened."""
    settings = {"nframes": 4096, "nnodes": 1, "seed": 1, "life": "one", **options}
    return keeping.kept_engine(kept, Options(**settings))


def reopened(kept: Kept, **options: Any) -> Engine:
    """Return the engine that comes after a crash at this moment; the present one is not touched."""
    return kept_engine(Kept(kept.copied()), **options)
