import asyncio
import concurrent.futures
import sys
import threading
import time

import pytest

from posttrain.event_loops import in_thread, settled


async def later(value, seconds=0.0):
    await asyncio.sleep(seconds)
    return value


async def fails():
    raise ValueError("no")


def test_values_pass_and_awaitables_are_awaited_in_place():
    assert settled([1, later(2), None, later("x")]) == [1, 2, None, "x"]


def test_an_exception_takes_its_place_and_the_others_are_finished():
    first, error, last = settled([later(1), fails(), later(3, 0.05)])
    assert (first, last) == (1, 3)
    assert isinstance(error, ValueError)


def test_they_wait_together():
    started = time.perf_counter()
    settled([later(n, 0.2) for n in range(20)])
    assert time.perf_counter() - started < 2


def test_it_works_inside_a_running_loop_and_is_one_loop_for_ever():
    async def which():
        return asyncio.get_running_loop()

    async def notebook():
        return settled([which()]) + settled([which()])

    first, second = asyncio.run(notebook())
    assert first is second


def test_a_blocking_call_leaves_the_loop_free():
    release = threading.Event()

    async def open_it():
        release.set()
        return "opened"

    assert settled([in_thread(lambda: release.wait(5)), open_it()]) == [True, "opened"]


@pytest.mark.parametrize("end", [lambda: 1 / 0, lambda: sys.exit(3)])
def test_whatever_ends_a_call_is_told(end):
    (error,) = settled([in_thread(end)])
    assert isinstance(error, Exception)


def test_a_call_that_is_given_up_is_not_waited_for():
    async def patient():
        return await asyncio.wait_for(in_thread(lambda: time.sleep(3)), 0.1)

    started = time.perf_counter()
    (error,) = settled([patient()])
    assert isinstance(error, asyncio.TimeoutError)
    assert time.perf_counter() - started < 2


async def leaves():
    sys.exit(3)


async def leaves_in_a_task():
    await asyncio.create_task(leaves())


@pytest.mark.parametrize("end", [leaves, leaves_in_a_task])
def test_leaving_a_coroutine_is_its_error_and_the_loop_goes_on(end):
    """asyncio lets SystemExit end a loop, and whoever waits for it would wait for ever."""
    found = []
    threading.Thread(target=lambda: found.extend(settled([end(), later(1, 0.05)])), daemon=True).start()
    give_up = time.perf_counter() + 5
    while not found and time.perf_counter() < give_up:
        time.sleep(0.01)
    assert found, "it waits for ever"
    assert isinstance(found[0], RuntimeError)
    assert "SystemExit: 3" in str(found[0])
    assert found[1] == 1
    assert settled([later(2)]) == [2]


def test_a_coroutine_that_is_cancelled_by_itself_is_an_error_in_its_place():
    async def cancels():
        raise asyncio.CancelledError

    error, value = settled([cancels(), later(1, 0.05)])
    assert isinstance(error, RuntimeError)
    assert "CancelledError" in str(error)
    assert value == 1


def test_what_takes_longer_than_it_may_is_given_up():
    started = time.perf_counter()
    with pytest.raises(concurrent.futures.TimeoutError):
        settled([later(1, 30)], 0.1)
    assert time.perf_counter() - started < 5
