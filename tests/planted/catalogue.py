"""The planted bugs: one class each row of reliability.md §1 has, in the real code, with its check.

A table of data; ``lasting`` has those of what must outlive the process. Texts are searched for as
they are; one that is not there once fails the suite, so whoever changes such a line changes its
mutant with it.
"""

from __future__ import annotations

from planted.lasting import LASTING
from planted.planting import Mutant
from planted.rows import (
    AUTHORITY,
    BIND,
    BOUND,
    COUNT,
    DEATH,
    FAILED,
    FLUSH,
    HANDLE,
    HOOK,
    LAUNCH,
    LEAK,
    LINK,
    NODE,
    OWNER,
    POISON,
    POOL,
    RANGE,
    REACH,
    RIGHTS,
    SECRET,
    SEED,
    SPEC,
    STEP,
)

REFERENCES = "tests/integration/test_references.py"
HOSTILE = "tests/integration/test_session_hostile.py"
FILES = "tests/integration/test_session_files.py"
KEYS = "tests/integration/test_keys.py"
REPLIES = "tests/unit/test_replies.py"
TDX_RULES = "plugins/tdx/tests/test_rules.py"
SNP_RULES = "plugins/snp/tests/test_firmware_rules.py"
RMP_RULES = "plugins/snp/tests/test_rmp_rules.py"
MENDED = "tests/oracle/test_oracle.py::test_a_difference_that_was_mended_stays_mended"
PKVM_RULES = "plugins/pkvm/tests/test_rules.py"

