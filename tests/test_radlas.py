"""RadLAS's tasks against loops over their formulas, and a restoration that finds what was planted."""

import math

import pytest
import torch
from torch import Tensor, nn

from models.lecl.radlas import (
    Projections,
    Restorer,
    discrimination_loss,
    grounding,
    reconstruction_loss,
)

SIZE = 16  # pixels


class TinyBackbone(nn.Module):
    dim = channels = 24

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.GELU()
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        map = self.convolutions(images)  # (B, 24, 4, 4)
        return map, map.mean(dim=(2, 3))


def planted(batch: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """view, healthy, mask (batch, 1, SIZE, SIZE): a lesion of 3 x 3 pixels in the view, a healthy bar of 1 x 9 in both.

    Lesion and bar are as bright and as large: what tells them apart is shape, so that a restoration to the mean slice
    would ground the two alike.
    """
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    slopes = 0.2 * torch.rand(batch, 2, generator=random) - 0.1
    healthy = 0.4 + slopes[:, 0, None, None] * rows + slopes[:, 1, None, None] * columns  # (batch, SIZE, SIZE)
    mask = torch.zeros_like(healthy)
    for slice, lesion in zip(healthy, mask, strict=True):
        row, column, bar, start = torch.randint(2, SIZE - 9, (4,), generator=random).tolist()
        lesion[row : row + 3, column : column + 3] = 1
        bar = bar if bar < row - 1 else bar + 5  # above the lesion or below it, never through it
        slice[bar, start : start + 9] += 0.4
    return tuple(images.unsqueeze(1) for images in (healthy + 0.4 * mask, healthy, mask))


def test_reconstruction_counts_a_lesion_for_half_of_its_slice() -> None:
    random = torch.Generator().manual_seed(0)
    restored, healthy, mask = (torch.rand(3, 1, 5, 5, generator=random) for _ in range(3))
    mask = mask * (mask > 0.8)
    mask[2] = 0  # a slice without a lesion

    total = 0.0
    for slice in range(3):
        inside = outside = area = 0.0
        for row in range(5):
            for column in range(5):
                share = mask[slice, 0, row, column].item()
                error = abs(restored[slice, 0, row, column].item() - healthy[slice, 0, row, column].item())
                inside, outside, area = inside + share * error, outside + (1 - share) * error, area + share
        total += (outside / (25 - area) + inside / area) / 2 if area else outside / 25

    assert reconstruction_loss(restored, healthy, mask).item() == pytest.approx(total / 3, rel=1e-5)


def test_reconstruction_of_a_lesion_of_one_pixel_pulls_as_hard_as_of_nine() -> None:
    healthy = torch.zeros(1, 1, SIZE, SIZE)
    pulls = []
    for side in (1, 3):
        mask = torch.zeros_like(healthy)
        mask[..., 4 : 4 + side, 4 : 4 + side] = 1
        pulls.append(reconstruction_loss(0.5 * mask, healthy, mask).item())

    assert pulls == pytest.approx([0.25, 0.25])


def test_grounding_is_the_smoothed_difference_above_its_mean() -> None:
    random = torch.Generator().manual_seed(0)
    view, restored = (torch.rand(1, 1, 9, 9, generator=random) for _ in range(2))
    sigma, reach = 1.0, 3
    kernel = [math.exp(-(offset**2) / (2 * sigma**2)) for offset in range(-reach, reach + 1)]

    difference = [[0.0] * 9 for _ in range(9)]
    for row in range(9):
        for column in range(9):
            for i, down in enumerate(kernel):
                for j, right in enumerate(kernel):
                    r, c = min(max(row + i - reach, 0), 8), min(max(column + j - reach, 0), 8)
                    pixel = view[0, 0, r, c].item() - restored[0, 0, r, c].item()
                    difference[row][column] += down * right * pixel / sum(kernel) ** 2
    d = torch.tensor(difference).abs()
    expected = (d - d.mean()).clamp(min=0) / (d.max() - d.mean())

    torch.testing.assert_close(grounding(view, restored, sigma)[0, 0], expected, atol=1e-5, rtol=1e-4)


def test_a_slice_that_is_its_own_restoration_has_no_evidence() -> None:
    view = torch.rand(2, 1, SIZE, SIZE)

    assert torch.equal(grounding(view, view), torch.zeros_like(view))


def evidence_case(lesion: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor, Projections]:
    torch.manual_seed(0)
    map = torch.randn(len(lesion), 3, 2, 2, requires_grad=True)
    embedding = torch.randn(len(lesion), 5, requires_grad=True)
    evidence = torch.rand(len(lesion), 1, 8, 8)
    return map, evidence, embedding, torch.tensor(lesion), Projections(channels=3, dim=5, hidden=7, out=4)


def looped(map: Tensor, evidence: Tensor, embedding: Tensor, lesion: Tensor, tau: float, to: Projections) -> Tensor:
    """The formula of discrimination_loss, pixel by pixel and pair by pair."""
    grounded, rest = [], []
    for i in range(len(map)):
        by_g, by_rest, area = torch.zeros(3), torch.zeros(3), 0.0
        for row in range(2):
            for column in range(2):
                g = evidence[i, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum().item() / 16
                by_g, area = by_g + g * map[i, :, row, column], area + g
                by_rest = by_rest + (1 - g) * map[i, :, row, column]
        grounded.append(to.region(by_g / area))
        rest.append(to.region(by_rest / (4 - area)))

    def psi(a: Tensor, b: Tensor) -> Tensor:
        return torch.exp(torch.dot(a, b) / (a.norm() * b.norm()) / tau)

    terms = []
    for i in range(len(map)):
        if lesion[i]:
            denominator = torch.zeros(())
            for j in range(len(map)):
                denominator = denominator + psi(grounded[i], to.slice(embedding[j]))
                if lesion[j]:
                    denominator = denominator + psi(grounded[i], rest[j])
            terms.append(-torch.log(psi(grounded[i], to.slice(embedding[i])) / denominator))
    return torch.stack(terms).mean()


def test_discrimination_and_its_gradients_are_the_formulas() -> None:
    map, evidence, embedding, lesion, projections = evidence_case([True, False, True, True])
    inputs = [map, embedding, *projections.parameters()]

    loss = discrimination_loss(map, evidence, embedding, lesion, 0.2, projections)
    expected = looped(map, evidence, embedding, lesion, 0.2, projections)

    torch.testing.assert_close(loss, expected)
    for found, wanted in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_a_batch_without_lesions_costs_nothing_and_keeps_its_graph() -> None:
    map, evidence, embedding, lesion, projections = evidence_case([False, False])
    evidence = torch.zeros_like(evidence)

    loss = discrimination_loss(map, evidence, embedding, lesion, 0.2, projections)
    loss.backward()

    assert loss.item() == 0
    for leaf in [map, embedding, *projections.parameters()]:
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_the_contrast_leaves_the_grounding_alone() -> None:
    map, evidence, embedding, lesion, projections = evidence_case([True, True])
    evidence.requires_grad_()

    discrimination_loss(map, evidence, embedding, lesion, 0.2, projections).backward()

    assert evidence.grad is None


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
def test_a_map_of_any_stride_is_restored_at_the_size_asked_for(stride: int) -> None:
    restored = Restorer(channels=5, width=8)(torch.randn(2, 5, 96 // stride, 96 // stride), size=96)

    assert restored.shape == (2, 1, 96, 96)


def test_a_fine_map_is_not_coarsened_on_its_way() -> None:
    checkerboard = (torch.arange(24)[:, None] + torch.arange(24)) % 2 * 2.0 - 1  # its mean over 2 x 2 cells is 0
    maps = torch.stack([checkerboard, torch.zeros(24, 24)]).unsqueeze(1)  # (2, 1, 24, 24), stride 4

    with_detail, without = Restorer(channels=1, width=8)(maps, size=96)

    assert not torch.allclose(with_detail, without, atol=1e-3)


def test_a_trained_restoration_finds_lesions_it_was_not_trained_on() -> None:
    torch.manual_seed(0)
    random = torch.Generator().manual_seed(0)
    backbone, restorer = TinyBackbone(), Restorer(channels=24, width=32)
    optimiser = torch.optim.Adam([*backbone.parameters(), *restorer.parameters()], lr=3e-3)
    for _ in range(100):
        view, healthy, mask = planted(32, random)
        optimiser.zero_grad()
        reconstruction_loss(restorer(backbone(view)[0], SIZE), healthy, mask).backward()
        optimiser.step()

    view, _, mask = planted(64, random)
    evidence = grounding(view, restorer(backbone(view)[0], SIZE).detach(), sigma=1.0)
    inside = (evidence * mask).sum(dim=(1, 2, 3)) / evidence.sum(dim=(1, 2, 3))

    assert inside.mean() > 5 * mask.mean()  # untrained: 0.6 to 2.3 times by seed
