"""The planted bugs about what must outlive a process: journal, memfds, keeper, answers, sessions.

A table of data, a part of ``catalogue``.
"""

from __future__ import annotations

from planted.planting import Mutant
from planted.rows import AUTHORITY, CRASH, HANDLE, LOG, MOMENT, SECRET, SUCCESSOR, SYSTEM

REOPEN = "tests/integration/test_reopen.py"
AT_ANY_CALL = f"{REOPEN}::test_killed_at_any_system_call_each_page_is_old_or_new"
AT_ANY_FRAME = f"{REOPEN}::test_killed_at_any_frame_state_and_memory_agree"
TWICE = f"{REOPEN}::test_a_call_that_is_repeated_after_a_kill_is_not_made_twice"
CLOSED_ONCE = f"{REOPEN}::test_a_file_whose_close_was_cut_off_at_any_frame_is_closed_once"
LOGS = "tests/unit/test_log.py"
CODEC = "tests/unit/test_codec.py"
ANSWERED = "tests/integration/test_answered_once.py"
RESUMED = "tests/integration/test_resumed_sessions.py"
KEEPER = "tests/integration/test_keeper.py"
REVISION = "tests/integration/test_own_revision.py"
REPLIES = "tests/unit/test_replies.py"
STARTS = "tests/unit/test_fdstore.py"
EACH_CALL = "tests/integration/test_failing_calls.py::test_each_page_is_old_or_new"

