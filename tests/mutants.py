"""Broken consumers: the template, with one mistake each, for the conformance kit to find.

Each class is a platform; import the module with plugins/template on the path.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
from msgspec.structs import replace

from rmemd.hooks import (
    AccessAnswer,
    Content,
    PageStates,
    Populated,
    State,
    Variant,
    Why,
    export_tables,
    hookimpl,
    import_tables,
)
from rmemd_template import MAPPED, NONE, SCHEMA, TemplateGuest, TemplatePlatform


class _Mutant(TemplatePlatform):
    guest: type[TemplateGuest] = TemplateGuest

    @hookimpl
    def variants(self) -> Any:
        return [Variant("mutant", "the template with a mistake")]

    @hookimpl
    def make_consumer(self, vm: Any, tx: Any, variant: Any, config: Any) -> object:
        return self.launched(vm, tx, plain=False)

    def launched(self, vm: Any, tx: Any, plain: bool) -> object:
        guest = self.guest(vm, self.owners)
        if not vm.importing:
            tx.set(guest.facts, "key", tx.new_key(plain=plain))
            tx.use_key(guest.key)
        return guest


class ForgetsToRelocate(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def migrate_folio(self, tx: Any, gfns: Any, src: Any, dst: Any) -> None:
            tx.put(self.owners, dst, self.owners.get(src))
            tx.put(self.owners, src, 0)


class CopiesRaw(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def migrate_folio(self, tx: Any, gfns: Any, src: Any, dst: Any) -> None:
            tx.relocate(src, dst, 0)
            tx.put(self.owners, dst, self.owners.get(src))
            tx.put(self.owners, src, 0)


class KeepsWhatWasPunched(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def invalidate_start(self, tx: Any, runs: Any, why: Why) -> None:
            tx.put(self.entries, runs.gfns(), MAPPED if why is Why.PUNCH else NONE)


class AllowsEverything(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def guest_access(self, tx: Any, vcpu: Any, runs: Any, write: Any) -> AccessAnswer:
            return AccessAnswer(np.zeros(runs.total, dtype=np.uint8))


class LiesInItsStates(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def page_state(self, gfns: Any, pfns: Any) -> PageStates:
            return PageStates(np.zeros(gfns.size + 1, dtype=np.uint8), ("mapped",))


class ChangesItsKey(_Mutant):
    """With each conversion the guest gets another key, and loses what is under the old one."""

    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def convert(self, tx: Any, runs: Any, to_private: Any) -> Content:
            if to_private:
                tx.use_key(tx.new_key())
            return Content.ZERO


class MakesNoiseOfPlainBytes(_Mutant):
    """It says that nobody can read the bytes, and has no encryption."""

    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def convert(self, tx: Any, runs: Any, to_private: Any) -> Content:
            return Content.NOISE

    @hookimpl
    def make_consumer(self, vm: Any, tx: Any, variant: Any, config: Any) -> object:
        return self.launched(vm, tx, plain=True)


class KeepsStateInAttributes(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def map(self, tx: Any, runs: Any) -> None:
            self.mapped = getattr(self, "mapped", 0) + runs.total
            tx.put(self.entries, runs.gfns(), MAPPED)


class WritesBesideTheTransaction(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def map(self, tx: Any, runs: Any) -> None:
            self.entries.apply("put", (runs.gfns(), MAPPED))


class NeverUnblocks(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def invalidate_end(self, tx: Any, runs: Any, why: Any, ok: Any) -> None:
            if why is Why.MIGRATE and runs.total:
                raise RuntimeError("not implemented")


class FreesNothing(_Mutant):
    @hookimpl
    def free(self, tx: Any, pfns: Any) -> Any:
        return np.ones(pfns.size, dtype=np.bool_)


class RunsOutOfKeys(_Mutant):
    """It counts the guests that it makes and never those that go."""

    @hookimpl
    def start(self, host: Any) -> None:
        super().start(host)
        self.slots = host.records("slots")

    @hookimpl
    def make_consumer(self, vm: Any, tx: Any, variant: Any, config: Any) -> object:
        assert len(self.slots) < 20, "no slot is left"
        if not vm.importing:
            tx.set(self.slots, vm.vm, True)
        return super().make_consumer(vm, tx, variant, config)


class LeavesStateBehind(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def export_state(self) -> Any:
            return export_tables(*SCHEMA, self.facts)

        @hookimpl
        def import_state(self, tx: Any, state: Any) -> None:
            import_tables(tx, state, *SCHEMA, self.facts)


class TakesAnybodysState(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def import_state(self, tx: Any, state: Any) -> None:
            import_tables(tx, replace(state, kind=SCHEMA[0], version=SCHEMA[1]), *SCHEMA,
                          self.entries, self.facts)  # fmt: skip


class TakesAKeyAgain(_Mutant):
    """It takes what is the host's at every swap: the frames' owners are not what they were."""

    @hookimpl
    def start(self, host: Any) -> None:
        super().start(host)
        self.slots = host.records("slots")

    @hookimpl
    def make_consumer(self, vm: Any, tx: Any, variant: Any, config: Any) -> object:
        tx.set(self.slots, len(self.slots), vm.vm)
        return super().make_consumer(vm, tx, variant, config)


class ExportsItsOwnClass(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def export_state(self) -> Any:
            return Mine(*SCHEMA, {})


class Mine(State):
    pass


# --- what a kill leaves of them -----------------------------------------------------------------
class PutsWhatIsNotPlain(_Mutant):
    """It puts an object of its own into a record, which no journal can hold."""

    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def map(self, tx: Any, runs: Any) -> None:
            tx.set(self.facts, "last", Memory(runs.total))
            tx.put(self.entries, runs.gfns(), MAPPED)


class TellsWhatIsNotPlain(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def map(self, tx: Any, runs: Any) -> None:
            tx.put(self.entries, runs.gfns(), MAPPED)
            tx.emit("mapped", gfns=set(runs.gfns().tolist()))


class ChangesARecordInPlace(_Mutant):
    """It changes a list that lies in a record: no transaction knows of it."""

    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def map(self, tx: Any, runs: Any) -> None:
            if "seen" not in self.facts:
                tx.set(self.facts, "seen", [])
            self.facts["seen"].append(runs.total)
            tx.put(self.entries, runs.gfns(), MAPPED)


class RemembersInAnObject(_Mutant):
    """What it says of its pages lies in an object of its own, which goes with the process."""

    class guest(TemplateGuest):  # noqa: N801
        @property
        def memory(self) -> Any:
            return self.__dict__.setdefault("kept", Memory(0))

        @hookimpl
        def map(self, tx: Any, runs: Any) -> None:
            self.memory.pages |= set(runs.gfns().tolist())
            tx.put(self.entries, runs.gfns(), MAPPED)

        @hookimpl
        def page_state(self, gfns: Any, pfns: Any) -> PageStates:
            known = np.isin(gfns, list(self.memory.pages)).astype(np.uint8)
            return PageStates(known, ("unknown", "known"))


class BeginsAnewAtARestart(_Mutant):
    """It has no swap, and so it believes that every object that is made is of a new VM."""

    class guest(TemplateGuest):  # noqa: N801
        export_state = None
        import_state = None

    def launched(self, vm: Any, tx: Any, plain: bool) -> object:
        guest = self.guest(vm, self.owners)
        tx.set(guest.facts, "key", tx.new_key())
        tx.use_key(guest.key)
        return guest


class FailsToResume(_Mutant):
    class guest(TemplateGuest):  # noqa: N801
        @hookimpl
        def resume(self, read: Any) -> str:
            raise RuntimeError("not implemented")


class ForgetsWhatItMeasured(_Mutant):
    """The hash of the pages runs in an object; a kill between populate and finalize loses it."""

    class guest(TemplateGuest):  # noqa: N801
        def __init__(self, vm: Any, owners: Any) -> None:
            super().__init__(vm, owners)
            self.measured = sha256()

        @hookimpl
        def populate(self, tx: Any, runs: Any, kinds: Any, measure: Any, source: Any) -> Populated:
            tx.copy_in(runs.pfns(), self.key, source)
            tx.put(self.owners, runs.pfns(), self.vm)
            self.measured.update(source.tobytes())
            return Populated(mapped=False)

        @hookimpl
        def finalize(self, tx: Any) -> bytes:
            return self.measured.digest()


class Memory:
    def __init__(self, total: int) -> None:
        self.total, self.pages = total, set[int]()
