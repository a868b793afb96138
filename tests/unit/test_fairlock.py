"""The engine's lock: it is reentrant, one thread's at a time, and goes to those who wait."""

from __future__ import annotations

import os
import threading
from typing import cast

import pytest

from rmemd.engine.fairlock import FairLock

THREADS, TURNS = 4, 500


def test_it_is_taken_once_more_by_its_owner() -> None:
    lock = FairLock()
    with lock, lock:
        assert lock.is_owned()
        assert lock.acquire()
        lock.release()
    assert not lock.is_owned()
    with pytest.raises(RuntimeError):
        lock.release()


def test_it_is_one_thread_s_at_a_time() -> None:
    lock, inside, met = FairLock(), [0], []

    def work() -> None:
        for _ in range(TURNS):
            with lock:
                inside[0] += 1
                os.sched_yield()
                met.append(inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert met == [1] * (THREADS * TURNS)


@pytest.mark.parametrize("depth", [1, 2])
def test_who_waits_has_it_before_whoever_let_it_go(depth: int) -> None:
    lock, order = FairLock(), []

    def wait() -> None:
        with lock:
            order.append("waited")

    for _ in range(100):
        for _ in range(depth):
            lock.acquire()
        waiter = threading.Thread(target=wait)
        waiter.start()
        while not lock._turn.locked():
            os.sched_yield()
        for _ in range(depth):
            lock.release()
        with lock:
            order.append("came back")
        waiter.join()
    assert order == ["waited", "came back"] * 100


def test_an_owner_takes_it_again_while_others_wait() -> None:
    lock = FairLock()
    lock.acquire()
    waiter = threading.Thread(target=lambda: (lock.acquire(), lock.release()))
    waiter.start()
    while not lock._turn.locked():
        os.sched_yield()
    with lock:
        assert lock.is_owned()
    lock.release()
    waiter.join()


def test_a_wait_lets_all_of_it_go() -> None:
    lock = FairLock()
    changed = threading.Condition(cast("threading.RLock", lock))

    def change() -> None:
        with changed:
            changed.notify_all()

    with lock, changed:
        other = threading.Thread(target=change)
        other.start()
        assert changed.wait(30)
        assert lock.is_owned()
    assert not lock.is_owned()
    other.join()
