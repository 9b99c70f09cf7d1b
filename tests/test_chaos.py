"""`bench/chaos.py`, small: the whole of it is what runs by hand."""

import random
from dataclasses import asdict

from bench import chaos


def test_nothing_is_lost_doubled_or_different_when_everything_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos, "AWAY_SECONDS", 3.0)

    found, counts = chaos.run(tmp_path, 12, 15.0, random.Random(1))

    assert sum(number for kind, number in counts.items() if kind.startswith("kill")) >= 3
    assert asdict(found) | {"kills": 0} == {
        "series": 12,
        "kills": 0,
        "lost": 0,
        "duplicated": 0,
        "differing": 0,
        "left_over": 0,
    }
