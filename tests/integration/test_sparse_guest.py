"""A guest costs what it touched: 1 TiB of it on a host of 16 GiB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LIMIT_MIB = 64
PROGRAMME = """
import resource
import sys

sys.path.insert(0, {tests!r})
from guests import Guest, make_engine
from rmemd.units import PAGE_SIZE

TIB = 1 << 40


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


engine = make_engine((16 << 30) // PAGE_SIZE)
# the tables of the host itself are paid for, whoever comes
engine.core.space.snapshot()
before = resident()
guest = Guest(engine, {consumer!r}, npages=TIB // PAGE_SIZE, gfn=1 << 20)
guest.convert(0, TIB // PAGE_SIZE, private=False)
guest.convert(0, TIB // PAGE_SIZE, private=True)
guest.convert(12345, TIB // PAGE_SIZE // 2, private=False)
for page in (0, TIB // PAGE_SIZE // 2 + 20000, TIB // PAGE_SIZE - 1):
    guest.fill(page, 1, seed=page)
    assert guest.holds(page, 1, seed=page)
print((resident() - before) >> 20)
"""


def test_a_1_tib_guest_costs_little() -> None:
    programme = PROGRAMME.format(tests=str(Path(__file__).parents[1]), consumer="tdx-today")
    done = subprocess.run(
        [sys.executable, "-c", programme], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= LIMIT_MIB
