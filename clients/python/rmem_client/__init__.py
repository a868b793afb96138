"""Python client library of rmemd: ``Client``, typed errors, watches and packed records.

``rmem_client.aio`` is the same for asyncio.

The names are imported when they are first used: pytest loads ``rmem_client.pytest_plugin`` in
every run, and must not pay for gRPC in those that use none of it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .address import Tls
    from .client import Client
    from .errors import (
        AlreadyExists,
        Busy,
        Cancelled,
        DaemonUnreachable,
        DeadlineExceeded,
        Denied,
        Exhausted,
        FailedPrecondition,
        Holder,
        InvalidArgument,
        MemoryLost,
        NotFound,
        NotServed,
        OutOfRange,
        PluginFault,
        Poisoned,
        Refused,
        Restarted,
        RmemError,
        Unavailable,
        Unsupported,
    )
    from .packed import Frames, Range, pack_ranges, unpack_frames, unpack_ranges
    from .paths import default_socket_dir
    from .session import Session
    from .shared import SharedMemory
    from .watch import Event, Lost, Progress, Watch, WatchItem

__all__ = [
    "AlreadyExists",
    "Busy",
    "Cancelled",
    "Client",
    "DaemonUnreachable",
    "DeadlineExceeded",
    "Denied",
    "Event",
    "Exhausted",
    "FailedPrecondition",
    "Frames",
    "Holder",
    "InvalidArgument",
    "Lost",
    "MemoryLost",
    "NotFound",
    "NotServed",
    "OutOfRange",
    "PluginFault",
    "Poisoned",
    "Progress",
    "Range",
    "Refused",
    "Restarted",
    "RmemError",
    "Session",
    "SharedMemory",
    "Tls",
    "Unavailable",
    "Unsupported",
    "Watch",
    "WatchItem",
    "default_socket_dir",
    "pack_ranges",
    "unpack_frames",
    "unpack_ranges",
]

# where the names of ``__all__`` are, those that are cheap to import first
HOMES = ("paths", "packed", "shared", "session", "errors", "address", "watch", "client")

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import what ``__all__`` names from the module that has it."""
        from importlib import import_module

        if name in __all__:
            for home in HOMES:
                module = import_module(f"{__name__}.{home}")
                if hasattr(module, name):
                    return globals().setdefault(name, getattr(module, name))
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
