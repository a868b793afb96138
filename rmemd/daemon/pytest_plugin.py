"""The fixture ``rmemd_in_process``: a daemon served by the test's own process.

Here and not in ``rmemd.testing``, because imports run one way and nothing but the daemon's own
package may import the composition root; not in the client library either, whose fixture ``rmemd``
runs a daemon out of process, because clients know the API only.
Loaded by pytest in every run, so nothing of rmemd is imported before the fixture is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rmemd.daemon.app import Daemon
    from rmemd.engine.core import Options


@pytest.fixture
def rmemd_in_process(rmemd_options: Options) -> Iterator[Daemon]:
    """A daemon for one test: connect a Client to ``.settings.socket_dir``, look into ``.engine``.

    Its log goes to stdout, which pytest shows of a test that fails.
    """
    import tempfile
    from pathlib import Path

    from rmemd.daemon.app import Daemon
    from rmemd.daemon.config import Config, DaemonSection
    from rmemd.units import PAGE_SIZE

    # pytest's own tmp_path can be longer than a socket's path may be
    with tempfile.TemporaryDirectory(prefix="rmemd-") as directory:
        settings = DaemonSection(
            socket_dir=Path(directory),
            host_memory_bytes=rmemd_options.nframes * PAGE_SIZE,
            nodes=rmemd_options.nnodes,
            seed=rmemd_options.seed,
        )
        daemon = Daemon(Config(daemon=settings))
        try:
            daemon.start()
            yield daemon
        finally:
            daemon.close()
