"""What is measured, topic by topic: each is a module with ``figures(folder, quick)``.

Owns their order, and that one which fails leaves the others as they are.
"""

from __future__ import annotations

import importlib
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

from tests.bench.harness import Figure, LeftOut

TOPICS = (
    "unary", "session", "peers", "attributes", "records", "encryption", "dispatch", "vendors",
    "start", "scale", "server",
)  # fmt: skip


def outcomes(topic: str, *, quick: bool) -> Iterator[Figure | LeftOut]:
    """Yield a topic's figures and what it leaves out; one that fails is left out, unexcused."""
    with tempfile.TemporaryDirectory(prefix="rmemd-bench-") as folder:
        try:
            yield from importlib.import_module(f"tests.bench.{topic}").figures(Path(folder), quick)
        except LeftOut as left:
            yield left
        except Exception:
            traceback.print_exc()
            yield LeftOut(topic, "it failed, as told above", excused=False)