LASTING = (
    # --- bytes and their records -------------------------------------------------------------
    Mutant(
        "record-flushed-after-the-lock-goes", CRASH, "rmemd.engine.driver",
        "        self.journal.flush()\n        try:\n            if step.wait:\n",
        "        try:\n            if step.wait:\n",
        f"{AT_ANY_CALL}[null-punch-written]",
    ),
    Mutant(
        "answered-before-its-record", CRASH, "rmemd.engine.driver",
        "                self.journal.settle()\n", "                pass\n",
        f"{TWICE}[create_vm]",
    ),
    Mutant(
        "bytes-in-place-before-their-record", CRASH, "rmemd.engine.core",
        "        self.journal.flush()\n        try:\n            self.controller.store_raw",
        "        try:\n            self.controller.store_raw",
        f"{AT_ANY_CALL}[tdx-relocate-write-written]",
    ),
    Mutant(
        "checkpoint-between-record-and-bytes", CRASH, "rmemd.engine.core",
        "        self.journal.flush()\n        try:\n            self.controller.store_raw",
        "        self.journal.settle()\n        try:\n            self.controller.store_raw",
        f"{REOPEN}::"
        "test_a_write_in_place_is_undone_though_its_record_makes_the_log_long",
    ),
    Mutant(
        "write-in-place-without-its-sums", CRASH, "rmemd.engine.core",
        "        tx.in_place.append((contents.pfns, page_sums(raw)))\n", "",
        f"{AT_ANY_CALL}[tdx-relocate-write-written]",
    ),
    Mutant(
        "cut-off-write-is-not-undone", CRASH, "rmemd.engine.reopen",
        "    undone = _undo_in_flight(core, done)\n", "    undone = 0\n",
        f"{AT_ANY_CALL}[tdx-relocate-write-written]",
    ),
    Mutant(
        "old-write-is-undone-again", CRASH, "rmemd.engine.reopen",
        "        done.in_flight = []\n", "",
        f"{AT_ANY_CALL}[tdx-relocate-migrate-written]",
    ),
    Mutant(
        "strays-are-left-in-the-arena", CRASH, "rmemd.engine.reopen",
        "    core.controller.punch(strays)\n", "",
        f"{AT_ANY_CALL}[tdx-relocate-migrate-written]",
    ),
    Mutant(
        "recorded-destruction-is-not-done-again", CRASH, "rmemd.engine.reopen",
        "    core.scrub_later(scrubbing)\n", "",
        f"{AT_ANY_CALL}[null-destroy-written]",
    ),
    Mutant(
        "arena-s-half-is-not-destroyed-again", CRASH, "rmemd.engine.reopen",
        "    _discard_shared_in_arena(core)\n    scrubbing", "    scrubbing",
        f"{AT_ANY_CALL}[tdx-relocate in place-convert-written]",
    ),
    Mutant(
        "shared-half-is-not-destroyed-again", CRASH, "rmemd.engine.reopen",
        "    _empty(core, number, there[file.attributes.get(there) == PRIVATE])\n", "",
        f"{AT_ANY_CALL}[sw-protected-convert-written]",
    ),
    Mutant(
        "shared-punch-is-not-done-again", CRASH, "rmemd.engine.reopen",
        "        if owner == number:\n            _empty(core, number, pages(start, npages))\n",
        "        if owner == number:\n",
        f"{AT_ANY_CALL}[sw-protected-convert-written]",
    ),
    Mutant(
        "memfd-goes-before-its-record", CRASH, "rmemd.engine.sharedmemory",
        "            self._notes.drop(SHARED_MEMFDS, number, flush=True)\n            self._close",
        "            self._notes.drop(SHARED_MEMFDS, number, flush=False)\n            self._close",
        CLOSED_ONCE,
    ),
    # --- exactly once ------------------------------------------------------------------------
    Mutant(
        "result-is-not-noted", CRASH, "rmemd.engine.driver",
        "            self.calls.came_to(run, named(result), self.journal.revision)\n",
        "            pass\n",
        f"{TWICE}[create_vm]",
    ),
    Mutant(
        "result-in-another-frame-than-its-record", CRASH, "rmemd.engine.driver",
        "            self.calls.came_to(run, named(result), self.journal.revision)\n",
        "            self.journal.flush()\n"
        "            self.calls.came_to(run, named(result), self.journal.revision)\n",
        CLOSED_ONCE,
    ),
    Mutant(
        "result-after-the-destruction", CRASH, "rmemd.engine.driver",
        "        if run is not None and self.journal.revision != before:\n",
        "        if then is not None:\n"
        "            yield from then()\n"
        "            then = None\n"
        "        if run is not None and self.journal.revision != before:\n",
        CLOSED_ONCE,
    ),
    Mutant(
        "results-are-not-taken-over", HANDLE, "rmemd.engine.core",
        "            self.calls.restore()\n", "",
        f"{TWICE}[create_vm]",
    ),
    Mutant(
        "progress-is-not-noted", CRASH, "rmemd.engine.driver",
        "            self.calls.got_to(run, done)\n", "            pass\n",
        f"{REOPEN}::test_a_populate_that_was_cut_off_goes_on",
    ),
    Mutant(
        "answer-is-kept-in-this-process-alone", HANDLE, "rmemd.rpc.replies",
        "            self._core.notes.set(REPLIES, (tenant, *number), note)\n", "",
        f"{ANSWERED}::test_an_answer_that_left_is_given_again_by_the_next_daemon",
    ),
    Mutant(
        "answer-is-carried-out-again", HANDLE, "rmemd.rpc.replies",
        "            kept.entries[number] = _Entry("
        "note.digest, ended=True, ended_at=now, answer=answer)\n",
        "            kept.entries[number] = _Entry(note.digest, ended=True, answer=answer)\n"
        '            kept.entries[number].answer = Answer(b"")\n',
        f"{ANSWERED}::test_an_answer_that_left_is_given_again_by_the_next_daemon",
    ),
    Mutant(
        "answer-of-another-call", HANDLE, "rmemd.rpc.replies",
        "            if entry.digest != digest:\n", "            if False:\n",
        f"{ANSWERED}::test_an_answer_that_left_is_given_again_by_the_next_daemon",
    ),
    Mutant(
        "answer-is-of-anybody-with-the-id", HANDLE, "rmemd.rpc.replies",
        "            found = self._claim(tenant, number, digest, method in SECRET)\n",
        "            number = (0, text)\n"
        "            found = self._claim(tenant, number, digest, method in SECRET)\n",
        f"{REPLIES}::test_an_id_belongs_to_its_tenant_and_session",
    ),
    Mutant(
        "start-is-another-job", HANDLE, "rmemd.rpc.jobs",
        "            started = self._started_by(call)\n", "            started = None\n",
        f"{ANSWERED}::test_a_start_that_is_repeated_is_the_job_that_was_started",
    ),
    Mutant(
        "short-change-is-made-again", HANDLE, "rmemd.engine.driver",
        "                self.calls.came_to(run, named(result), self.answered.revision)\n",
        "                pass\n",
        f"{ANSWERED}::"
        "test_what_was_carried_out_is_answered_and_not_done_again[DeleteOperation]",
    ),
    Mutant(
        "datagram-is-carried-out-again", HANDLE, "rmemd.session.absent",
        "            forget_results(self._core, one.session, but_newest=True)\n",
        "            forget_results(self._core, one.session)\n",
        f"{RESUMED}::test_a_datagram_that_was_not_answered_is_answered_as_it_was",
    ),
    Mutant(
        "memory-of-another-life-is-not-missed", HANDLE, "rmemd.access.callers",
        "        if begins is not None and begins[0] != self._life:\n", "        if False:\n",
        f"{ANSWERED}::test_who_means_another_daemon_is_told",
    ),
    # --- the moment of a reply ---------------------------------------------------------------
    Mutant(
        "revision-taken-after-the-lock", MOMENT, "rmemd.engine.driver",
        "                self.answered.revision = mine.ended_at\n", "",
        f"{REVISION}::test_of_grpc",
    ),
    Mutant(
        "query-s-revision-taken-after-the-lock", MOMENT, "rmemd.engine.driver",
        "            revision = self.answered.revision = self.journal.revision\n",
        "            revision = self.journal.revision\n",
        f"{REVISION}::test_of_grpc",
    ),
    Mutant(
        "revision-of-what-came-after", MOMENT, "rmemd.engine.driver",
        "                self.answered.revision = mine.ended_at\n",
        "                self.answered.revision = self.journal.revision\n",
        f"{REVISION}::test_what_is_scrubbed_afterwards_is_not_a_part_of_the_call",
    ),
    Mutant(
        "repeat-s-revision-is-the-present-one", MOMENT, "rmemd.engine.driver",
        "        result, self.answered.revision = self.calls.known(run)\n",
        "        result = self.calls.known(run)[0]\n"
        "        self.answered.revision = self.journal.revision\n",
        f"{REVISION}::test_a_repeat_after_a_kill_says_that_of_the_first",
    ),
    # --- the log -----------------------------------------------------------------------------
    Mutant(
        "crc-is-not-chained", LOG, "rmemd.store.log",
        "crc32(_BEGIN(length, kind), self.crc)", "crc32(_BEGIN(length, kind))",
        f"{LOGS}::test_a_frame_is_not_taken_behind_another_than_it_was_written_behind",
        also=(("crc32(_LENGTH.pack(length), scan.crc)", "crc32(_LENGTH.pack(length))"),),
    ),
    Mutant(
        "frame-of-nothing-is-taken", LOG, "rmemd.store.log",
        "    if length == 0 or scan.size", "    if scan.size",
        f"{LOGS}::test_a_frame_of_nothing_at_all_ends_the_log",
    ),
    Mutant(
        "one-bad-frame-is-taken", LOG, "rmemd.store.log",
        "    return (payload, crc) if found == crc else None\n",
        "    last = scan.end + _HEAD.size + length == scan.size\n"
        "    return (payload, crc) if found == crc or last else None\n",
        f"{LOGS}::test_a_flipped_bit_ends_the_log_before_its_frame",
    ),
    Mutant(
        "bad-frame-is-passed-over", LOG, "rmemd.store.log",
        "    return (payload, crc) if found == crc else None\n",
        "    if found != crc and scan.end:\n"
        "        scan.end += _HEAD.size + length\n"
        "        return _next_frame(scan)\n"
        "    return (payload, crc) if found == crc else None\n",
        f"{LOGS}::test_a_frame_is_not_taken_behind_another_than_it_was_written_behind",
        also=(("crc32(_BEGIN(length, kind), self.crc)", "crc32(_BEGIN(length, kind))"),
              ("crc32(_LENGTH.pack(length), scan.crc)", "crc32(_LENGTH.pack(length))")),
    ),
    Mutant(
        "torn-tail-is-left", LOG, "rmemd.store.log",
        "        os.ftruncate(scan.fd, scan.end)\n", "",
        f"{LOGS}::test_cut_at_any_byte_the_log_gives_the_frames_before_and_goes_on",
    ),
    Mutant(
        "older-of-two-generations-is-read", LOG, "rmemd.store.log",
        "            newest = max(complete,", "            newest = min(complete,",
        f"{LOGS}::test_cut_at_any_byte_of_a_checkpoint_one_generation_is_whole",
    ),
    Mutant(
        "half-a-checkpoint-is-a-generation", LOG, "rmemd.store.log",
        "        return self.closed_at > 0\n", "        return self.generation > 0\n",
        f"{LOGS}::test_cut_at_any_byte_of_a_checkpoint_one_generation_is_whole",
    ),
    Mutant(
        "older-generation-goes-first", LOG, "rmemd.store.log",
        '        self._write(_CLOSING, b"")\n        self._log._turn(self)\n',
        "        os.ftruncate(self._log.fds[self._log.generation % 2], 0)\n"
        '        self._write(_CLOSING, b"")\n        self._log._turn(self)\n',
        f"{LOGS}::test_between_any_two_calls_of_a_checkpoint_one_generation_is_whole",
    ),
    Mutant(
        "log-of-another-boot-is-read", LOG, "rmemd.store.log",
        "    if boot != boot_id():\n", "    if False:\n",
        f"{LOGS}::test_a_log_of_another_boot_is_refused",
    ),
    Mutant(
        "checkpoint-without-the-notes", LOG, "rmemd.engine.reopen",
        "    for note in notes.all():\n        yield encode_note(note)\n", "",
        f"{REOPEN}::test_notes_and_results_outlive_a_log_that_is_begun_anew",
    ),
    Mutant(
        "dropped-note-comes-back", LOG, "rmemd.engine.notes",
        "        if entry.dropped:\n            notes.pop(entry.key, None)\n",
        "        if entry.dropped:\n            pass\n",
        f"{REOPEN}::test_notes_and_results_outlive_a_log_that_is_begun_anew",
    ),
    Mutant(
        "entry-of-another-version-is-passed-over", LOG, "rmemd.store.codec",
        '            raise JournalUnreadable('
        'f"entries of kind {kind:#x} are of another version of rmemd")\n',
        "            at += length\n            continue\n",
        f"{CODEC}::test_an_entry_that_was_cut_or_is_unknown_is_refused",
    ),
    Mutant(
        "inverse-write-is-recorded", LOG, "rmemd.store.codec",
        "        if len(given) != arity:\n", "        if False:\n",
        f"{CODEC}::test_inverse_writes_are_refused",
    ),
    # --- what a successor is handed ----------------------------------------------------------
    Mutant(
        "lost-memfd-is-taken-for-empty", SUCCESSOR, "rmemd.engine.reopen",
        "        elif file.info.file in had:\n", "        elif False:\n",
        f"{REOPEN}::test_memory_that_was_lost_is_said_to_be",
    ),
    Mutant(
        "lost-arena-is-taken-for-empty", SUCCESSOR, "rmemd.engine.reopen",
        "    lost += _give_up(core, missing)\n", "",
        f"{REOPEN}::test_memory_that_was_lost_is_said_to_be",
    ),
    Mutant(
        "memfd-of-nothing-is-kept-on", SUCCESSOR, "rmemd.engine.reopen",
        "        os.close(fd)\n        core.keeping.drop(name)\n", "        os.close(fd)\n",
        f"{REOPEN}::test_a_descriptor_of_nothing_is_let_go",
    ),
    Mutant(
        "closed-file-s-memfd-is-kept-on", SUCCESSOR, "rmemd.engine.sharedmemory",
        "        self._keeping.drop(file_name(held.kept_as))\n", "",
        "what_is_kept_is_what_is_there", "I20",
    ),
    Mutant(
        "new-memfd-is-not-kept", SUCCESSOR, "rmemd.engine.sharedmemory",
        "        self._keeping.keep(file_name(kept_as), memfd.fd)\n", "",
        "what_is_kept_is_what_is_there", "I20",
    ),
    Mutant(
        "new-keeper-is-given-nothing", SUCCESSOR, "rmemd.daemon.kept",
        "        self._store.deposit_all()\n", "",
        f"{KEEPER}::test_a_keeper_that_is_lost_is_replaced_and_given_everything",
    ),
    Mutant(
        "half-a-deposit-is-taken", SUCCESSOR, "rmemd.keeper.store",
        'fields.get("FDSTORE") == "1" and message.whole and is_name(name)',
        'fields.get("FDSTORE") == "1" and is_name(name)',
        f"{STARTS}::test_the_keepers_store_closes_what_it_does_not_take",
    ),
    Mutant(
        "restarts-without-a-pause", SUCCESSOR, "rmemd.keeper.keeper",
        "    return min(DELAY_SECONDS * 2.0 ** min(deaths - 2, 32), longest)\n",
        "    return 0.0\n",
        f"{KEEPER}::test_pauses_grow_and_are_bounded",
    ),
    Mutant(
        "crash-loop-is-not-counted", SUCCESSOR, "rmemd.daemon.starts",
        "        self.times = [*self._read(), clock()]", "        self.times = [clock()]",
        f"{STARTS}::test_ten_starts_in_ten_seconds_are_a_row",
    ),
    Mutant(
        "dead-session-is-not-reaped-at-restart", SUCCESSOR, "rmemd.session.absent",
        "            for session in gone:\n                self._reap(session, PIDFD)\n",
        "            pass\n",
        f"{RESUMED}::test_the_dead_are_reaped_at_the_start",
    ),
    Mutant(
        "session-without-a-process-goes-on", SUCCESSOR, "rmemd.session.expected",
        "            if pidfd is None:\n                gone.append(info.session)\n",
        "            if pidfd is None:\n                pass\n",
        f"{RESUMED}::test_a_session_without_its_pidfd_is_ended",
    ),
    Mutant(
        "lease-ends-with-the-daemon", SUCCESSOR, "rmemd.access.callers",
        "                self._leases[info.session] = _Running("
        "lease.seconds, now + lease.seconds)\n        self._forget",
        "                pass\n        self._forget",
        f"{ANSWERED}::test_tokens_tickets_and_leases_outlive_the_daemon",
    ),
    Mutant(
        "descriptors-are-counted-from-zero", SUCCESSOR, "rmemd.session.descriptors",
        "            self._by_tenant[tenant] += count\n\n    def of", "\n    def of",
        f"{RESUMED}::test_a_session_goes_on_with_what_it_holds",
    ),
    Mutant(
        "notice-is-lost-with-the-daemon", SUCCESSOR, "rmemd.session.absent",
        "                self._undelivered.keep(session, news)\n", "                pass\n",
        f"{RESUMED}::test_a_revocation_while_the_client_is_away_is_told_when_it_is_back",
    ),
    # --- who goes on -------------------------------------------------------------------------
    Mutant(
        "session-resumed-by-another-process", AUTHORITY, "rmemd.session.expected",
        "            if awaited.uid != peer.uid or "
        "not same_process(awaited.pidfd, peer.pidfd):\n",
        "            if awaited.uid != peer.uid:\n",
        f"{RESUMED}::test_another_process_cannot_take_it_up",
    ),
    Mutant(
        "session-resumed-with-another-s-token", AUTHORITY, "rmemd.access.callers",
        "        if caller.session != session:\n", "        if False:\n",
        "tests/unit/test_access.py::test_a_token_takes_up_its_own_session",
    ),
    Mutant(
        "first-token-of-a-repeated-opening-is-good", AUTHORITY, "rmemd.access.callers",
        "            self._drop(TOKENS, lambda token: token.session == info.session)\n",
        "            pass\n",
        f"{ANSWERED}::"
        "test_the_repeat_of_an_opening_has_the_same_session_and_a_token_that_works[False]",
    ),
    # --- secrets -----------------------------------------------------------------------------
    Mutant(
        "token-is-kept-in-the-open", SECRET, "rmemd.access.callers",
        "    return hashlib.sha256(secret).digest()\n", "    return secret\n",
        f"{ANSWERED}::test_no_secret_is_kept",
    ),
    Mutant(
        "answer-with-a-secret-is-kept", SECRET, "rmemd.rpc.replies",
        "            if entry.secret and answer.status is None:\n                return\n", "",
        f"{ANSWERED}::test_no_secret_is_kept",
    ),
    # --- system calls that fail --------------------------------------------------------------
    Mutant(
        "failed-write-in-place-stays-recorded", SYSTEM, "rmemd.engine.core",
        '            reopen.undo_in_place(self, "write that failed", '
        "contents.pfns, page_sums(raw), before)\n",
        "",
        f"{EACH_CALL}[tdx-relocate-write-28]",
    ),
    Mutant(
        "failed-conversion-leaves-its-bytes", SYSTEM, "rmemd.engine.convert",
        "        if private:\n"
        "            core.controller.punch(pfns)\n"
        "        else:\n"
        "            core.shared_memory(file).punch(pgoffs)\n"
        "        raise\n",
        "        raise\n",
        f"{EACH_CALL}[sw-protected-to shared-28]",
    ),
    Mutant(
        "failed-scrub-is-forgotten", SYSTEM, "rmemd.engine.core",
        "                self._scrub.append(pfns)\n                return\n",
        "                return\n",
        f"{EACH_CALL}[snp-move-punch-5]",
    ),
    Mutant(
        "short-write-is-taken-for-a-whole-one", SYSTEM, "rmemd.store.system",
        "        done += n\n", "        done += view.nbytes\n",
        f"{EACH_CALL}[snp-move-write-short]",
    ),
    Mutant(
        "failed-append-leaves-half-a-frame", SYSTEM, "rmemd.store.log",
        "            with suppress(OSError):\n                os.ftruncate(self.fd, self.end)\n",
        "            pass\n",
        f"{LOGS}::test_an_append_that_fails_half_way_leaves_the_log_at_its_end",
    ),
    Mutant(
        "record-without-room-for-it", SYSTEM, "rmemd.engine.journal",
        "        self._log.reserve(nbytes)\n", "",
        f"{REOPEN}::test_without_room_in_the_log_nothing_is_done",
    ),
)  # fmt: skip
