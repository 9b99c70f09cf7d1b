"""A small version of bench/chaos.py: what is killed, locked out and out of disk loses nothing."""

import random

from bench.chaos import PAUSE_SECONDS, Found, run


def test_nothing_is_lost_doubled_or_different_after_kills(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.chaos.AWAY_SECONDS", 2.0)  # the whole wait is the bench's

    found, counts = run(tmp_path, 12, 6 * PAUSE_SECONDS[1], random.Random(1))

    assert found.kills >= 3, counts
    assert found == Found(12, found.kills, lost=0, duplicated=0, differing=0, left_over=0)