_TABLE = (
    # --- a binding outlives its memslot ------------------------------------------------------
    Mutant(
        "binding-outlives-its-slot", BIND, "rmemd.engine.lifecycle",
        "            core.files.unbind(tx, file, vm.info.vm, slot.slot)\n", "            pass\n",
        "slots_come_and_go", "I3",
    ),
    Mutant(
        "slot-map-outlives-its-slot", BIND, "rmemd.engine.lifecycle",
        "    tx.drop(vm.slots, slot.slot)\n    tx.fill(vm.slotmap, slot.gfn, slot.npages, 0)\n",
        "    tx.drop(vm.slots, slot.slot)\n",
        "slots_come_and_go", "I3",
    ),
    Mutant(
        "mapping-outlives-its-slot", BIND, "rmemd.engine.lifecycle",
        "[View(vm, slot.gfn, slot.npages)], Why.SLOT", "[], Why.SLOT",
        "slots_come_and_go", "I7",
    ),
    Mutant(
        "moved-slot-covers-both-places", BIND, "rmemd.engine.lifecycle",
        "            tx.fill(vm.slotmap, old.gfn, old.npages, 0)\n", "",
        "slots_come_and_go", "I3",
    ),
    Mutant(
        "mapping-outlives-its-file", BIND, "rmemd.engine.memory",
        "views_of(core, file, 0, size), Why.CLOSE", "[], Why.CLOSE",
        "slots_come_and_go", "I7",
    ),
    Mutant(
        "binding-outlives-its-vm", BIND, "rmemd.engine.lifecycle",
        "            for slot in slots:\n                _unbind",
        "            for slot in slots[1:]:\n                _unbind",
        "a_vm_goes_and_its_file_stays", "I3",
    ),
    # --- reachable after the notifier returned -----------------------------------------------
    Mutant(
        "private-mapping-after-the-zap", REACH, "rmemd.engine.bracket",
        "    view.vm.clear(tx, private)\n", "",
        "pages_are_punched_and_converted", "I7",
    ),
    Mutant(
        "shared-mapping-after-the-zap", REACH, "rmemd.engine.bracket",
        "    view.vm.clear(tx, shared)\n", "",
        "pages_are_punched_and_converted", "I5",
    ),
    Mutant(
        "lookup-without-a-reference", REACH, "rmemd.engine.fault",
        "    core.ledger.hold(tx, held, taken)\n", "",
        "a_zap_between_lookup_and_installation",
    ),
    Mutant(
        "lost-race-not-seen", REACH, "rmemd.engine.fault",
        "core.ranges.sequence(vm_id) != found.sequence", "False",
        "a_zap_between_lookup_and_installation", "I7",
    ),
    Mutant(
        "invalidation-not-counted", REACH, "rmemd.engine.bracket",
        "    core.ranges.invalidated(view.vm.info.vm)\n", "",
        "a_zap_between_lookup_and_installation", "I7",
    ),
    Mutant(
        "shared-mapping-of-a-page-that-moved", REACH, "rmemd.engine.migrate",
        "        tx.put(vm.mirror, zapped, 0)\n", "",
        "pages_are_punched_and_converted", "I7",
    ),
    Mutant(
        "suspended-write-is-visible", REACH, "rmemd.hooks.tx",
        "            inverse = self.space.apply(self._undo[i])\n"
        '            self._again.append(inverse if inverse.op == "attach" else self.redo[i])\n',
        '            if self.redo[i].table.startswith("host/"):\n'
        "                continue\n"
        "            inverse = self.space.apply(self._undo[i])\n"
        '            self._again.append(inverse if inverse.op == "attach" else self.redo[i])\n',
        "half_a_move_is_seen_by_nobody",
    ),
    # --- no invalidate hook ------------------------------------------------------------------
    Mutant(
        "conversion-without-invalidation", HOOK, "rmemd.engine.attributes",
        "            if slots:\n", "            if not slots:\n",
        "pages_are_punched_and_converted", "I5",
    ),
    Mutant(
        "punch-without-invalidation", HOOK, "rmemd.engine.memory",
        "invalidating(core, tx, views, Why.PUNCH)", "invalidating(core, tx, [], Why.PUNCH)",
        "pages_are_punched_and_converted", "I7",
    ),
    Mutant(
        "snp-keeps-its-nested-entries", HOOK, "rmemd_snp.consumer",
        "        tx.put(self.npt, runs.gfns(), UNMAPPED)\n", "",
        "vendors_agree_with_the_mirror",
    ),
    Mutant(
        "tdx-keeps-its-secure-ept-entries", HOOK, "rmemd_tdx.leaves",
        '    tx.put(td.sept, gfns, t.REMOVED if td.fields["OP_STATE"] in t.OP_IMPORTS '
        "else t.FREE)\n",
        "",
        "vendors_agree_with_the_mirror",
    ),
    Mutant(
        "pkvm-moves-without-its-stage-2", HOOK, "rmemd_pkvm.guest",
        "        self._el2.host_move_guest(tx, self.handle, gfns[held], dst[held])\n", "",
        "vendors_agree_with_the_mirror",
    ),
    Mutant(
        "vmsa-stays-where-it-was", HOOK, "rmemd_snp.consumer",
        "                tx.set(self.vmsas, vcpu, int(dst[at]))\n", "                pass\n",
        "a_vmsa_moves_with_its_vcpu",
    ),
    Mutant(
        "swap-without-invalidation", HOOK, "rmemd.engine.swap",
        "        core.ranges.invalidated(one.consumer.vm)\n", "",
        "tests/integration/test_swap.py::"
        "test_a_fault_that_looked_up_before_asks_the_new_consumer",
    ),
    Mutant(
        "bracket-without-its-end", HOOK, "rmemd.engine.bracket",
        '        core.consumer(view.vm).call(tx, "invalidate_end", runs, why, True)\n',
        "        pass\n",
        "pages_are_punched_and_converted", "I8",
    ),
    # --- error paths -------------------------------------------------------------------------
    Mutant(
        "refused-installation-leaks-its-reference", LEAK, "rmemd.engine.fault",
        "        yield from core.unit(lambda: _let_go(core, found, trace=None))\n        raise",
        "        raise",
        "a_refused_fault_holds_nothing",
    ),
    Mutant(
        "lost-race-leaks-its-reference", LEAK, "rmemd.engine.fault",
        "        yield from core.unit(lambda: _let_go(core, found, wanted.trace))\n",
        "        pass\n",
        "a_zap_between_lookup_and_installation",
    ),
    Mutant(
        "refusal-without-undo", LEAK, "rmemd.engine.core",
        "        else:\n            tx.rollback()\n", "",
        "a_refusal_changes_nothing",
    ),
    Mutant(
        "undo-forgets-records", LEAK, "rmemd.hooks.tx",
        "        for write in reversed(self._undo[mark.writes :]):\n",
        "        for write in reversed(self._undo[mark.writes :]):\n"
        '            if write.op in ("set", "insert"):\n                continue\n',
        "a_refusal_changes_nothing",
    ),
    Mutant(
        "undo-forgets-sparse-fills", LEAK, "rmemd.hooks.tx",
        "        for write in reversed(self._undo[mark.writes :]):\n",
        "        for write in reversed(self._undo[mark.writes :]):\n"
        '            if write.op in ("restore", "store"):\n                continue\n',
        "a_refusal_changes_nothing",
    ),
    Mutant(
        "new-page-published-before-it-is-wiped", LEAK, "rmemd.engine.frames",
        "    wipe(core, tx, pfns)\n    tx.put(host.owner", "    tx.put(host.owner",
        "a_new_page_reads_zeros",
    ),
    Mutant(
        "consumer-outlives-its-vm", LEAK, "rmemd.engine.lifecycle",
        "        del core.consumers[number]\n", "",
        "a_vm_goes_and_its_file_stays", "I16",
    ),
    Mutant(
        "unpin-leaves-the-ledger", LEAK, "rmemd.model.ledger",
        "        self._sessions.drop_pin(tx, pin.pin)\n", "",
        "pins_come_and_go", "I2",
    ),
    # --- a failed migration ------------------------------------------------------------------
    Mutant(
        "busy-page-keeps-its-destination", POOL, "rmemd.engine.migrate",
        "        _hand_back(core, tx, dst[busy])\n", "",
        "what_is_held_does_not_move", "I1",
    ),
    Mutant(
        "moved-page-keeps-its-source", POOL, "rmemd.engine.migrate",
        "    frames.free_frames(core, tx, src[ok])\n", "",
        "pages_move_with_their_bytes", "I1",
    ),
    Mutant(
        "source-keeps-its-owner", POOL, "rmemd.engine.migrate",
        "    tx.put(core.host.owner, src[ok], 0)\n", "",
        "pages_move_with_their_bytes", "I1",
    ),
    Mutant(
        "bytes-do-not-move", POOL, "rmemd_tdx.leaves",
        '    tx.relocate(src[has_content], dst[has_content], td.fields["KEY"])\n', "",
        "pages_move_with_their_bytes", "I10",
    ),
    Mutant(
        "bytes-sealed-for-the-old-frame", POOL, "rmemd.store.controller",
        "self.write_plan(dst[rest], rows, key_id)", "self.write_plan(src[rest], rows, key_id)",
        "pages_move_with_their_bytes", "I10",
    ),
    Mutant(
        "taken-frames-not-counted", POOL, "rmemd.model.buddy",
        "    tx.put(host.use, pfns, int(use))\n    _count(host, tx, pfns, -1)\n    return pfns\n",
        "    tx.put(host.use, pfns, int(use))\n    return pfns\n",
        "pages_move_with_their_bytes", "I3",
    ),
    Mutant(
        "el2-slot-leaks-at-teardown", POOL, "rmemd_pkvm.hypercalls",
        "        tx.drop(self._vms, handle)\n", "",
        f"{PKVM_RULES}::test_el2_takes_255_vms_and_gives_a_slot_back",
    ),
    Mutant(
        "context-page-leaks-at-decommission", POOL, "rmemd_snp.platform",
        "        self.rmp.rmpupdate(tx, page, TO_HYPERVISOR)\n", "",
        f"{SNP_RULES}::test_many_guests_come_and_go",
    ),
    # --- a failed conversion -----------------------------------------------------------------
    Mutant(
        "freed-though-the-vendor-refuses", FAILED, "rmemd.engine.frames",
        '            refused |= platform.call(tx, 0, "free", pfns)\n',
        '            platform.call(tx, 0, "free", pfns)\n',
        "what_cannot_be_reclaimed_is_leaked", "I12",
    ),
    Mutant(
        "freed-though-never-reset", FAILED, "rmemd_tdx.leaves",
        "(self.page_type.get(pfns) != t.PT_NDA) | (self.unreset.get(pfns) != 0)",
        "self.unreset.get(pfns) != 0",
        "what_cannot_be_reclaimed_is_leaked",
    ),
    Mutant(
        "freed-though-the-rmp-has-it", FAILED, "rmemd_snp.platform",
        "        stuck[assigned[codes != 0]] = True\n", "",
        "what_firmware_keeps_is_leaked",
    ),
    Mutant(
        "kept-page-freed-with-its-file", FAILED, "rmemd.engine.frames",
        "    refused |= (host.flags.get(pfns) & KEPT) != 0\n", "",
        f"{REFERENCES}::test_step_6_a_page_that_its_file_still_has_is_leaked_when_the_file_goes",
    ),
    Mutant(
        "failed-removal-drops-the-hold", FAILED, "rmemd.engine.bracket",
        "    pfns: I64 = every[~kept]\n", "    pfns: I64 = every\n",
        f"{REFERENCES}::test_step_6_failed_removal_keeps_the_hold_and_leaks_the_page",
    ),
    # --- transient or intended ---------------------------------------------------------------
    Mutant(
        "extra-reference-not-seen", COUNT, "rmemd.engine.migrate",
        "    return held_by_others(core, vm, src)\n", "    return np.zeros_like(extra)\n",
        "what_is_held_does_not_move", "I3",
    ),
    Mutant(
        "movable-without-the-hook", COUNT, "rmemd.engine.compact",
        "        answer[mine] = ~governed(core, file, pfns[mine]) | asked\n",
        "        answer[mine] = True\n",
        "null_is_unmovable", "I9",
    ),
    Mutant(
        "pinned-page-becomes-private", COUNT, "rmemd.engine.convert",
        "    extra = held_by_others(core, vm, pfns)\n    if extra.any():",
        "    extra = held_by_others(core, vm, pfns)\n    if extra.all():",
        "nobody_holds_what_becomes_private",
    ),
    Mutant(
        "long-term-pin-counted-as-a-reference", COUNT, "rmemd.model.ledger",
        "        _change(tx, self._host.pins, pfns, _ONE_MORE)\n",
        "        _change(tx, self._host.refs, pfns, _ONE_MORE)\n",
        "pins_come_and_go", "I2",
    ),
    Mutant(
        "forgotten-holder-still-counts", COUNT, "rmemd.model.ledger",
        "        _change(tx, self._host.pins, pfns, _ONE_LESS)\n",
        "",
        "pins_come_and_go", "I2",
    ),
    Mutant(
        "mapping-s-hold-not-dropped", COUNT, "rmemd.engine.bracket",
        "    if consumer.ops.unpin is not None and private.total:",
        "    if consumer.ops.unpin is not None and private.total > 1:",
        f"{REFERENCES}::test_step_6_a_zap_drops_the_mappings_hold[tdx-2022]",
    ),
    # --- ranges ------------------------------------------------------------------------------
    Mutant(
        "slot-offset-is-signed", RANGE, "rmemd.engine.lifecycle",
        "    if slot.pgoff + slot.npages > file.info.size_pages:",
        "    signed = slot.pgoff - (1 << 52) if slot.pgoff >> 51 else slot.pgoff\n"
        "    if signed + slot.npages > file.info.size_pages:",
        "ranges_end_inside", "I17",
    ),
    Mutant(
        "attribute-range-wraps", RANGE, "rmemd.engine.convert",
        "start + size > MAX_GFN * PAGE_SIZE:",
        "(start + size) % (MAX_GFN * PAGE_SIZE + PAGE_SIZE) > MAX_GFN * PAGE_SIZE:",
        "ranges_end_inside",
    ),
    Mutant(
        "grant-past-its-file", RANGE, "rmemd.engine.sessions",
        "grant.npages <= 0 or grant.pgoff + grant.npages > file.info.size_pages:",
        "grant.npages <= 0 or grant.pgoff > file.info.size_pages:",
        "ranges_end_inside", "I17",
    ),
    Mutant(
        "allocation-past-its-file", RANGE, "rmemd.engine.memory",
        "    if start + npages > file.info.size_pages:", "    if start > file.info.size_pages:",
        "ranges_end_inside", "I1",
    ),
    Mutant(
        "handler-past-its-file", RANGE, "rmemd.engine.userfaultops",
        "pgoff < 0 or npages <= 0 or pgoff + npages > file.info.size_pages:",
        "pgoff < 0 or npages <= 0 or pgoff > file.info.size_pages:",
        "ranges_end_inside", "I17",
    ),
    # --- reuse -------------------------------------------------------------------------------
    Mutant(
        "frame-reused-unscrubbed", FLUSH, "rmemd.engine.frames",
        "    dirty = ~bad & ((flags & ARENA) != 0)\n",
        "    dirty = np.zeros(freed.size, dtype=np.bool_)\n",
        "frames_are_scrubbed_before_reuse", "I4",
    ),
    Mutant(
        "scrub-that-destroys-nothing", FLUSH, "rmemd.engine.core",
        "work=partial(self.controller.punch, pfns)", "work=list",
        "frames_are_scrubbed_before_reuse",
    ),
    Mutant(
        "free-before-it-is-scrubbed", FLUSH, "rmemd.engine.frames",
        "    tx.put(host.use, freed[dirty], int(Use.SCRUBBING))\n",
        "    tx.put(host.use, freed[dirty], int(Use.FREE))\n",
        "poison_stays", "I3",
    ),
    Mutant(
        "free-frame-keeps-its-key", FLUSH, "rmemd.engine.frames",
        "    tx.put(host.key, freed, 0)\n", "",
        "frames_are_scrubbed_before_reuse", "I4",
    ),
    Mutant(
        "other-half-is-left", FLUSH, "rmemd.engine.convert",
        "            punch = partial(core.shared_memory(file).punch, present)\n",
        "            punch = list\n",
        "neither_half_is_left",
    ),
    Mutant(
        "tdx-page-without-its-reset", FLUSH, "rmemd_tdx.consumer",
        "        leaves.reset(tx, self.td.pamt, pfns)\n", "",
        f"{TDX_RULES}::test_rule_20_a_zap_resets_with_a_vcpu_inside",
    ),
    Mutant(
        "asid-reused-without-a-flush", FLUSH, "rmemd_snp.firmware",
        '            _if(exists and not self.clean.at(asid), "DFFLUSH_REQUIRED"),\n', "",
        f"{SNP_RULES}::test_rule_16_activate_checks_in_order_one_repair_at_a_time",
    ),
    Mutant(
        "frame-given-back-before-the-flush", FLUSH, "rmemd.engine.memory",
        "            with invalidating(core, tx, views, Why.PUNCH):\n"
        "                frames.remove(core, tx, file, present, private=True)\n",
        "            frames.remove(core, tx, file, present, private=True)\n"
        "            with invalidating(core, tx, views, Why.PUNCH):\n"
        "                pass\n",
        "pages_are_punched_and_converted", "I6",
    ),
    # --- the launch --------------------------------------------------------------------------
    Mutant(
        "tdx-launch-goes-on", LAUNCH, "rmemd_tdx.consumer",
        '    def finalize(self, tx: HookTx) -> bytes:\n'
        '        """KVM_TDX_FINALIZE_VM: MR.FINALIZE, and MRTD is final."""\n'
        "        self._refuse_if_dead()\n"
        "        if self._runnable:",
        '    def finalize(self, tx: HookTx) -> bytes:\n'
        '        """KVM_TDX_FINALIZE_VM: MR.FINALIZE, and MRTD is final."""\n'
        "        self._refuse_if_dead()\n"
        "        if False:",
        f"{TDX_RULES}::test_finalize_twice",
    ),
    Mutant(
        "snp-launch-never-ends", LAUNCH, "rmemd_snp.firmware",
        "        self._store(tx, context, guest._replace(state=RUNNING))\n", "",
        "a_launch_is_closed_once",
    ),
    Mutant(
        "snp-runs-before-it-is-finished", LAUNCH, "rmemd_snp.consumer",
        "        if guest.state != RUNNING:", "        if False:",
        f"{SNP_RULES}::test_entering_before_launch_finish_is_einval",
    ),
    Mutant(
        "held-writes-are-overwritten", LAUNCH, "rmemd.hooks.tx",
        "            if any(_overlap(write, held) for held in holder.redo):",
        "            if False and any(_overlap(write, held) for held in holder.redo):",
        "tests/integration/test_interleaving.py::"
        "test_an_operation_waits_for_bytes_on_their_way[allocate]",
    ),
    # --- descriptors -------------------------------------------------------------------------
    Mutant(
        "unexpected-descriptors-are-taken", RIGHTS, "rmemd.session.talk",
        "self._sock.recvmsg_into([self._buffer])", "self._sock.recvmsg_into([self._buffer], 4096)",
        f"{HOSTILE}::test_descriptors_that_nobody_asked_for",
    ),
    Mutant(
        "unexpected-descriptors-are-ignored", RIGHTS, "rmemd.session.talk",
        "        if flags & _CUT:", "        if flags & _CUT_BYTES:",
        f"{HOSTILE}::test_descriptors_that_nobody_asked_for",
    ),
    Mutant(
        "spare-memory-of-another-session", RIGHTS, "rmemd.engine.sharedmemory",
        "found.session != session or ", "",
        f"{FILES}::test_memory_never_goes_from_session_to_session",
    ),
    Mutant(
        "memory-that-two-were-given-is-set-aside", RIGHTS, "rmemd.engine.sharedmemory",
        "session if alone else ANYBODY", "session",
        f"{FILES}::test_what_two_were_given_is_not_set_aside",
    ),
    Mutant(
        "memory-that-is-pinned-is-set-aside", RIGHTS, "rmemd.engine.memory",
        "    return not frames.referenced(core, pfns).any()\n",
        "    return True\n",
        f"{FILES}::test_what_somebody_holds_is_not_set_aside",
    ),
    Mutant(
        "unsealed-descriptor-leaves", RIGHTS, "rmemd.store.memfd",
        "    return seals & SEALS == SEALS and stat.", "    return stat.",
        "tests/integration/test_session_leases.py::test_only_a_sealed_memfd_leaves",
    ),
    Mutant(
        "arena-leaves", RIGHTS, "rmemd.store.memfd",
        '    return name_of(fd).startswith(f"/memfd:{SHARED_NAME}") and is_sealed(fd)\n',
        "    return is_sealed(fd)\n",
        "tests/integration/test_session_leases.py::test_only_a_sealed_memfd_leaves",
    ),
    # --- a client's death --------------------------------------------------------------------
    Mutant(
        "death-takes-others-vms", DEATH, "rmemd.engine.sessions",
        "    vms = _of_sessions(core.vms.of_session, numbers)",
        "    vms = [vm.info.vm for vm in core.vms.all()]",
        "an_end_touches_nobody_else",
    ),
    Mutant(
        "death-takes-others-pins", DEATH, "rmemd.engine.sessions",
        "        for pin in core.sessions.pins_of(info.session):",
        "        for pin in core.sessions.pins():",
        "an_end_touches_nobody_else", "I14",
    ),
    Mutant(
        "death-leaves-pins", DEATH, "rmemd.engine.sessions",
        "            held.append(pins.release_pin(core, tx, pin))\n", "            pass\n",
        "an_end_leaves_nothing", "I14",
    ),
    Mutant(
        "death-leaves-references", DEATH, "rmemd.engine.sessions",
        "        held = [core.ledger.forget(tx, info.label)]\n",
        "        held = [core.ledger.frames(info.label)]\n",
        "an_end_leaves_nothing", "I14",
    ),
    Mutant(
        "death-leaves-files", DEATH, "rmemd.engine.sessions",
        "    for file in _of_sessions(core.files.of_session, numbers):",
        "    for file in []:",
        "an_end_leaves_nothing", "I14",
    ),
    Mutant(
        "death-leaves-handlers", DEATH, "rmemd.engine.sessions",
        "        userfaultops.release(core, tx, info.session)\n", "",
        "an_end_leaves_nothing", "I14",
    ),
    Mutant(
        "death-leaves-children", DEATH, "rmemd.model.sessions",
        "            found += [self._info[child] for child in self._info.grouped(info.session)]\n",
        "            pass\n",
        "an_end_leaves_nothing", "I14",
    ),
    Mutant(
        "late-reaper-blames-its-clients", DEATH, "rmemd.access.callers",
        "            if late > LATE_SECONDS:", "            if False:",
        "tests/integration/test_session_leases.py::test_a_late_reaper_blames_itself",
    ),
    # --- links -------------------------------------------------------------------------------
    Mutant(
        "link-to-a-directory-is-followed", LINK, "rmemd.daemon.sockets",
        "        info = self.path.lstat()\n", "        info = self.path.stat()\n",
        "tests/integration/test_daemon.py::test_a_link_to_a_directory_is_refused",
    ),
    # --- bounds ------------------------------------------------------------------------------
    Mutant(
        "quota-after-allocation", BOUND, "rmemd.engine.frames",
        "    core.quotas.charge_frames(core, file.info.owner.tenant, pgoffs.size)\n"
        "    use = Use.PRIVATE if private else Use.SHARED\n"
        "    pfns = np.empty(pgoffs.size, dtype=np.int64)\n"
        "    for mask, nodes in _by_policy(core, file, pgoffs):\n"
        "        pfns[mask] = buddy.take(host, tx, int(mask.sum()), use, nodes)\n",
        "    use = Use.PRIVATE if private else Use.SHARED\n"
        "    pfns = np.empty(pgoffs.size, dtype=np.int64)\n"
        "    for mask, nodes in _by_policy(core, file, pgoffs):\n"
        "        pfns[mask] = buddy.take(host, tx, int(mask.sum()), use, nodes)\n"
        "    core.quotas.charge_frames(core, file.info.owner.tenant, pgoffs.size)\n",
        "quotas_come_first",
    ),
    Mutant(
        "one-session-too-many", BOUND, "rmemd.engine.quotas",
        "            if used >= limit:", "            if used > limit:",
        "quotas_come_first",
    ),
    Mutant(
        "references-are-not-pins", BOUND, "rmemd.engine.pins",
        "        core.quotas.charge_pins(core, owner.tenant, npages)\n"
        "        file = core.files.get(number)\n",
        "        file = core.files.get(number)\n",
        "quotas_come_first",
    ),
    Mutant(
        "keys-are-never-forgotten", BOUND, "rmemd.engine.keys",
        "        tx.drop(host.keys, number)\n", "        pass\n",
        f"{KEYS}::test_vms_that_are_gone_leave_nothing[null]",
    ),
    Mutant(
        "ranges-are-never-forgotten", BOUND, "rmemd.engine.lifecycle",
        '        core.ranges.forget("vm", number)\n', "",
        f"{KEYS}::test_vms_that_are_gone_leave_nothing[null]",
    ),
    Mutant(
        "descriptors-without-a-quota", BOUND, "rmemd.session.descriptors",
        "            if limit != UNLIMITED and used >= limit:", "            if False:",
        f"{HOSTILE}::test_every_quota_is_checked_before_anything_is_made",
    ),
    Mutant(
        "tickets-without-a-bound", BOUND, "rmemd.access.callers",
        "            if sum(other.tenant == ticket.tenant for _, other in waiting) >= TICKETS_MAX:",
        "            if False:",
        "tests/unit/test_access.py::test_tickets_are_bounded",
    ),
    Mutant(
        "answers-without-a-bound", BOUND, "rmemd.rpc.replies",
        "                self._shrink()\n", "",
        f"{REPLIES}::test_who_has_most_loses_the_oldest",
    ),
    # --- poison ------------------------------------------------------------------------------
    Mutant(
        "poisoned-frame-is-freed", POISON, "rmemd.engine.frames",
        "    bad = (flags & POISON) != 0\n", "    bad = np.zeros(freed.size, dtype=np.bool_)\n",
        "poison_stays", "I4",
    ),
    Mutant(
        "poisoned-page-stays-mapped", POISON, "rmemd.engine.physical",
        "    with invalidating(core, tx, views, Why.POISON):",
        "    with invalidating(core, tx, [], Why.POISON):",
        "poison_stays", "I7",
    ),
    Mutant(
        "poisoned-while-scrubbed-and-given-back", POISON, "rmemd.engine.core",
        "            give(self.host, tx, pfns[~bad])\n", "            give(self.host, tx, pfns)\n",
        "poison_stays", "I4",
    ),
    Mutant(
        "poisoned-page-is-copied-from", POISON, "rmemd.engine.migrate",
        "    poisoned = core.host.poisoned(src)\n    if poisoned.any():",
        "    poisoned = core.host.poisoned(src)\n    if False:",
        "poison_stays",
    ),
    Mutant(
        "free-poisoned-frame-is-taken", POISON, "rmemd.engine.physical",
        "                take_exactly(core.host, tx, pfns, Use.POISONED)\n",
        "                pass\n",
        "poison_stays", "I4",
    ),
    Mutant(
        "failed-integrity-is-forgotten", POISON, "rmemd.store.controller",
        "        tx.put(self._host.stored, pfns, int(Stored.TAINTED))\n", "        pass\n",
        "tests/unit/test_controller.py::test_taint_is_sticky_until_a_full_write",
    ),
    # --- authority ---------------------------------------------------------------------------
    Mutant(
        "ticket-is-good-twice", AUTHORITY, "rmemd.engine.sessions",
        "        core.notes.drop(TICKETS, ticket)\n", "        pass\n",
        "a_ticket_is_good_once",
    ),
    Mutant(
        "token-outlives-its-session", AUTHORITY, "rmemd.access.callers",
        "            info = self._engine.core.sessions.alive(known.session)\n",
        "            info = self._engine.core.sessions.get(known.session)\n",
        "a_ticket_is_good_once",
    ),
    Mutant(
        "token-at-any-door", AUTHORITY, "rmemd.access.callers",
        "        if known.door != door or (tenant and tenant != known.tenant):",
        "        if tenant and tenant != known.tenant:",
        "a_ticket_is_good_once",
    ),
    Mutant(
        "token-for-any-certificate", AUTHORITY, "rmemd.access.callers",
        "        if known.door != door or (tenant and tenant != known.tenant):",
        "        if known.door != door:",
        "a_ticket_is_good_once",
    ),
    Mutant(
        "ticket-for-any-tenant", AUTHORITY, "rmemd.access.callers",
        "        if ticket.tenant != caller.tenant and not caller.is_admin:", "        if False:",
        "a_ticket_is_good_once",
    ),
    Mutant(
        "ticket-outlives-its-issuer", AUTHORITY, "rmemd.access.callers",
        "        if found is None or (found.parent and not self._is_alive(found.parent)):",
        "        if found is None:",
        # the session itself is opened below its parent, which refuses in other words
        "a_ticket_is_good_once",
    ),
    Mutant(
        "grant-checked-at-one-end", AUTHORITY, "rmemd.model.sessions",
        "        return at >= end\n", "        return at > pgoff\n",
        "a_grant_is_a_range",
    ),
    Mutant(
        "read-only-grant-is-written", AUTHORITY, "rmemd.model.sessions",
        " and not (write and grant.read_only):", ":",
        "a_grant_is_a_range",
    ),
    Mutant(
        "grant-revoked-while-pinned", AUTHORITY, "rmemd.engine.sessions",
        "        _refuse_pinned(core, losers, number, pgoff, npages)\n", "",
        "a_grant_is_a_range",
    ),
    Mutant(
        "vm-of-another-tenant", AUTHORITY, "rmemd.access.rules",
        "    if not caller.sees(owner) or (caller.role == GUEST and number != caller.vm):",
        "    if caller.role == GUEST and number != caller.vm:",
        "others_objects_are_absent",
    ),
    Mutant(
        "pin-of-another-tenant", AUTHORITY, "rmemd.access.rules",
        "    mine = caller.sees(owner) and (", "    mine = (",
        "others_objects_are_absent",
    ),
    Mutant(
        "forbidden-is-not-absent", AUTHORITY, "rmemd.access.rules",
        'raise NO_SUCH_FILE(f"file/{number} does not exist", field="file", for_log=_whose(owner))',
        'raise NO_SUCH_FILE(f"file/{number} is not yours", field="file", for_log=_whose(owner))',
        "others_objects_are_absent",
    ),
    Mutant(
        "guest-session-in-another-s-vm", AUTHORITY, "rmemd.engine.sessions",
        "    if vm and core.vms.get(vm).info.owner.tenant != tenant:", "    if False:",
        "others_objects_are_absent",
    ),
    Mutant(
        "event-told-to-another-tenant", AUTHORITY, "rmemd.rpc.watch",
        '    return caller.is_admin or event.fields.get("tenant") == caller.tenant\n',
        "    return True\n",
        "events_are_for_their_tenant",
    ),
    Mutant(
        "event-told-to-another-guest", AUTHORITY, "rmemd.rpc.watch",
        "        return event.vm == caller.vm\n", "        return event.vm != 0\n",
        "events_are_for_their_tenant",
    ),
    Mutant(
        "plugin-writes-any-table", AUTHORITY, "rmemd.hooks.hooktx",
        "        if not name.startswith(self._prefixes):", "        if not name:",
        "plugins_write_their_own_tables",
    ),
    # --- handles, revisions, replies ---------------------------------------------------------
    Mutant(
        "handle-given-out-twice", HANDLE, "rmemd.hooks.tx",
        "        self.set(counters, counter, number)\n",
        '        if counter != "pin":\n            self.set(counters, counter, number)\n',
        "handles_are_never_used_again", "I16",
    ),
    Mutant(
        "change-without-a-revision", HANDLE, "rmemd.engine.core",
        "            committed = bool(tx.redo or tx.events)\n",
        "            committed = bool(tx.events)\n",
        "every_change_has_a_revision",
    ),
    Mutant(
        "reply-kept-under-another-tenant", HANDLE, "rmemd.rpc.replies",
        "        number, digest = (session, text), _digest(method, data)\n",
        '        tenant, number, digest = "", (session, text), _digest(method, data)\n',
        f"{REPLIES}::test_an_id_belongs_to_its_tenant_and_session",
    ),
    # --- plaintext ---------------------------------------------------------------------------
    Mutant(
        "tweak-is-ignored", SECRET, "rmemd.store.keys",
        "self._cipher.encrypt(pfns, rows)", "self._cipher.encrypt(0 * pfns, rows)",
        "the_bus_sees_no_plaintext",
        also=(("self._cipher.decrypt(pfns, rows)", "self._cipher.decrypt(0 * pfns, rows)"),),
    ),
    Mutant(
        "key-number-is-ignored", SECRET, "rmemd.store.keys",
        '_derive(seed, spec.key_id, b"xts", 64)', '_derive(seed, 1, b"xts", 64)',
        "the_bus_sees_no_plaintext",
    ),
    Mutant(
        "key-is-reused", SECRET, "rmemd.hooks.hooktx",
        '        key_id = self._tx.next_id("key")\n',
        '        key_id = self._tx.next_id("key") and 1\n',
        "the_bus_sees_no_plaintext",
    ),
    Mutant(
        "key-is-forgotten-under-bytes", SECRET, "rmemd.engine.keys",
        " and number not in under", "",
        f"{KEYS}::test_a_key_stays_for_as_long_as_bytes_are_under_it",
    ),
    Mutant(
        "key-is-forgotten-on-the-way", SECRET, "rmemd.engine.keys",
        " or core.ranges.any_in_progress", "",
        f"{KEYS}::test_nothing_is_forgotten_while_bytes_are_on_their_way",
    ),
    Mutant(
        "own-conversion-leaves-plaintext", SECRET, "rmemd.engine.convert",
        "        under = key if content is Content.PRESERVED else 0\n", "        under = 0\n",
        "a_guest_s_own_conversion_is_sealed",
    ),
    # --- one owner ---------------------------------------------------------------------------
    Mutant(
        "lock-let-go-with-half-a-move", OWNER, "rmemd.engine.driver",
        "                step.tx.suspend()\n"
        "                with self.waits.holding(step.tx):\n"
        "                    yield\n",
        "                yield\n",
        "half_a_move_is_seen_by_nobody",
        also=(("            step.tx.resume()\n", ""),),
    ),
    Mutant(
        "moved-page-reads-zeros", OWNER, "rmemd.store.controller",
        "        key_zero = (stored == Stored.KEY_ZERO) & (keys == key_id)\n"
        "        done = []\n",
        "        key_zero = (stored != Stored.RAW_ZERO) & (keys == key_id)\n"
        "        done = []\n",
        "pages_move_with_their_bytes", "I10",
    ),
    Mutant(
        "moved-page-has-no-new-owner", OWNER, "rmemd.engine.migrate",
        "    tx.put(host.owner, dst, file.info.file)\n", "",
        "pages_move_with_their_bytes", "I10",
    ),
    # --- nodes -------------------------------------------------------------------------------
    Mutant(
        "policy-is-not-asked", NODE, "rmemd.engine.frames",
        "            groups.append((mask, policy.nodes))\n",
        "            groups.append((mask, every))\n",
        "pages_lie_where_their_policy_says", "I22",
    ),
    # --- steps -------------------------------------------------------------------------------
    Mutant(
        "hook-outside-of-a-step", STEP, "rmemd.engine.convert",
        "        carry = partial(_carry, core, file, changing, pfns, private, content, key)\n",
        "        def carry() -> list[Contents]:\n"
        "            _ask(core, tx, vm, file, changing, pfns, private)\n"
        "            return _carry(core, file, changing, pfns, private, content, key)\n",
        "hooks_and_bytes_keep_to_their_steps", "I25",
    ),
    Mutant(
        "many-bytes-under-the-lock", STEP, "rmemd.engine.driver",
        "        if sum(op.pfns.size for op in tx.byte_ops) > self.options.inline_pages:\n"
        "            return False\n",
        "",
        "hooks_and_bytes_keep_to_their_steps", "I25",
    ),
    Mutant(
        "overdue-hook-goes-on", STEP, "rmemd.engine.core",
        "            self._freeze_overdue(tx)\n", "",
        "an_overdue_hook_freezes_its_vm", "I25",
    ),
    # --- the same seed, and the specification ------------------------------------------------
    Mutant(
        "keys-are-not-of-the-seed", SEED, "rmemd.store.keys",
        'struct.pack("<qq", seed, key_id)',
        'struct.pack("<qq", __import__("time").monotonic_ns(), key_id)',
        "tests/integration/test_journal.py::"
        "test_the_same_requests_give_the_same_frames_keys_and_revisions",
    ),
    Mutant(
        "fault-rules-are-not-of-the-seed", SEED, "rmemd.engine.faultrules",
        "        self._seed = seed\n",
        "        self._seed = int.from_bytes(__import__('os').urandom(6), 'little')\n",
        "tests/unit/test_faultrules.py::test_chance_is_drawn_from_seed_rule_and_passage_alone",
    ),
    Mutant(
        "full-node-is-not-passed-over", SPEC, "rmemd.engine.frames",
        "(node, *(other for other in every if other != node))", "(node,)",
        f"{MENDED}[interleaving passes over a node that is full]",
    ),
    Mutant(
        "conversion-asks-of-what-changes-only", SPEC, "rmemd.engine.convert",
        "_require_unreferenced(core, file, vm, present)",
        "_require_unreferenced(core, file, vm, changing)",
        f"{MENDED}[conversion in place checks every folio of its range]",
    ),
    Mutant(
        "one-half-s-removal-takes-the-other-s-leaf", SPEC, "rmemd.engine.bracket",
        "zapped = None if file.info.in_place else private\n", "zapped = None\n",
        f"{MENDED}[a punch leaves the leaf of the shared half]",
    ),
    Mutant(
        "no-frame-for-one-is-none-for-all", SPEC, "rmemd.engine.memory",
        "            if n == 1 or refusal.reason.kind is not Kind.EXHAUSTED:\n"
        "                raise refusal.with_details(progress_pages=done) from refusal\n",
        "            if n:\n"
        "                raise refusal.with_details(progress_pages=done) from refusal\n",
        f"{MENDED}[an allocation that runs out keeps its prefix]",
    ),
)  # fmt: skip

MUTANTS = {mutant.name: mutant for mutant in (*_TABLE, *LASTING)}
assert len(MUTANTS) == len(_TABLE) + len(LASTING), "two mutants have one name"
