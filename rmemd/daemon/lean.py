"""The packages the daemon is built on, without what they import for others.

Owns what is left out at a start: half of what gRPC and structlog bring is their asyncio side,
protobuf's second implementation waits behind the first, and NumPy's linear algebra brings types for
checkers and a thread for each processor, which spins. None of it is used here, and together it
would be a fourth of the time to readiness. Nothing is taken away: a name that was put off is
imported for whoever asks for it later, plugins included.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any, cast

# Imported by what we import, and by nobody for us; parents first. With each, what others import of
# it by name to call it later, at which the module is imported. The last two only document.
PUT_OFF: dict[str, tuple[str, ...]] = {
    "asyncio": (),
    "calendar": (),
    "email": (),
    "ipaddress": (),
    "pickle": ("PicklingError",),
    "tempfile": (),
    "zipfile": (),
    "importlib.metadata._adapters": (),
    "google.protobuf.internal.python_message": (),
    "grpc.aio": (),
    "grpc.experimental.aio": (),
    "grpc_health.v1._async": (),
    "grpc_reflection.v1alpha._async": (),
    "grpc_status._async": (),
    "numpy.linalg": ("eigvals", "inv", "lstsq", "matrix_power"),
    "numpy._core._add_newdocs": (),
    "numpy._core._add_newdocs_scalars": (),
}
# structlog draws tracebacks with it, where a client has brought it along; we do not
HIDDEN = "rich"
BLAS_THREADS = "OPENBLAS_NUM_THREADS"


class PutOff(ModuleType):
    """Stands in for a module, which is imported once one of its names is asked for.

    Args:
        name: the module's.
        called: names that are asked for to be called later: functions, or classes of objects.
    """

    def __init__(self, name: str, called: tuple[str, ...]) -> None:
        super().__init__(name)
        for one in called:
            setattr(self, one, self._later(one))

    def __getattr__(self, name: str) -> Any:
        # the import system's own questions about a module are no use of it
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._imported(), name)

    def _later(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kw: Any) -> Any:
            return getattr(self._imported(), name)(*args, **kw)

        return call

    def _imported(self) -> ModuleType:
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return importlib.import_module(self.__name__)


@contextmanager
def lean() -> Iterator[None]:
    """Have what is imported in the block go without what is put off; nest or repeat it freely.

    Nothing is collected meanwhile, and what there is then is never gone over: imports only add
    objects, and nearly all of them stay.
    """
    collecting = gc.isenabled()
    gc.disable()
    modules = cast("dict[str, ModuleType | None]", sys.modules)
    stand_ins: dict[str, ModuleType | None] = {
        name: PutOff(name, called) for name, called in PUT_OFF.items()
    }
    stand_ins[HIDDEN] = None
    absent = {name: one for name, one in stand_ins.items() if name not in modules}
    modules.update(absent)
    os.environ.setdefault(BLAS_THREADS, "1")
    try:
        yield
    finally:
        if collecting:
            gc.freeze()
            gc.enable()
        for name, one in absent.items():
            if name in modules and modules[name] is one:
                del modules[name]


def settle() -> None:
    """Have what there is after the start stay as it is: never gone over, and without gaps."""
    import ctypes

    gc.freeze()
    gc.enable()
    # a megabyte that was freed in between; other C libraries do not have it
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
