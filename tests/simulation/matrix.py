"""The fault matrix: what is injected, what must be true then, and who shows it.

One row for each of reliability.md §4. A row is driven by scenarios, which are functions of here,
and by tests of real processes, which are named and must be there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import scenarios


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        inject: what goes wrong.
        expect: what must be true then.
        scenarios: what drives it in an engine.
        tests: what drives it in processes, as "file.py::test", below tests/.
    """

    inject: str
    expect: str
    scenarios: tuple[Callable[[], None], ...] = ()
    tests: tuple[str, ...] = ()


REOPEN, DEATHS = "integration/test_reopen.py::", "integration/test_deaths.py::"
KEEPER, LOG = "integration/test_keeper.py::", "unit/test_log.py::"
HOSTILE = "integration/test_session_hostile.py::"
LEASES, DEATH = "integration/test_session_leases.py::", "integration/test_session_death.py::"

MATRIX: tuple[Row, ...] = (
    Row(
        "kill -9 before and after every journal write and fd deposit",
        "I19, I20; restart within 500 ms",
        tests=(
            REOPEN + "test_after_every_frame_the_log_has_the_state",
            REOPEN + "test_killed_at_any_frame_state_and_memory_agree",
            REOPEN + "test_killed_at_any_system_call_each_page_is_old_or_new",
            REOPEN + "test_a_descriptor_of_nothing_is_let_go",
            DEATHS + "test_a_killed_daemon_is_back_with_all_it_had",
            KEEPER + "test_a_deposit_that_was_sent_survives_at_once",
            "simulation/test_simulation.py::test_whatever_goes_wrong_when_all_that_must_be_true_is",
        ),
    ),
    Row(
        "journal cut at each byte; bit flips",
        "longest valid prefix; never a guess",
        tests=(
            LOG + "test_cut_at_any_byte_the_log_gives_the_frames_before_and_goes_on",
            LOG + "test_cut_at_any_byte_of_a_checkpoint_one_generation_is_whole",
            LOG + "test_a_flipped_bit_ends_the_log_before_its_frame",
            LOG + "test_zeros_and_noise_after_the_end_are_no_frames",
        ),
    ),
    Row(
        "kill keeper; kill both",
        "the daemon deposits again; what is lost is said to be",
        tests=(
            KEEPER + "test_a_keeper_that_is_lost_is_replaced_and_given_everything",
            KEEPER + "test_both_lost_is_all_lost",
            DEATHS + "test_a_lost_keeper_is_replaced_under_a_running_daemon",
            REOPEN + "test_memory_that_was_lost_is_said_to_be",
        ),
    ),
    Row(
        "crash loop, 10 in 10 s",
        "memory kept, safe mode",
        tests=(DEATHS + "test_a_crash_loop_ends_in_safe_mode_and_an_upgrade_leaves_it",),
    ),
    Row(
        "ENOSPC, ENOMEM, EINTR, a short write at the Nth call",
        "RESOURCE_EXHAUSTED, state unchanged",
        (scenarios.each_system_call_fails, scenarios.interrupted_and_short_calls_are_gone_on_with),
        (
            LOG + "test_an_append_that_fails_half_way_leaves_the_log_at_its_end",
            LOG + "test_short_writes_and_short_reads_are_gone_on_with",
        ),
    ),
    Row(
        "plugin raises",
        "range rolled back or quarantined (I12)",
        (scenarios.a_consumer_raises,),
        (
            "integration/test_hook_faults.py::test_a_consumers_op_that_fails_changes_nothing",
            "integration/test_hook_faults.py::test_a_platforms_op_that_fails_changes_nothing",
        ),
    ),
    Row(
        "plugin hangs (plugins run in process)",
        "overdue is reported and its VM frozen",
        (scenarios.a_consumer_is_overdue,),
        ("integration/test_plugins.py::test_an_overdue_hook_freezes_its_vm_and_no_other",),
    ),
    Row(
        "plugin answers garbage",
        "refused by its schema",
        (scenarios.a_consumer_answers_nonsense,),
    ),
    Row(
        "plugin claims to migrate, and lies",
        "the digests differ, and a monitor says so (I10)",
        (scenarios.a_consumer_lies_about_a_move,),
    ),
    Row(
        "client SIGKILL in each phase of a call",
        "pins reaped within 100 ms, nothing of anybody else's changes",
        (scenarios.a_client_dies_in_each_step,),
        (
            DEATH + "test_a_hundred_deaths_in_random_states",
            DEATH + "test_death_while_a_vcpu_runs",
            DEATH + "test_death_while_its_own_call_waits_for_a_page",
        ),
    ),
    Row(
        "client SIGSTOP",
        "pins kept until its lease is over",
        tests=(
            LEASES + "test_a_lease_that_is_not_renewed_ends",
            LEASES + "test_a_client_that_does_not_read_in_time_is_ended",
        ),
    ),
    Row(
        "client forks, parent dies",
        "its pidfd reaps",
        tests=(DEATH + "test_a_child_that_has_the_socket_does_not_keep_it_alive",),
    ),
    Row(
        "client punches or scribbles its shared memfd",
        "own data only; daemon alive",
        (scenarios.a_client_punches_and_scribbles,),
    ),
    Row(
        "253 unexpected fds per message",
        "all closed; session ended",
        tests=(HOSTILE + "test_descriptors_that_nobody_asked_for",),
    ),
    Row(
        "EMFILE",
        "existing calls continue; new refused; recovers",
        tests=(HOSTILE + "test_a_full_table_of_descriptors",),
    ),
    Row(
        "hwpoison on source, destination, during the copy",
        "abort, or another destination; one event",
        (scenarios.memory_fails_around_a_copy,),
    ),
    Row(
        "reader stalls",
        "bounded queue, then its session ends",
        tests=(HOSTILE + "test_a_slow_reader_loses_its_session",),
    ),
    Row(
        "wall clock ±1 h; monotonic stall",
        "leases unaffected; late ticks never reap many at once",
        tests=(LEASES + "test_a_late_reaper_blames_itself",),
    ),
    Row(
        "stale socket, second daemon",
        "flock refuses",
        tests=(
            "integration/test_daemon.py::test_a_second_daemon_goes_away_and_the_first_still_serves",
            LEASES + "test_a_stale_session_socket_is_removed",
            DEATHS + "test_the_directory_stays_locked_while_nobody_serves_it",
        ),
    ),
)
