# Generated from aio/consumers.py by ../unasync.py: edit that one, then `make client`.
"""Vendor back ends and what each declares (``client.consumers``)."""

from __future__ import annotations

from rmem.v1 import consumer_pb2, consumer_pb2_grpc

from .connection import Connection


class Consumers:
    """The consumer service."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stub = consumer_pb2_grpc.ConsumerServiceStub(connection.channel)

    def list(self) -> consumer_pb2.ListConsumersResponse:
        """List every plugin, quarantined ones too, and every consumer with its ops table."""
        request = consumer_pb2.ListConsumersRequest()
        return self._connection.call(self._stub.ListConsumers, request)

    def ops(self, vm: int) -> consumer_pb2.GetOpsResponse:
        """Return the ops table of one VM's consumer."""
        return self._connection.call(self._stub.GetOps, consumer_pb2.GetOpsRequest(vm=vm))

    def load(self, *names: str) -> consumer_pb2.LoadPluginsResponse:
        """Load plugins that were installed since the daemon started; none named: all of them.

        One that fails is in the reply, quarantined, with its error.
        """
        request = consumer_pb2.LoadPluginsRequest(names=names)
        return self._connection.call(self._stub.LoadPlugins, request)

    def unload(self, name: str) -> consumer_pb2.UnloadPluginResponse:
        """Take out a plugin that no VM uses."""
        request = consumer_pb2.UnloadPluginRequest(name=name)
        return self._connection.call(self._stub.UnloadPlugin, request)

    def reload(self, name: str) -> consumer_pb2.ReloadPluginResponse:
        """Load a plugin's code anew and swap every VM of it: all of them, or nothing happens."""
        request = consumer_pb2.ReloadPluginRequest(name=name)
        return self._connection.call(self._stub.ReloadPlugin, request)

    def supports(self, vm: int, op: str) -> bool:
        """Say whether a VM's consumer implements an op; raises KeyError if there is no such op."""
        reply = self.ops(vm)
        table = {entry.name: entry.implemented for entry in reply.ops}
        return table[op]
