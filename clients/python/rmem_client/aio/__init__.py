"""The asyncio half of the library: the same names, the same errors, on ``grpc.aio``.

Everything that calls is a coroutine, everything that yields an asynchronous iterator::

    from rmem_client import aio

    async with aio.Client() as client:
        vm = await client.vms.create("tdx-today")
        async with client.watch(vm=vm) as watch:
            async for event in watch: ...

Errors, events and packed records are those of ``rmem_client``. A client belongs to the event loop
in which it is made.
"""

from .client import Client
from .watch import Event, Lost, Progress, Watch, WatchItem

__all__ = ["Client", "Event", "Lost", "Progress", "Watch", "WatchItem"]
