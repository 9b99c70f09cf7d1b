"""Long work in threads of its own: in order, a few at a time, none of it twice, and it ends when told."""

import threading
import time

import pytest

from workers.background import Background


@pytest.fixture
def gate():
    opened = threading.Event()
    yield opened
    opened.set()


def test_so_much_is_done_at_once_and_the_rest_waits_in_the_order_it_came(gate):
    threads, begun = Background("work", 2), []

    def work(id):
        begun.append(id)
        gate.wait(10)

    for id in "abcd":
        threads.start(id, lambda id=id: work(id))
    while len(begun) < 2:
        time.sleep(0.001)
    time.sleep(0.05)
    before = [*begun]
    gate.set()
    threads.start("e", lambda: work("e"))
    while len(begun) < 5:
        time.sleep(0.001)

    assert sorted(before) == ["a", "b"]
    assert sorted(begun[2:4]) == ["c", "d"] and begun[4] == "e"
    threads.close(10)


def test_what_is_here_is_not_begun_again_until_it_has_ended(gate):
    threads, begun = Background("work", 2), []

    def work():
        begun.append(1)
        gate.wait(10)

    threads.start("a", work)
    threads.start("a", work)
    time.sleep(0.05)
    assert begun == [1]
    gate.set()
    while len(begun) < 2:
        threads.start("a", work)
        time.sleep(0.001)
    threads.close(10)


def test_a_failure_is_logged_by_its_kind_and_the_next_is_seen_to(caplog):
    threads, done = Background("training", 1), threading.Event()

    def fail():
        raise OSError("/archive/DOE^JANE")

    threads.start("1", fail)
    threads.start("2", done.set)

    assert done.wait(10)
    threads.close(10)
    assert caplog.messages == ["training 1: OSError"]


def test_closing_begins_nothing_more_and_waits_once_for_all(gate):
    threads, begun = Background("work", 3), []

    def work():
        begun.append(1)
        gate.wait(10)

    for id in range(6):
        threads.start(str(id), work)
    while len(begun) < 3:
        time.sleep(0.001)

    moment = time.monotonic()
    threads.close(0.2)

    assert time.monotonic() - moment < 0.5  # not as long for each of the three
    gate.set()
    time.sleep(0.05)
    assert len(begun) == 3
