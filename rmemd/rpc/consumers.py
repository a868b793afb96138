"""ConsumerService: what each vendor back end declares, and plugins that come and go."""

from __future__ import annotations

from rmem.v1 import consumer_pb2 as pb
from rmem.v1 import types_pb2, vm_pb2
from rmemd.consumers.registry import Found, Offer
from rmemd.engine.core import Core
from rmemd.engine.engine import Engine
from rmemd.engine.swap import Swapped
from rmemd.hooks.ops import NotifierOps
from rmemd.hooks.spec import HOOKS_VERSION
from rmemd.rpc.dispatch import Call


class ConsumerService:
    """The list of consumers, one VM's table, and plugins loaded while the daemon runs."""

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

    def LoadPlugins(self, request: pb.LoadPluginsRequest, call: Call) -> pb.LoadPluginsResponse:
        loaded = self._engine.load_plugins(list(request.names))
        names = {found.name for found in loaded}

        def offered(core: Core) -> list[pb.Consumer]:
            offers = sorted(core.registry.offers.items())
            return [_consumer(name, offer) for name, offer in offers if offer.platform in names]

        revision, consumers = self._engine.read(offered)
        return pb.LoadPluginsResponse(
            revision=revision, plugins=map(_plugin, loaded), consumers=consumers
        )

    def UnloadPlugin(self, request: pb.UnloadPluginRequest, call: Call) -> pb.UnloadPluginResponse:
        offered = self._engine.unload_plugin(request.name)
        return pb.UnloadPluginResponse(revision=self._engine.answered, consumers=offered)

    def ReloadPlugin(self, request: pb.ReloadPluginRequest, call: Call) -> pb.ReloadPluginResponse:
        reloaded = self._engine.reload_plugin(request.name)
        revision = self._engine.answered
        reply = pb.ReloadPluginResponse(
            revision=revision, previous_version=reloaded.before.version,
            version=reloaded.now.version,
        )  # fmt: skip
        for swapped in reloaded.vms:
            reply.vms.add(vm=swapped.vm, swap=swap_message(swapped, revision))
        return reply


def personality(in_place: bool) -> types_pb2.Personality.ValueType:
    """Return the enum value of a way to convert."""
    return types_pb2.PERSONALITY_IN_PLACE if in_place else types_pb2.PERSONALITY_ATTRIBUTES


def swap_message(swapped: Swapped, revision: int) -> vm_pb2.SwapConsumerResponse:
    """Return what a swap changed as a message."""
    return vm_pb2.SwapConsumerResponse(
        revision=revision, previous=swapped.previous, consumer=swapped.consumer,
        gained=swapped.gained, lost=swapped.lost, state_kind=swapped.kind,
        state_version=swapped.version, carried_entries=swapped.entries,
        released_pages=swapped.released_pages, held_pages=swapped.held_pages,
        reclassified_pages=swapped.reclassified_pages, pause_us=swapped.pause_us,
    )  # fmt: skip


def ops_table(ops: NotifierOps) -> list[pb.Op]:
    """Return a table, NULL entries included."""
    return [pb.Op(name=name, implemented=there) for name, there in ops.implemented().items()]


def _list(core: Core) -> pb.ListConsumersResponse:
    reply = pb.ListConsumersResponse(hooks_version=HOOKS_VERSION)
    reply.plugins.extend(map(_plugin, core.registry.found))
    offers = sorted(core.registry.offers.items())
    reply.consumers.extend(_consumer(name, offer) for name, offer in offers)
    return reply


def _plugin(found: Found) -> pb.Plugin:
    return pb.Plugin(
        name=found.name, distribution=found.distribution, version=found.version,
        quarantined=bool(found.error), error=found.error,
    )  # fmt: skip


def _consumer(name: str, offer: Offer) -> pb.Consumer:
    variant = offer.variant
    return pb.Consumer(
        name=name, platform=offer.platform, summary=variant.summary,
        private_memory=variant.private_memory,
        personality=personality(variant.personalities[0] == "in-place"),
        options=dict(variant.options), ops=ops_table(offer.ops),
    )  # fmt: skip
