"""Random sequences against one page at a time, written from snp.md and not from the plugin."""

import hashlib

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rmemd.hooks import AccessCode, CallAction, GuestCall, Runs, Why

FRAMES = range(2, 10)
GFNS = range(20, 25)


class Oracle:
    """RMP entries as (gfn, validated), None for Hypervisor; a nested table; a launch digest."""

    def __init__(self):
        self.rmp = dict.fromkeys(FRAMES)
        self.npt = {}
        self.digest = bytes(48)

    def state(self, pfn):
        entry = self.rmp[pfn]
        return "Hypervisor" if entry is None else ("Guest-Invalid", "Guest-Valid")[entry[1]]

    def launch(self, gfn, pfn, kind, page):
        content = hashlib.sha384(page).digest() if kind == 1 else bytes(48)
        info = self.digest + content + bytes([0x70, 0, kind, 0, 0, 0, 0, 0])
        self.digest = hashlib.sha384(info + (gfn * 4096).to_bytes(8, "little")).digest()
        self.rmp[pfn] = (gfn, True)

    def prepare(self, gfn, pfn):
        self.rmp[pfn] = self.rmp[pfn] or (gfn, False)

    def access(self, gfn, pfn):
        entry = self.rmp[pfn]
        if entry is None or entry[0] != gfn:
            return AccessCode.FAULT
        return AccessCode.OK if entry[1] else AccessCode.EXCEPTION

    def pvalidate(self, gfns, value):
        unchanged = False
        for done, gfn in enumerate(gfns):
            pfn = self.npt.get(gfn)
            if pfn is None or self.access(gfn, pfn) is AccessCode.FAULT:
                return CallAction.FAULT, done, unchanged
            unchanged |= self.rmp[pfn][1] == value
            self.rmp[pfn] = (gfn, value)
        return CallAction.DONE, len(gfns), unchanged

    def move(self, src, dst):
        if self.rmp[src] is not None:
            self.rmp[dst] = self.rmp[src]
            self.rmp[src] = (self.rmp[src][0], False)


frame = st.sampled_from(FRAMES)
gfn = st.sampled_from(GFNS)
pairs = st.lists(st.tuples(gfn, frame), min_size=1, max_size=4, unique_by=lambda pair: pair[1])
frames = st.lists(frame, min_size=1, max_size=4, unique=True)
step = st.one_of(
    st.tuples(st.just("prepare"), pairs),
    st.tuples(st.just("map"), pairs),
    st.tuples(st.just("zap"), pairs),
    st.tuples(st.just("access"), pairs),
    st.tuples(st.just("pvalidate"), gfn, st.integers(1, 3), st.booleans()),
    st.tuples(st.just("move"), frames, frames),
    st.tuples(st.just("share"), frames),
    st.tuples(st.just("free"), frames),
)
launches = st.lists(
    st.tuples(gfn, frame, st.sampled_from([1, 3, 4, 5, 6]), st.integers(0, 255)),
    max_size=4,
    unique_by=lambda page: page[1],
)


def columns(rows):
    return Runs.of_pages(*(np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)))


class Pair:
    """The plugin and the oracle, given the same."""

    def __init__(self, host):
        self.host, self.oracle = host, Oracle()
        self.vm = host.vm()

    def launch(self, pages):
        kinds = [kind for _, _, kind, _ in pages]
        rows = np.array([[fill] * 4096 for _, _, _, fill in pages], dtype=np.uint8)
        self.host.populate(
            self.vm, [page[0] for page in pages], [page[1] for page in pages], kinds, rows
        )
        for gfn, pfn, kind, fill in pages:
            self.oracle.launch(gfn, pfn, kind, bytes([fill]) * 4096)

    def prepare(self, rows):
        self.host.run(self.vm, "prepare", columns(rows))
        for gfn, pfn in rows:
            self.oracle.prepare(gfn, pfn)

    def map(self, rows):
        rows = list({gfn: (gfn, pfn) for gfn, pfn in rows}.values())
        self.host.run(self.vm, "map", columns(rows))
        self.oracle.npt.update(rows)

    def zap(self, rows):
        self.host.run(self.vm, "invalidate_start", columns(rows), Why.PUNCH)
        self.host.run(self.vm, "invalidate_end", columns(rows), Why.PUNCH, True)
        for gfn, _ in rows:
            self.oracle.npt.pop(gfn, None)

    def access(self, rows):
        answer = self.host.run(self.vm, "guest_access", 0, columns(rows), True)
        expected = [self.oracle.access(gfn, pfn) for gfn, pfn in rows]
        assert answer.codes.tolist() == expected
        assert (answer.exception is not None) == (AccessCode.EXCEPTION in expected)

    def pvalidate(self, first, n, value):
        call = GuestCall.VALIDATE if value else GuestCall.RESCIND
        answer = self.host.call(self.vm, call, first, n)
        action, done, unchanged = self.oracle.pvalidate(range(first, first + n), value)
        assert (answer.action, answer.done, answer.status) == (action, done, 0)
        assert answer.status_name == ("SUCCESS CF=1" if unchanged else "SUCCESS")

    def move(self, src, dst):
        free = [pfn for pfn in dst if self.oracle.rmp[pfn] is None and pfn not in src]
        n = min(len(src), len(free))
        src, dst = src[:n], free[:n]
        if n:
            gfns = [(self.oracle.rmp[pfn] or (30,))[0] for pfn in src]
            arrays = [np.array(column, dtype=np.int64) for column in (gfns, src, dst)]
            self.host.run(self.vm, "migrate_folio", *arrays)
            for one, other in zip(src, dst, strict=True):
                self.oracle.move(one, other)

    def share(self, pfns):
        self.host.run(self.vm, "convert", columns([(30, pfn) for pfn in pfns]), False)
        self.oracle.rmp.update(dict.fromkeys(pfns))

    def free(self, pfns):
        assert not any(self.host.free(pfns))
        self.oracle.rmp.update(dict.fromkeys(pfns))

    def check(self):
        assert self.host.states(*FRAMES) == [self.oracle.state(pfn) for pfn in FRAMES]
        writes = self.host.host(FRAMES, write=True).views.tolist()
        assert [view == 3 for view in writes] == [
            self.oracle.rmp[pfn] is not None for pfn in FRAMES
        ]


@settings(deadline=None)
@given(launched=launches, steps=st.lists(step, max_size=25))
def test_random_sequences_agree_with_the_oracle(make_host, launched, steps):
    both = Pair(make_host())
    if launched:
        both.launch(launched)
    assert both.host.run(both.vm, "finalize") == both.oracle.digest or not launched
    for name, *args in steps:
        getattr(both, name)(*args)
        both.check()
    both.host.bench.destroy(both.vm)
    assert not any(both.host.free(list(FRAMES)))
    assert not both.host.rmp.bits.view.any()
