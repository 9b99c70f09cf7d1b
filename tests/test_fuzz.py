"""Spoiled files: read or refused with a reason, in bounded time and memory. bench/fuzz.py does the same to 20,000."""

import pytest

from bench.fuzz import HANG_SECONDS, MB_AT_MOST, fuzz, read_originals, spoil
from bench.mutations import MUTATIONS

FILES = 300


@pytest.fixture(scope="module")
def originals(data):
    return read_originals(data)


def test_a_spoiled_file_is_read_or_refused_with_a_reason_and_takes_down_nothing(originals, tmp_path):
    outcome = fuzz(originals, FILES, seed=7, keep=tmp_path)

    assert outcome.errors == []
    assert outcome.crashes_of_decoders == 0, list(tmp_path.iterdir())
    assert outcome.files == FILES == outcome.usable + outcome.set_aside.total()
    assert outcome.slowest_s < HANG_SECONDS
    assert outcome.peak_mb < MB_AT_MOST


def test_the_same_seed_spoils_alike_and_no_way_is_left_out(originals):
    names = set()
    for number in range(200):
        name, content = spoil(originals, 7, number)
        assert (name, content) == spoil(originals, 7, number)
        names.add(name)

    assert names == {*MUTATIONS, "spliced"}
