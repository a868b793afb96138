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

    def supports(self, vm: int, op: str) -> bool:
        """Say whether a VM's consumer implements an op; raises KeyError if there is no such op."""
        table = {entry.name: entry.implemented for entry in self.ops(vm).ops}
        return table[op]
