"""Where in a slice: what a heat map's cells sum to, and that they point at what the head looks for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import models.encoders.mambaout
from models.abmil import ABMIL, Ensemble
from models.encoders.lesion_lite import LesionLite
from models.encoders.vit_conv import ViTConv
from models.encoders.vmamba import NETWORKS, VSSM
from models.heads.export import from_safetensors, to_safetensors
from models.heads.member import new_network
from models.heads.options import HeadOptions
from models.heatmap import heat_map, label_gradient
from models.load import Embedding, load_network
from models.specs import EncoderSpec, Weights
from models.zoo import LESION_LITE, LITE0
from service.overlay import AGAINST, FOR, overlay

SIZE = 96  # px
SMALL_VMAMBA = replace(NETWORKS["vmambav2v_tiny_224"], depths=(1, 1), dims=(8, 16))


def spec_of(family, dim, size=SIZE):
    return EncoderSpec("toy", family, "toy", Weights("file", "toy"), "none", dim, input_size=size)


def embedding(network, spec):
    return Embedding(network.eval().requires_grad_(False), spec.mean, spec.std, axes=2).eval()


def blob(row, column, size=SIZE, radius=7):
    """A dim noisy slice, (size, size) in [0, 1], with one bright disc."""
    picture = np.random.default_rng(0).uniform(0.2, 0.3, (size, size)).astype(np.float32)
    rows, columns = np.ogrid[:size, :size]
    picture[(rows - row) ** 2 + (columns - column) ** 2 <= radius**2] = 1.0
    return picture


@torch.inference_mode()
def embed(network, picture):
    return network(torch.from_numpy(picture)[None, None])[0].double().numpy()


@pytest.fixture(scope="module", params=["efficientnet", "lesion_lite"])
def encoder(request, tmp_path_factory):
    lite0 = load_network(LITE0, tmp_path_factory.mktemp("none"))
    if request.param == "efficientnet":
        return LITE0, embedding(lite0, LITE0)
    torch.manual_seed(0)
    network = LesionLite("tf_efficientnet_lite0")  # on a trunk as ImageNet left it
    network.take_trunk(lite0)
    network.eval()
    with torch.no_grad():  # its evidence is of what a blob in the middle does to the cells there
        pictures = [blob(centre, centre, 384, 34) for centre in (192, -99)]
        seen, plain = network.map_and_embedding(
            2 * torch.from_numpy(np.stack(pictures))[:, None].repeat(1, 3, 1, 1) - 1
        )[0]
        change = (seen - plain)[:, 11:13, 11:13].mean(dim=(1, 2))  # (256,)
        network.evidence.weight[0, :, 0, 0] = 5 * change / change.norm() ** 2
    return LESION_LITE, embedding(network, LESION_LITE)


class TestDecomposition:
    def test_the_cells_sum_to_the_gradient_times_the_embedding(self, encoder):
        spec, network = encoder
        picture, gradient = blob(30, 60, spec.input_size), np.random.default_rng(1).normal(size=spec.dim)

        found = heat_map(spec, network, picture, gradient)

        exact = float(embed(network, picture) @ gradient)
        assert found.method == "decomposition"
        assert found.cells.shape == (spec.input_size // (32 if spec is LITE0 else 16),) * 2
        assert found.cells.sum() == pytest.approx(exact, rel=1e-4, abs=1e-4)
        assert np.abs(found.cells).max() > 3 * np.abs(found.cells).mean()

    def test_a_cell_is_what_the_embedding_would_lose_without_it(self, encoder):
        """By hand: the mean over the map with one cell set to zero; of LesionLite its fine map's part alone."""
        spec, network = encoder
        picture, gradient = blob(30, 60, spec.input_size), np.random.default_rng(2).normal(size=spec.dim)
        images = (torch.from_numpy(picture)[None, None] - network.mean) / network.std
        with torch.no_grad():
            if spec is LITE0:
                fine, toward = network.network.forward_features(images)[0].double(), gradient
                shares = torch.full(fine.shape[1:], 1 / fine[0].numel())
            else:
                gradient[:320] = 0  # nothing of the coarse map
                cells, _ = network.network.map_and_embedding(images)
                raised = (network.network.evidence(cells)[0, 0]).double().exp()
                fine, toward, shares = cells[0].double(), gradient[320:], raised / raised.sum()
                shares *= network.network.say((fine * shares).sum(dim=(1, 2)).float()[None])[0, 0]

        found = heat_map(spec, network, picture, gradient)

        whole = torch.from_numpy(toward) @ (fine * shares).sum(dim=(1, 2))
        for place in ((0, 0), (2, 5), (6, 6)):
            lacking = shares.clone()
            lacking[place] = 0
            without = torch.from_numpy(toward) @ (fine * lacking).sum(dim=(1, 2))
            assert found.cells[place] == pytest.approx(float(whole - without), rel=1e-4, abs=1e-6)

    @pytest.mark.parametrize("encoder", ["lesion_lite"], indirect=True)  # the other has one map
    def test_a_coarse_cells_evidence_is_shared_by_the_fine_ones_it_covers(self, encoder):
        spec, network = encoder
        gradient = np.random.default_rng(3).normal(size=spec.dim)
        gradient[320:] = 0  # nothing of the fine map

        found = heat_map(spec, network, blob(30, 60, spec.input_size), gradient).cells

        coarse = found.reshape(6, 4, 6, 4)
        assert (coarse == coarse[:, :1, :, :1]).all()
        assert np.unique(found).size > 30

    @pytest.mark.parametrize(("row", "column"), [(70, 150), (160, 60)])
    def test_a_head_made_to_look_at_a_blob_has_its_maximum_there(self, encoder, row, column):
        """The head is told what blobs elsewhere add to an embedding, and sees one among plain slices."""
        spec, network = encoder
        scale = spec.input_size / 224

        def slice_with(*centre):
            return blob(*(scale * each for each in centre), spec.input_size, 20 * scale)

        plain, picture = slice_with(-99, -99), slice_with(row, column)
        elsewhere = [slice_with(*centre) for centre in ((110, 110), (50, 50), (180, 170))]
        direction = np.mean([embed(network, each) for each in elsewhere], axis=0) - embed(network, plain)
        ensemble = looking_for(direction)
        bag = np.stack([embed(network, each) for each in (plain, picture, plain)]).astype(np.float16)

        found = heat_map(spec, network, picture, label_gradient(ensemble, bag, instance=1, label=0))

        cell = 224 / (7 if spec is LITE0 else 6)  # px of the coarsest map's cells
        peak = (np.array(np.unravel_index(found.cells.argmax(), found.cells.shape)) + 0.5) * 224 / len(found.cells)
        corner = peak // cell * cell
        nearest = np.clip((row, column), corner, corner + cell)
        assert np.hypot(*(nearest - (row, column))) < 20  # the blob reaches into the cell
        assert found.cells.max() > 0


