import argparse
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models.checkpoints import moco_encoder, read_checkpoint, without_prefix
from models.specs import WrongWeights

STATE = {"stem.weight": torch.arange(6.0).view(2, 3), "norm.num_batches_tracked": torch.tensor(3)}


def same(a, b):
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def saved(folder, content, name="weights.pth", **options):
    torch.save(content, folder / name, **options)
    return folder / name


def refused(path):
    with pytest.raises(WrongWeights) as error:
        read_checkpoint(path)
    return str(error.value)


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.bin", "vit-moco-lecl-1-checkpoint_0100.pth.tar"])
@pytest.mark.parametrize("zipped", [True, False])
def test_what_torch_saved_is_read_whatever_its_suffix(tmp_path, name, zipped):
    path = saved(tmp_path, STATE, name, _use_new_zipfile_serialization=zipped)

    assert same(read_checkpoint(path), STATE)


def test_safetensors_are_read(tmp_path):
    save_file(STATE, tmp_path / "a.safetensors")

    assert same(read_checkpoint(tmp_path / "a.safetensors"), STATE)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict", "state_dict_ema"])
def test_one_wrapper_is_taken_off(tmp_path, wrapper):
    path = saved(tmp_path, {"epoch": 7, wrapper: STATE, "optimizer": {"lr": 0.1}})
    twice = saved(tmp_path, {wrapper: {wrapper: STATE}}, "twice.pth")

    assert same(read_checkpoint(path), STATE)
    assert "does not hold a dictionary of tensors" in refused(twice)


def test_the_weights_as_trained_win_over_their_average(tmp_path):
    average = {name: value + 1 for name, value in STATE.items()}

    for wrapper in ("state_dict", "model"):
        path = saved(tmp_path, {"state_dict_ema": average, wrapper: STATE})
        assert same(read_checkpoint(path), STATE)


def test_sixteen_bit_weights_come_as_float32_with_their_exact_values(tmp_path):
    bits = np.arange(2**16, dtype=np.uint16)
    patterns = torch.from_numpy(bits.view(np.int16))
    path = saved(tmp_path, {"half": patterns.view(torch.float16), "brain": patterns.clone().view(torch.bfloat16)})

    state = read_checkpoint(path)

    assert {value.dtype for value in state.values()} == {torch.float32}
    np.testing.assert_array_equal(state["half"].numpy(), bits.view(np.float16).astype(np.float32))
    np.testing.assert_array_equal(state["brain"].numpy(), (bits.astype(np.uint32) << 16).view(np.float32))


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_named_and_not_run(tmp_path, zipped):
    ran = tmp_path / "ran"
    payload = saved(tmp_path, {**STATE, "x": Payload(ran)}, "payload.pth", _use_new_zipfile_serialization=zipped)
    arguments = saved(
        tmp_path,
        {"state_dict": STATE, "args": argparse.Namespace(lr=0.1)},
        "moco.pth.tar",
        _use_new_zipfile_serialization=zipped,
    )

    assert "not a readable weights file: beside tensors it holds pickled code (" in refused(payload)
    assert "getattr" in refused(payload)
    assert "(argparse.Namespace), which was not run" in refused(arguments)
    assert not ran.exists()
    torch.load(payload, weights_only=False)
    assert ran.exists()  # it would have


def test_a_bare_pickle_is_not_run_either(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))

    assert "not a readable weights file" in refused(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 10, 20_000])
def test_a_truncated_file_is_refused(tmp_path, keep):
    state = {"a": torch.zeros(10_000)}
    save_file(state, tmp_path / "a.safetensors")
    paths = [
        tmp_path / "a.safetensors",
        saved(tmp_path, state, "zip.pth"),
        saved(tmp_path, state, "stream.pth", _use_new_zipfile_serialization=False),
    ]

    for path in paths:
        path.write_bytes(path.read_bytes()[:keep])
        assert "not a readable weights file: " in refused(path)
    assert refused(paths[0]).endswith("SafetensorError")


@pytest.mark.parametrize(
    "content",
    [[torch.zeros(1)], 3, {1: torch.zeros(1)}, {"state_dict": 3}, {"state_dict": {"a": torch.zeros(1), "b": 3}}],
)
def test_what_is_no_dictionary_of_named_tensors_is_refused(tmp_path, content):
    assert "does not hold a dictionary of tensors by name" in refused(saved(tmp_path, content))


def tensors(*names):
    return {name: torch.tensor(float(position)) for position, name in enumerate(names)}


def test_a_moco_checkpoint_gives_its_base_encoder():
    names = [
        "base_encoder.norm.weight",
        "base_encoder.head.0.weight",
        "momentum_encoder.norm.weight",
        "predictor.0.weight",
    ]
    expected = tensors("norm.weight", "head.0.weight")

    assert same(moco_encoder(tensors(*names)), expected)
    assert same(moco_encoder(tensors(*(f"module.{name}" for name in names))), expected)


def test_a_state_of_another_kind_keeps_its_names():
    plain = tensors("norm.weight", "module.weight")  # a module that is called so

    assert same(moco_encoder(plain), plain)
    assert same(
        moco_encoder(tensors("module.norm.weight", "module.head.weight")), tensors("norm.weight", "head.weight")
    )


def test_a_moco_checkpoint_with_foreign_tensors_is_refused():
    with pytest.raises(WrongWeights, match=r"holds norm\.weight, queue"):
        moco_encoder(tensors("base_encoder.norm.weight", "norm.weight", "queue"))


def test_a_prefix_is_taken_off_once_and_from_all_names_or_none():
    assert same(without_prefix(tensors("a.a.w", "a.b"), "a."), tensors("a.w", "b"))
    assert same(without_prefix(tensors("a.w", "b"), "a."), tensors("a.w", "b"))
