"""The recipes in this process, where something is wrong with the encoder or a store."""

import numpy as np
import pytest
import torch
from posting import slice_files
from safetensors.torch import save_file

from models.ct.phantom import Identity
from models.encoders.timm_import import timm
from models.specs import encoder_id
from models.zoo import TEST
from service import indexing
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from workers import pipeline
from workers.resources import Resources

IDENTITY = Identity("PIPELINE")


@pytest.fixture
def state():
    torch.manual_seed(0)
    return timm.create_model("test_mambaout").state_dict()


@pytest.fixture
def worker(tmp_path):
    opened = Resources(Settings(data_dir=tmp_path / "data", weights_dir=tmp_path / "weights", encoder="test_mambaout"))
    (tmp_path / "weights").mkdir()
    yield opened
    opened.close()


def received(worker, encoder):
    """A series of three slices in the archive, waiting for this encoder."""
    staged = worker.settings.data_dir / "staged"
    for number, (_, content) in enumerate(slice_files(IDENTITY, count=3)):
        staged.write_bytes(content)
        worker.stores.archive.add(IDENTITY.series_uid, [(f"1.2.{number}", staged)])
    arrival = Arrival(IDENTITY.series_uid, study_uid=IDENTITY.study_uid, patient_id="PIPELINE")
    worker.stores.catalog.receive([arrival], encoder)
    return EmbeddingKey(IDENTITY.series_uid, encoder)


def ending(worker):
    (row,) = worker.stores.catalog.series(IDENTITY.series_uid).embeddings
    return row.state, row.error


def test_a_series_that_embeds_to_nan_fails_with_the_reason_and_leaves_no_bag(worker, state):
    weights = worker.settings.weights_path
    save_file({**state, "head.norm.bias": torch.full((64,), torch.nan)}, weights / "test_mambaout.safetensors")
    key = received(worker, encoder_id(TEST, weights))

    assert not pipeline.embed_series(*(key.series_uid, key.encoder_id), worker)

    assert ending(worker) == ("failed", "3 of 3 instances embed to NaN or infinity")
    assert list((worker.settings.data_dir / "bags").rglob("*")) == []


def test_an_embedding_too_large_for_float16_fails_too(worker, state):
    weights = worker.settings.weights_path
    save_file({**state, "head.norm.bias": torch.full((64,), 1e5)}, weights / "test_mambaout.safetensors")
    key = received(worker, encoder_id(TEST, weights))

    pipeline.embed_series(key.series_uid, key.encoder_id, worker)

    assert ending(worker) == ("failed", "3 of 3 instances embed to NaN or infinity")


@pytest.mark.parametrize("encoder", ["test_mambaout@000000000000", "forgotten@000000000000"])
def test_an_encoder_that_this_worker_has_not_fails_the_series_at_once(worker, state, encoder):
    save_file(state, worker.settings.weights_path / "test_mambaout.safetensors")
    received(worker, encoder)

    pipeline.embed_series(IDENTITY.series_uid, encoder, worker)

    assert ending(worker) == ("failed", f"this worker has no such encoder, or another, expected {encoder}")


def test_weights_of_another_network_fail_the_series_and_are_named(worker):
    weights = worker.settings.weights_path
    save_file({"head.norm.bias": torch.zeros(64)}, weights / "test_mambaout.safetensors")
    key = received(worker, encoder_id(TEST, weights))

    pipeline.embed_series(key.series_uid, key.encoder_id, worker)

    state, error = ending(worker)
    assert state == "failed"
    assert "Missing key(s) in state_dict" in error
    assert "stem.conv1.weight" in error


def test_embedding_twice_gives_the_same_bytes_and_changes_nothing(worker, state):
    save_file(state, worker.settings.weights_path / "test_mambaout.safetensors")
    key = received(worker, encoder_id(TEST, worker.settings.weights_path))
    first = pipeline.embed_series(key.series_uid, key.encoder_id, worker)
    row = worker.stores.catalog.embedding(key.series_uid, key.encoder_id)
    bag = worker.stores.bags.get(key, row.content)

    again = pipeline.embed_series(key.series_uid, key.encoder_id, worker)

    assert (first, again) == (True, False)
    assert bag.shape == (3, 2, 64)
    np.testing.assert_array_equal(worker.stores.bags.get(key, row.content), bag)


def test_an_index_that_fails_frees_the_lease_for_whoever_tries_again(worker, state, monkeypatch):
    save_file(state, worker.settings.weights_path / "test_mambaout.safetensors")
    key = received(worker, encoder_id(TEST, worker.settings.weights_path))
    pipeline.embed_series(key.series_uid, key.encoder_id, worker)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(worker.stores.index, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            indexing.index_bags(worker.stores, worker.settings, worker.holder)

    assert worker.stores.leases.take("index", "somebody else", 60.0)
