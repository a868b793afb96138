"""A host with the SNP platform on it, and short ways to say what the tests do."""

import hashlib
from contextlib import contextmanager

import numpy as np
import pytest

from rmemd.errors import RmemError
from rmemd.hooks import Agent, HostAccess, PageKind, Runs
from rmemd.testing.hookbench import HookBench
from rmemd_snp import SnpPlatform

NFRAMES = 64


def arr(*numbers):
    return np.array(numbers, dtype=np.int64)


class Host:
    """A bench, its platform, and one call per thing that happens to pages."""

    def __init__(self, max_asid=4, npackages=1):
        self.platform = SnpPlatform(max_asid)
        self.bench = HookBench(self.platform, "snp", NFRAMES, npackages)
        self.rmp = self.platform.rmp
        self.firmware = self.platform.firmware

    def vm(self, variant="snp-move", vcpus=1, finalized=False, **config):
        vm = self.bench.make_vm(variant, config, vcpus)
        if finalized:
            self.run(vm, "finalize")
        return vm

    def consumer(self, vm):
        return self.bench._consumers[vm][0]

    def context(self, vm):
        return self.consumer(vm).context

    def asid(self, vm):
        return self.consumer(vm).guest.asid

    def run(self, vm, op, *args):
        return self.bench.run(vm, getattr(self.bench.ops(vm), op), *args)

    def leaf(self, function, *args, vm=0, **named):
        """Run an instruction or a command by itself."""
        return self.bench.run(vm, lambda tx: function(tx, *args, **named))

    def poke(self, pfn, **fields):
        """Forge an RMP entry."""
        for name, value in fields.items():
            self.leaf(lambda tx, n=name, v=value: tx.fill(getattr(self.rmp, n), pfn, 1, v))

    # --- events ------------------------------------------------------------------------------
    def prepare(self, vm, gfns, pfns):
        self.run(vm, "prepare", Runs.of_pages(arr(*gfns), arr(*pfns)))

    def map(self, vm, gfns, pfns):
        self.run(vm, "map", Runs.of_pages(arr(*gfns), arr(*pfns)))

    def fault(self, vm, gfns, pfns):
        self.prepare(vm, gfns, pfns)
        self.map(vm, gfns, pfns)

    def call(self, vm, call, first, n=1, level=0):
        return self.run(vm, "guest_call", 0, call, np.arange(first, first + n), level)

    def access(self, vm, gfns, pfns, write=False):
        runs = Runs.of_pages(arr(*gfns), arr(*pfns))
        return self.run(vm, "guest_access", 0, runs, write)

    def populate(self, vm, gfns, pfns, kinds=None, rows=None, measure=True):
        n = len(gfns)
        kinds = np.array(kinds or [PageKind.NORMAL] * n, dtype=np.uint8)
        rows = np.zeros((n, 4096), dtype=np.uint8) if rows is None else rows
        runs = Runs.of_pages(arr(*gfns), arr(*pfns))
        return self.run(vm, "populate", runs, kinds, measure, rows)

    def host(self, pfns, write, agent=Agent.HOST_KERNEL):
        return self.bench.run(
            0, self.bench.platform.host_access, arr(*pfns), HostAccess(agent, write)
        )

    def free(self, pfns):
        return self.bench.run(0, self.bench.platform.free, arr(*pfns)).tolist()

    def state(self, pfn):
        return self.rmp.state_name(pfn)

    def states(self, *pfns):
        return [self.state(pfn) for pfn in pfns]

    @contextmanager
    def refused(self, status, value, errno_name="EIO"):
        """Assert that the block is refused with a status and that nothing changed."""
        with self.bench.unchanged(), pytest.raises(RmemError) as caught:
            yield caught
        details = caught.value.details
        assert (details.vendor_status, details.vendor_value) == (status, value)
        assert caught.value.errno_name == errno_name
        assert details.rule.startswith("snp.md §")


@pytest.fixture(scope="session")
def make_host():
    return Host


@pytest.fixture
def host():
    return Host()


@pytest.fixture(scope="session")
def page_of():
    """P(tag) of snp.md §7: SHA-256(tag || LE64(i)) for i = 0, 1, ..."""

    def page(tag):
        parts = [hashlib.sha256(tag + i.to_bytes(8, "little")).digest() for i in range(128)]
        return np.frombuffer(b"".join(parts), dtype=np.uint8)

    return page
