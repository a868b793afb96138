"""Operations at random, made on an engine and on the specification.

An operation here is a tuple of a name and small numbers that are read modulo what there is, so
that a list of them means something after any of it was taken out. Each becomes one or more
operations of the oracle, which name what there is.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from rmemd.consumers.guard import Guard
from rmemd.engine.core import Options
from rmemd.engine.engine import Engine

from .hands import perform
from .kinds import KINDS
from .objects import PAGE, File, Vm
from .oracle import Op, Oracle, Outcome

BASE = 0x100
FILE_PAGES = 12
NFRAMES = 512
HOG_PAGES = 488
MMAP = 1
VMS_MAX, FILES_MAX, SESSIONS_MAX, HANDLERS_MAX = 5, 8, 3, 3
# bytes are compared after so many operations, and at the end
CONTENTS_EVERY = 32
# a measured VM's consumers can follow each other
KIN = ("tdx-today", "tdx-2022", "tdx-relocate", "sw-attributes", "null")


class DifferenceError(AssertionError):
    """The engine and the specification disagree; the message says how, in words."""


class World:
    """One engine beside one oracle, and every operation on them as a method."""

    def __init__(self, nframes: int = NFRAMES, nnodes: int = 1) -> None:
        options = Options(nframes=nframes, nnodes=nnodes, seed=1, kept_records=64)
        self.engine = self._power_on(options)
        self.oracle = Oracle(self.engine)
        self.spec = self.oracle.spec
        self.nframes = nframes
        self.done = 0
        # references that sessions took and have not put: (frame number, session)
        self.got: list[tuple[int, int]] = []
        # what came of what, so that a test can require that runs get everywhere
        self.seen: Counter[tuple[str, str]] = Counter()

    def _power_on(self, options: Options) -> Engine:
        return Engine(options, Guard(lambda: 0.0))

    def close(self) -> None:
        """Let the engine's memory go."""
        self.engine.close()

    def step(self, op: Op) -> None:
        """Do one operation on both and compare all that can be seen."""
        getattr(self, op[0])(*op[1:])
        self._bury()

    def finish(self) -> None:
        """Compare once more, bytes as well."""
        self._require(self.oracle.compare(self.engine, contents=True))

    def _do(self, *op: Any) -> Outcome:
        expected = self.oracle.apply(op)
        outcome = perform(self.engine, op)
        self.seen[op[0], outcome.reason or "ok"] += 1
        if expected.moves is not None and not outcome.errno:
            moves = outcome.value if op[0] == "migrate" else outcome.value[0]
            self.seen.update((op[0], move[2]) for move in moves)
        self.done += 1
        self._require(self.oracle.judge(op, expected, outcome))
        self._require(self.oracle.compare(self.engine, self.done % CONTENTS_EVERY == 0))
        return outcome

    def _require(self, differences: list[Any]) -> None:
        if differences:
            raise DifferenceError("\n".join(map(str, differences[:3])))

    def _bury(self) -> None:
        """Destroy what died, as its VMM would."""
        for vm in self._vms():
            if vm.dead:
                self._do("destroy_vm", vm.vm)

    # --- choosing ------------------------------------------------------------------------------
    def _vms(self) -> list[Vm]:
        return [vm for vm in self.spec.vms.values() if not vm.destroyed]

    def _vm(self, which: int) -> Vm | None:
        found = self._vms()
        return found[which % len(found)] if found else None

    def _files(self) -> list[File]:
        """Return the open files, and the one that was closed last."""
        every = list(self.spec.files.values())
        closed = [file for file in every if not file.open]
        return [file for file in every if file.open or file is closed[-1]]

    def _file(self, which: int) -> File | None:
        """Choose a file, or the memory behind an ordinary slot."""
        found = self._files()
        return found[which % len(found)] if found else None

    def _session(self, which: int) -> int:
        """Choose a session, 0 if there is none."""
        found = sorted(self.spec.sessions)
        return found[which % len(found)] if found else 0

    # --- objects -------------------------------------------------------------------------------
    def create_vm(
        self, kind: str, whole: bool = True, npages: int = FILE_PAGES, session: int = -1
    ) -> None:
        """Make a VM, of a session or of nobody; ``whole`` with memory that begins at BASE."""
        if len(self._vms()) >= VMS_MAX:
            return
        owner = self._session(session) if session >= 0 else 0
        vm = self._do("create_vm", kind, owner).value
        traits = KINDS[kind]
        if whole and traits.private_memory:
            file = self._do("create_file", vm, npages, MMAP).value
            self._do("add_slot", vm, 0, BASE * PAGE, npages * PAGE, file, 0)
        elif whole:
            self._do("add_slot", vm, 0, BASE * PAGE, npages * PAGE, None, 0)
        if traits.measured:
            self._launch(vm, len(self.spec.vms))

    def _launch(self, vm: int, seed: int) -> None:
        """Take initial pages in, some of them where there are none, and close the measurement."""
        for page in (seed % 5, (seed * 7) % 16):
            data = bytes([seed % 251 + 1]) * PAGE * (1 + seed % 2)
            guest, gfn = self.spec.vms[vm], BASE + page
            # to add a page twice is the vendor's affair
            if not any(at in guest.maps for at in (gfn, gfn + 1)):
                self._do("populate", vm, gfn * PAGE, data)
        self._do("pre_fault", vm, BASE * PAGE, PAGE)
        self._do("finalize", vm)

    def create_file(self, which: int, npages: int, flags: int) -> None:
        """Make a file of a VM that has private memory."""
        vm = self._vm(which)
        if vm is not None and len(self._files()) < FILES_MAX and vm.traits.private_memory:
            self._do("create_file", vm.vm, npages, flags)

    def close_file(self, which: int) -> None:
        file = self._file(which)
        if file is not None:
            self._do("close_file", file.file)

    def destroy_vm(self, which: int) -> None:
        vm = self._vm(which)
        if vm is not None:
            self._do("destroy_vm", vm.vm)

    def swap(self, which: int, kind: str) -> None:
        vm = self._vm(which)
        if vm is not None:
            self._do("swap", vm.vm, kind)

    def add_slot(
        self,
        which: int,
        slot: int,
        page: int,
        npages: int,
        which_file: int,
        pgoff: int,
        odd: int = 0,
    ) -> None:
        """Add a slot, ``odd`` bytes beside a page's start (in turn: address, size, offset)."""
        vm = self._vm(which)
        if vm is None:
            return
        by = [int(odd == k) * 512 for k in (1, 2, 3)]
        gpa, size = (BASE + page) * PAGE + by[0], npages * PAGE + by[1]
        if not vm.traits.private_memory:
            self._do("add_slot", vm.vm, slot, gpa, size, None, 0)
            return
        # mostly a file of its own
        own = [file for file in self._files() if file.vm == vm.vm and which_file % 5]
        files = own or self._files()
        if files:
            file = files[which_file % len(files)]
            self._do("add_slot", vm.vm, slot, gpa, size, file.file, pgoff * PAGE + by[2])

    def delete_slot(self, which: int, slot: int) -> None:
        vm = self._vm(which)
        if vm is not None:
            self._do("delete_slot", vm.vm, slot)

    # --- pages ---------------------------------------------------------------------------------
    def fallocate(self, which: int, mode: int, page: int, n: int, odd: int = 0) -> None:
        file = self._file(which)
        if file is not None and not self._is_tight(file, page, n):
            offset, length = page * PAGE + (odd & 1), n * PAGE + (odd >> 1)
            self._do("fallocate", file.file, mode, offset, length)

    def _is_tight(self, file: File, page: int, n: int) -> bool:
        return self.spec.is_tight(file.file, range(page, min(page + n, file.npages)))

    def set_policy(self, which: int, page: int, n: int, mode: int, nodes: int) -> None:
        """Set a policy; ``nodes`` are bits."""
        file = self._file(which)
        if file is not None:
            named = tuple(node for node in range(3) if nodes >> node & 1)
            self._do("set_policy", file.file, page * PAGE, n * PAGE, mode, named)

    def set_attributes(self, which: int, page: int, n: int, attributes: int, odd: int = 0) -> None:
        vm = self._vm(which)
        if vm is not None:
            self._do("set_attributes", vm.vm, (BASE + page) * PAGE + odd, n * PAGE, attributes)

    def convert_file(self, which: int, page: int, n: int, attributes: int, odd: int = 0) -> None:
        # mostly one that can be
        own = [file for file in self._files() if file.in_place]
        file = own[which % len(own)] if own and which % 8 else self._file(which)
        if file is not None:
            self._do("convert_file", file.file, page * PAGE + odd, n * PAGE, attributes)

    def map_gpa(self, which: int, page: int, n: int, private: bool, code: int) -> None:
        """The guest asks for a conversion; the VMM does it, in the VM's way, or says no."""
        vm = self._vm(which)
        if vm is None:
            return
        gpa = (BASE + page) * PAGE
        exited = self._do("map_gpa", vm.vm, gpa, n, private)
        if exited.errno or exited.value[0] != "HYPERCALL":
            return
        attributes, slot = 8 * private, vm.slot_at(BASE + page)
        if code == 0 and not vm.traits.in_place:
            self._do("set_attributes", vm.vm, gpa, n * PAGE, attributes)
        elif code == 0 and slot is not None:
            offset = (BASE + page - slot.gfn + slot.pgoff) * PAGE
            self._do("convert_file", slot.file.file, offset, n * PAGE, attributes)
        self._do("answer", vm.vm, code)

    def pre_fault(self, which: int, page: int, n: int) -> None:
        vm = self._vm(which)
        if vm is not None:
            self._do("pre_fault", vm.vm, (BASE + page) * PAGE, n * PAGE)

    def touch(self, which: int, page: int, n: int, private: bool) -> None:
        vm = self._vm(which)
        if vm is not None:
            self._do("touch", vm.vm, (BASE + page) * PAGE, n, private)

    def guest_io(self, which: int, at: int, length: int, private: int, value: int) -> None:
        """Have a guest write (``value`` above 0) or read bytes; ``private`` 2 is as they are."""
        vm = self._vm(which)
        if vm is None:
            return
        gpa = BASE * PAGE + at
        state = vm.is_private(gpa // PAGE) if private == 2 else bool(private)
        if value:
            self._do("write_guest", vm.vm, gpa, pattern(value, length), state)
        else:
            self._do("read_guest", vm.vm, gpa, length, state)

    def host_io(self, which: int, at: int, length: int, value: int) -> None:
        """Write (``value`` above 0) or read bytes through the host's mapping."""
        file = self._file(which)
        if file is None or self._is_tight(file, at // PAGE, length // PAGE + 2):
            return
        if value:
            self._do("host_write", file.file, at, pattern(value, length))
        else:
            self._do("host_read", file.file, at, length)

    # --- holders -------------------------------------------------------------------------------
    def open_session(self) -> None:
        if len(self.spec.sessions) < SESSIONS_MAX:
            self._do("open_session")

    def close_session(self, which: int) -> None:
        session = self._session(which)
        if session:
            self._do("close_session", session)
            self._do("close_session", session)
            self.got = [one for one in self.got if one[1] != session]

    def pin(self, which: int, page: int, n: int, session: int) -> None:
        """Pin as a session, or (-1) as a device of nobody's."""
        file = self._file(which)
        if file is not None and not self._is_tight(file, page, n):
            owner = self._session(session) if session >= 0 else 0
            self._do("pin", file.file, page * PAGE, n * PAGE, owner)

    def unpin(self, which: int) -> None:
        if self.spec.pins:
            handle = sorted(self.spec.pins)[which % len(self.spec.pins)]
            self._do("unpin", handle)
            self._do("unpin", handle)

    def get_pages(self, which: int, page: int, n: int, session: int) -> None:
        file, owner = self._file(which), self._session(session)
        if file is not None and owner and not self._is_tight(file, page, n):
            pfns = self._do("get_pages", file.file, page * PAGE, n * PAGE, owner).value
            self.got += [(pfn, owner) for pfn in pfns or ()]

    def put_pages(self, which: int, session: int) -> None:
        """Put a reference: mostly by who has it, sometimes by somebody else."""
        if self.got:
            at = which % len(self.got)
            pfn, owner = self.got[at]
            who = self._session(session) if session >= 0 else owner
            if not self._do("put_pages", (pfn,), who).errno:
                self.got.remove((pfn, who))

    # --- page fault handlers -------------------------------------------------------------------
    def register(self, which: int, page: int, n: int, session: int) -> None:
        file = self._file(which)
        if file is not None and len(self.spec.handlers) < HANDLERS_MAX:
            self._do("register", file.file, page, n, self._session(session))

    def unregister(self, which: int, session: int) -> None:
        if self.spec.handlers:
            handle = sorted(self.spec.handlers)[which % len(self.spec.handlers)]
            self._do("unregister", handle, self._session(session) if session >= 0 else 0)

    def resolve(self, how: str, which: int, page: int, n: int, value: int) -> None:
        """Fill holes of a registered range, or have their faults go on."""
        handlers = list(self.spec.handlers.values())
        if not handlers:
            return
        number, span, session = handlers[which % len(handlers)]
        file = self.spec.files[number]
        # mostly where a fault would wait
        holes = [at for at in span if (at, file.half(False)) not in file.pages]
        at = holes[page % len(holes)] if holes and page % 4 else span.start + page % len(span)
        if self._is_tight(file, at, n):
            return
        if how == "uf_copy":
            self._do(how, number, at, pattern(value, n * PAGE), session)
        elif how == "uf_zeropage":
            self._do(how, number, at, n, session if value else 0)
        else:
            self._do(how, number, at, n, bool(value), session)

    # --- the host ------------------------------------------------------------------------------
    def _pfns(self, which: int, n: int) -> tuple[int, ...]:
        """Return frames that are in use, in the order of their numbers, from a chosen one."""
        known = sorted(pfn for pfn, frame in self.spec.by_pfn.items() if not frame.offline)
        start = which % len(known) if known else 0
        return tuple(known[start : start + n])

    def migrate(self, which: int, n: int, node: int = -1) -> None:
        self._do("migrate", self._pfns(which, n), node if node >= 0 else None)

    def compact(self, node: int) -> None:
        self._do("compact", node)

    def offline(self, pfn: int, n: int) -> None:
        self._do("offline", pfn % self.nframes, n)

    def online(self, pfn: int, n: int) -> None:
        self._do("online", pfn % self.nframes, n)

    def poison(self, which: int) -> None:
        for pfn in self._pfns(which, 1):
            self._do("poison", pfn)

    def poison_free(self, pfn: int) -> None:
        """Poison a frame that nobody has; it is never free again (I4, I13)."""
        if pfn not in self.spec.by_pfn and pfn not in self.spec.reserved:
            self._do("poison", pfn)


def pattern(value: int, length: int) -> bytes:
    """Return bytes that differ from page to page and within one."""
    word = bytes((value * 31 + i * 7) % 255 + 1 for i in range(61))
    return (word * (length // len(word) + 1))[:length]
