"""Drive one platform and its consumers without an engine: hooks, a space, nothing else.

Owns ``HookBench``, which plugins' own tests build on: it keeps the tables that the engine would,
runs a hook in a transaction and undoes it when the hook refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np

from rmemd.hooks.hooktx import HookTx, HostContext, VmContext
from rmemd.hooks.ops import NotifierOps, PlatformOps, compile_consumer, compile_platform
from rmemd.hooks.tables import Space, TableSpec, same_state
from rmemd.hooks.tx import COUNTERS, FRAME_KEYS, KEYS, VM_KEYS, ByteOp, Tx
from rmemd.hooks.types import Runs

T = TypeVar("T")


class HookBench:
    """A host of ``nframes`` frames with one platform on it.

    Attributes:
        space: every table.
        platform: the compiled platform ops.
        byte_ops: the byte movements named by the last hook that was run.
        injections: point -> what ``tx.injected`` answers there, once.
        killed: vm -> why a hook killed it.
    """

    def __init__(
        self, platform: object, name: str, nframes: int = 4096, npackages: int = 1
    ) -> None:
        self.name = name
        self.space = Space()
        self.byte_ops: list[ByteOp] = []
        self.injections: dict[str, str] = {}
        self.vcpus: dict[int, int] = {}
        self.inside: dict[int, list[int]] = {}
        self.killed: dict[int, str] = {}
        self.platform: PlatformOps = compile_platform(platform, name)
        self._consumers: dict[int, tuple[object, NotifierOps]] = {}
        tx = Tx(self.space, "start")
        for table in (COUNTERS, KEYS, VM_KEYS):
            tx.create(TableSpec(table, "records"))
        tx.create(TableSpec(FRAME_KEYS, "dense", "u4", 0, nframes))
        self.platform.start(HostContext(name, nframes, npackages, tx))

    def make_vm(self, variant: str, config: Mapping[str, str] | None = None, vcpus: int = 1) -> int:
        """Make a VM with a consumer of ``variant`` and return its number."""
        vm = len(self._consumers) + 1
        self.vcpus[vm] = vcpus
        self.inside[vm] = []
        with self._tx(f"make vm/{vm}") as tx:
            consumer = self.platform.make_consumer(
                VmContext(vm, self.name, tx), self._hook_tx(tx, vm), variant, config or {}
            )
        self._consumers[vm] = (consumer, compile_consumer(consumer, f"{variant}(vm/{vm})"))
        return vm

    def ops(self, vm: int) -> NotifierOps:
        """Return the VM's compiled ops."""
        return self._consumers[vm][1]

    def run(self, vm: int, op: Callable[..., T] | None, *args: Any) -> T:
        """Run one hook of the VM's consumer, or of the platform, in a transaction of its own."""
        assert op is not None, "the op is NULL"
        with self._tx("run") as tx:
            return op(self._hook_tx(tx, vm), *args)

    def enter(self, vm: int, vcpu: int) -> None:
        """Have a vCPU enter the guest."""
        self.run(vm, self.ops(vm).enter, vcpu)
        self.inside[vm].append(vcpu)

    def destroy(self, vm: int) -> None:
        """Destroy the VM's consumer."""
        self.run(vm, self.platform.destroy_consumer, self._consumers[vm][0])

    def swap(self, vm: int, variant: str, config: Mapping[str, str] | None = None) -> None:
        """Have another consumer take over the VM: export, fresh tables, import."""
        export_state = self.ops(vm).export_state
        assert export_state is not None, "the op is NULL"
        state = export_state()
        with self._tx(f"swap vm/{vm}") as tx:
            for name in [n for n in self.space.tables if n.startswith(f"vm/{vm}/{self.name}/")]:
                tx.destroy(name)
            consumer = self.platform.make_consumer(
                VmContext(vm, self.name, tx, importing=True), self._hook_tx(tx, vm), variant,
                config or {},
            )  # fmt: skip
            ops = compile_consumer(consumer, f"{variant}(vm/{vm})")
            assert ops.import_state is not None, "the op is NULL"
            ops.import_state(self._hook_tx(tx, vm), state)
        self._consumers[vm] = (consumer, ops)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Assert that the block leaves the whole state equal to before."""
        before = self.space.snapshot()
        yield
        assert same_state(before, self.space.snapshot()) == []

    # --- what the engine would do for a hook ---------------------------------------------------
    def kick(self, tx: Tx, vm: int) -> None:
        """Have the VM's vCPUs leave the guest."""
        for vcpu in list(self.inside[vm]):
            leave = self.ops(vm).leave
            if leave is not None:
                leave(self._hook_tx(tx, vm), vcpu)
        self.inside[vm].clear()

    def vcpu_count(self, vm: int) -> int:
        """Count the VM's vCPUs."""
        return self.vcpus[vm]

    def kill(self, tx: Tx, vm: int, reason: str) -> None:
        """Remember why the VM was killed."""
        self.killed[vm] = reason

    def injected(self, tx: Tx, vm: int, point: str) -> str:
        """Answer an injection once."""
        return self.injections.pop(point, "")

    def _hook_tx(self, tx: Tx, vm: int) -> HookTx:
        return HookTx(tx, (f"vm/{vm}/{self.name}/", f"platform/{self.name}/"), vm, self)

    @contextmanager
    def _tx(self, label: str) -> Iterator[Tx]:
        tx = Tx(self.space, label)
        try:
            yield tx
        except BaseException:
            tx.rollback()
            raise
        self.byte_ops = tx.byte_ops
        keys: Any = self.space.tables[FRAME_KEYS]
        for op in tx.byte_ops:
            tx.put(keys, op.pfns, op.key_id)


def runs(gfn: int, pfn: int, npages: int = 1) -> Runs:
    """Return one run as ``Runs``."""
    one = [np.array([value], dtype=np.int64) for value in (gfn, pfn, npages)]
    return Runs(*one)
