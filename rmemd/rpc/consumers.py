"""ConsumerService: what each vendor back end declares, read from its ops table."""

from __future__ import annotations

from rmem.v1 import consumer_pb2 as pb
from rmem.v1 import types_pb2
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.hooks.ops import NotifierOps
from rmemd.hooks.spec import HOOKS_VERSION
from rmemd.rpc.dispatch import Call


class ConsumerService:
    """The list of consumers, and one VM's table."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def ListConsumers(
        self, request: pb.ListConsumersRequest, call: Call
    ) -> pb.ListConsumersResponse:
        revision, reply = self._engine.read(_list)
        reply.revision = revision
        return reply

    def GetOps(self, request: pb.GetOpsRequest, call: Call) -> pb.GetOpsResponse:
        def query(core: Core) -> pb.GetOpsResponse:
            vm = core.vms.get(request.vm)
            return pb.GetOpsResponse(
                consumer=vm.info.consumer, ops=ops_table(core.consumer(vm).ops)
            )

        revision, reply = self._engine.read(query)
        reply.revision = revision
        return reply


def personality(in_place: bool) -> types_pb2.Personality.ValueType:
    """Return the enum value of a way to convert."""
    return types_pb2.PERSONALITY_IN_PLACE if in_place else types_pb2.PERSONALITY_ATTRIBUTES


def ops_table(ops: NotifierOps) -> list[pb.Op]:
    """Return a table, NULL entries included."""
    return [pb.Op(name=name, implemented=there) for name, there in ops.implemented().items()]


def _list(core: Core) -> pb.ListConsumersResponse:
    reply = pb.ListConsumersResponse(hooks_version=HOOKS_VERSION)
    for found in core.registry.found:
        reply.plugins.add(
            name=found.name, distribution=found.distribution, version=found.version,
            quarantined=bool(found.error), error=found.error,
        )  # fmt: skip
    for name, offer in sorted(core.registry.offers.items()):
        variant = offer.variant
        reply.consumers.add(
            name=name, platform=offer.platform, summary=variant.summary,
            private_memory=variant.private_memory,
            personality=personality(variant.personalities[0] == "in-place"),
            options=dict(variant.options), ops=ops_table(offer.ops),
        )  # fmt: skip
    return reply