def looking_for(direction):
    """Two folds whose first hidden unit is the embedding's part along a direction; that unit attends and decides."""
    folds = []
    for gain in (1.0, 2.0):
        fold = ABMIL(len(direction), 1, hidden=4)
        with torch.no_grad():
            for each in fold.parameters():
                each.zero_()
            fold.encoder[0].weight[0] = torch.from_numpy(gain * direction / np.linalg.norm(direction) ** 2)
            fold.encoder[0].bias.copy_(torch.tensor([5.0, 0, 5, 10]))  # the rest keeps the norm from flattening it
            fold.V.weight[0, 0], fold.w.weight[0, 0] = 0.05, 1.0
            fold.head[0].weight.fill_(1.0)
            fold.head[1].weight[0, 0] = fold.head[4].weight[0, 0] = 1.0
        folds.append(fold)
    return Ensemble(folds, one_of_n=False).eval()


@pytest.mark.parametrize("network", ["abmil", "gated_abmil", "mean", "max"])
@pytest.mark.parametrize("task", ["multilabel", "one_of_n"])
def test_the_gradient_is_the_slope_of_the_stored_heads_log_odds(network, task):
    torch.manual_seed(1)
    options = HeadOptions(task=task, network=network, hidden=8, attention=5)
    heads = [new_network(network, 6, 3, options) for _ in range(2)]
    ensemble = Ensemble(heads, options.one_of_n, [2.0, 1.0, 0.5] if task == "multilabel" else [2.0]).eval()
    bag = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float16)

    gradient = label_gradient(from_safetensors(to_safetensors(ensemble), options), bag, instance=2, label=1)

    def log_odds(change):
        moved = torch.from_numpy(bag.astype(np.float64))
        moved[2] += torch.from_numpy(change)
        with torch.no_grad():
            probability = float(ensemble.double()(moved)[0][1])
        return np.log(probability / (1 - probability))

    steps = 1e-5 * np.eye(6)
    slopes = [(log_odds(step) - log_odds(-step)) / 2e-5 for step in steps]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-4, atol=1e-7)
    assert np.abs(gradient).max() > 1e-4


def test_behind_a_norm_the_cells_sum_to_what_the_mean_carries_through_it():
    """The norm's slope along the mean, found by differences."""
    torch.manual_seed(0)
    spec, bare = spec_of("mambaout", 64), models.encoders.mambaout.build("test_mambaout")
    network, picture = embedding(bare, spec), blob(30, 60)
    gradient = np.random.default_rng(0).normal(size=64)

    found = heat_map(spec, network, picture, gradient)

    images = (torch.from_numpy(picture)[None, None] - network.mean) / network.std
    with torch.no_grad():
        mean = bare.network.forward_features(images).mean(dim=(1, 2))[0]
        norm = nn.LayerNorm(64, eps=bare.network.head.norm.eps).double()
        norm.load_state_dict(bare.network.head.norm.state_dict())
        up, down = (norm(mean.double() * by) @ torch.from_numpy(gradient) for by in (1.001, 0.999))
    assert (found.method, found.cells.shape) == ("decomposition", (3, 3))
    assert found.cells.sum() == pytest.approx(float(up - down) / 0.002, rel=1e-3, abs=1e-4)
    assert np.abs(found.cells).max() > 1e-2


