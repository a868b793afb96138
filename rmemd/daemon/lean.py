"""The packages the daemon is built on, without what they import for others.

Owns what is left out at a start: half of what gRPC and structlog bring is their asyncio side, and
NumPy's linear algebra starts a thread for each processor, which spins. None of it is used here, and
together it would be a fifth of the time to readiness. Nothing is taken away: a name that was put
off is imported for whoever asks for it later, plugins included.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, cast

# imported by what we import, and by nobody for us; parents first. The last are only documentation.
PUT_OFF = (
    "asyncio",
    "email",
    "zipfile",
    "importlib.metadata._adapters",
    "grpc.aio",
    "grpc.experimental.aio",
    "grpc_health.v1._async",
    "grpc_reflection.v1alpha._async",
    "grpc_status._async",
    "numpy._core._add_newdocs",
    "numpy._core._add_newdocs_scalars",
)
# structlog draws tracebacks with it, where a client has brought it along; we do not
HIDDEN = "rich"
BLAS_THREADS = "OPENBLAS_NUM_THREADS"


class PutOff(ModuleType):
    """Stands in for a module, which is imported once one of its names is asked for."""

    def __getattr__(self, name: str) -> Any:
        # the import system's own questions about a module are no use of it
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._imported(), name)

    def _imported(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


@contextmanager
def lean() -> Iterator[None]:
    """Have what is imported in the block go without what is put off; nest or repeat it freely."""
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    stand_ins: dict[str, ModuleType | None] = {name: PutOff(name) for name in PUT_OFF}
    stand_ins[HIDDEN] = None
    absent = {name: one for name, one in stand_ins.items() if name not in modules}
    modules.update(absent)
    os.environ.setdefault(BLAS_THREADS, "1")
    try:
        yield
    finally:
        for name, one in absent.items():
            if name in modules and modules[name] is one:
                del modules[name]


def settle() -> None:
    """Have what there is after the start stay as it is: never gone over, and without gaps."""
    gc.freeze()
    gc.enable()
    # a megabyte that was freed in between; other C libraries do not have it
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