def test_vmambas_cells_sum_to_the_gradient_times_the_embedding():
    torch.manual_seed(0)
    spec, picture = spec_of("vmamba", 16), blob(30, 60)
    network, gradient = embedding(VSSM(SMALL_VMAMBA), spec), np.random.default_rng(0).normal(size=16)

    found = heat_map(spec, network, picture, gradient)

    assert found.method == "decomposition"
    assert found.cells.sum() == pytest.approx(float(embed(network, picture) @ gradient), rel=1e-4, abs=1e-4)


class TestGradient:
    def test_a_network_without_a_last_map_is_explained_by_its_input(self):
        """A class token does not come from the other tokens of the last block."""
        torch.manual_seed(0)
        spec = spec_of("vit_conv", 64)
        network, picture = embedding(ViTConv(64, depth=2, heads=2, input_size=SIZE), spec), blob(30, 60)
        gradient = np.random.default_rng(0).normal(size=64)

        found = heat_map(spec, network, picture, gradient)

        image = torch.from_numpy(picture)[None, None].requires_grad_()
        (network(image)[0].double() @ torch.from_numpy(gradient)).backward()
        product = (image.grad * image.detach())[0, 0].double().numpy()
        assert (found.method, found.cells.shape) == ("gradient", (6, 6))
        for row in range(6):
            for column in range(6):
                cell = product[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                assert found.cells[row, column] == pytest.approx(cell.sum(), rel=1e-3, abs=1e-7)

    def test_black_counts_for_nothing_where_the_input_explains(self):
        class Corner(torch.nn.Module):
            """Sees two squares of the picture, one in each of its numbers."""

            def __init__(self):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(()))

            def forward(self, images):
                return torch.stack([images[:, 0, :16, :16].mean((1, 2)), images[:, 0, 32:48, :16].mean((1, 2))], 1)

        spec = spec_of("dinov3", 2)
        picture = np.zeros((SIZE, SIZE), np.float32)
        picture[:48, :48] = 0.5

        found = heat_map(spec, embedding(Corner(), spec), picture, np.array([1.0, -2.0]))

        expected = np.zeros((6, 6))
        expected[0, 0], expected[2, 0] = 0.5 / spec.std[0], -1.0 / spec.std[0]
        np.testing.assert_allclose(found.cells, expected, atol=1e-6)


class TestOverlay:
    def test_evidence_for_is_orange_against_is_blue_and_none_leaves_the_slice_alone(self):
        picture = np.full((60, 90), 0.5, np.float32)
        cells = np.zeros((6, 9))
        cells[1, 2], cells[4, 7] = 2.0, -2.0

        found = overlay(picture, cells)

        assert (found.shape, found.dtype) == ((60, 90, 3), np.uint8)
        for (row, column), colour in (((15, 25), FOR), ((45, 75), AGAINST)):
            toward = np.sign(np.array(colour) - 128)
            assert (np.sign(found[row, column].astype(int) - 128) == toward).all()
        assert (found[2, 85] == 128).all()

    def test_colours_lie_where_their_cells_do(self):
        cells = np.zeros((7, 7))
        cells[2, 5] = 1.0

        found = overlay(np.zeros((512, 384), np.float32), cells)[..., 0].astype(float)

        rows, columns = np.indices(found.shape)
        assert (found * rows).sum() / found.sum() == pytest.approx(2.5 / 7 * 512, abs=1)
        assert (found * columns).sum() / found.sum() == pytest.approx(5.5 / 7 * 384, abs=1)

    def test_with_full_colour_at_given_log_odds_two_slices_compare(self):
        picture, cells = np.full((40, 40), 0.5, np.float32), np.full((4, 4), 0.01)

        weak, strong, beyond = (overlay(picture, cells * by, full=0.02) for by in (1, 2, 50))

        assert np.array_equal(strong, overlay(picture, cells))
        assert np.array_equal(strong, beyond)
        assert np.allclose(weak[0, 0] - 127.5, (strong[0, 0] - 127.5) / 2, atol=1)

    def test_no_evidence_at_all_is_the_plain_slice(self):
        picture = blob(30, 60)
        found = overlay(picture, np.zeros((3, 3)))
        assert np.array_equal(found, np.repeat(np.round(picture[..., None] * 255), 3, axis=2))
