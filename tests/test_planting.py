"""Supervised planting against a loop over its formula, and what of a slice it asks nothing about."""

import math

import pytest
import torch
from torch import nn

from models.lecl.planting import ENOUGH, HARDEST, LINE, Planting, planting_loss

CELL = 4  # pixels a side


def looped(evidence, mask, lesion):
    """Cell by cell: -log p of lesion cells, -log(1 - p) of each slice's hardest others, and of slices; a third each."""
    missed, hardest, of_slices = [], [], []
    for logits, pixels, with_lesion in zip(evidence.tolist(), mask.tolist(), lesion.tolist(), strict=True):
        rows, columns = len(logits[0]), len(logits[0][0])
        share, wrong = {}, []
        for row in range(rows):
            for column in range(columns):
                inside = [
                    pixels[0][CELL * row + down][CELL * column + along] for down in range(CELL) for along in range(CELL)
                ]
                share[row, column] = sum(inside) / CELL**2
        fullest = max(share.values())
        for (row, column), part in share.items():
            logit = logits[0][row][column]
            if part > 0 and (part >= ENOUGH or part == fullest):
                missed.append(math.log(1 + math.exp(-logit)))
            # Nothing is asked of what a lesion touches, nor of any cell where it is only known as a box.
            asked = part == 0 and not (with_lesion and fullest == 0)
            wrong.append(math.log(1 + math.exp(logit)) if asked else 0.0)
        hardest += sorted(wrong, reverse=True)[:HARDEST]
        flat = [logit for line in logits[0] for logit in line]
        weights = [math.exp(logit) for logit in flat]
        told = sum(weight * logit for weight, logit in zip(weights, flat, strict=True)) / sum(weights)
        of_slices.append(math.log(1 + math.exp(-told if with_lesion else told)))
    return (
        (sum(missed) / len(missed) if missed else 0.0) + sum(hardest) / len(hardest) + sum(of_slices) / len(of_slices)
    ) / 3


def cases():
    """evidence (5, 1, 4, 5), mask (5, 1, 16, 20), lesion (5,): large, small, none, a box, and one at cells' corner."""
    evidence = 2 * torch.randn(5, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(5, 1, 16, 20)
    mask[0, 0, 3:12, 5:13] = 1  # full cells, cells with a quarter and cells with a sixteenth
    mask[1, 0, 9, 13] = 0.7  # far less of its cell than is enough
    mask[4, 0, 7:9, 7:9] = 1  # the same small share of four cells
    return evidence, mask, torch.tensor([True, True, False, True, True])


def test_what_is_left_of_a_lesion_at_the_views_edge_is_neither_asked_for_nor_wrong():
    evidence, mask, _ = cases()
    edge, whole = mask[1:2].clone(), torch.zeros(1, 1, 16, 20)
    edge[0, 0, 9, 13] = 0.3
    lifted = evidence[1:2].clone()
    lifted[0, 0, 2, 3] += 5

    left = [planting_loss(each, edge, torch.tensor([False])) for each in (evidence[1:2], lifted)]

    slices = [planting_loss(each, whole, torch.tensor([False])) for each in (evidence[1:2], lifted)]
    assert left[1] - left[0] < slices[1] - slices[0]  # that cell is not among the wrong ones
    told = [(each.flatten() * each.flatten().softmax(0)).sum() for each in (evidence[1:2], lifted)]
    softened = [torch.nn.functional.softplus(each) / 3 for each in told]
    torch.testing.assert_close(left[1] - left[0], softened[1] - softened[0])  # what remains is the slice's own logit


def test_the_loss_and_its_gradient_are_the_formulas():
    evidence, mask, lesion = cases()
    evidence = evidence.double().requires_grad_()

    loss = planting_loss(evidence, mask, lesion)
    (gradient,) = torch.autograd.grad(loss, evidence)

    assert loss.item() == pytest.approx(looped(evidence, mask, lesion), rel=1e-5)
    for place in [(0, 0, 1, 2), (0, 0, 3, 4), (1, 0, 2, 3), (2, 0, 0, 0), (3, 0, 2, 2), (4, 0, 1, 1)]:
        moved = [evidence.detach().clone() for _ in range(2)]
        moved[0][place] -= 1e-4
        moved[1][place] += 1e-4
        low, high = (looped(each, mask, lesion) for each in moved)
        assert gradient[place].item() == pytest.approx((high - low) / 2e-4, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("which", [[2], [3], [1, 2]])
def test_the_loss_is_a_number_whatever_lesions_there_are(which):
    evidence, mask, lesion = (each[which] for each in cases())

    loss = planting_loss(evidence, mask, lesion)

    assert loss.item() == pytest.approx(looped(evidence, mask, lesion), rel=1e-5)


def drops_when_raised(evidence, mask, lesion, place):
    """Whether more evidence there lowers the cells' part of the loss; None where it does not matter."""
    raised = evidence.clone().requires_grad_()
    loss = 3 * planting_loss(raised, mask, lesion)
    logits = raised.flatten(1)
    told = (logits * logits.softmax(dim=1)).sum(dim=1)
    of_slices = nn.functional.binary_cross_entropy_with_logits(told, lesion.float())
    (gradient,) = torch.autograd.grad(loss - of_slices, raised)
    return None if gradient[place].abs() < 1e-6 else bool(gradient[place] < 0)


def test_a_small_lesion_has_the_cell_that_holds_most_of_it_and_its_others_are_left_alone():
    mask = torch.zeros(1, 1, 16, 16)
    mask[0, 0, 4:6, 4:5] = 1  # two of sixteen pixels of cell (1, 1)
    mask[0, 0, 3, 4] = 1  # one of cell (0, 1)
    evidence, lesion = torch.zeros(1, 1, 4, 4), torch.tensor([True])
    evidence[0, 0, 3, 3] = 5  # the hardest of the rest

    assert drops_when_raised(evidence, mask, lesion, (0, 0, 1, 1)) is True
    assert drops_when_raised(evidence, mask, lesion, (0, 0, 0, 1)) is None
    assert drops_when_raised(evidence, mask, lesion, (0, 0, 3, 3)) is False


def test_only_the_hardest_cells_without_a_lesion_count():
    evidence = torch.arange(HARDEST + 3.0).view(1, 1, 1, -1) / 10
    mask, lesion = torch.zeros(1, 1, 1, HARDEST + 3), torch.tensor([False])

    counted = [drops_when_raised(evidence, mask, lesion, (0, 0, 0, cell)) for cell in range(HARDEST + 3)]

    assert counted == [None] * 3 + [False] * HARDEST


def test_of_a_lesion_known_as_a_box_no_cell_is_asked():
    evidence, mask = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 12, 12)

    asked = {
        drops_when_raised(evidence, mask, torch.tensor([True]), (0, 0, row, column))
        for row in range(3)
        for column in range(3)
    }

    assert asked == {None}


def test_a_line_through_the_embeddings_is_asked_beside_the_evidence():
    torch.manual_seed(0)
    planting = Planting(channels=6, dim=3, own=None)
    map, embedding = torch.randn(5, 6, 4, 5, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    _, mask, lesion = cases()

    loss = planting(map, embedding, mask, lesion)
    loss.backward()

    weight, bias = planting.evidence.weight[0, :, 0, 0], planting.evidence.bias
    evidence = torch.einsum("bchw,c->bhw", map, weight).unsqueeze(1) + bias
    told = (embedding @ planting.slice.weight[0] + planting.slice.bias).tolist()
    line = [math.log(1 + math.exp(-x if y else x)) for x, y in zip(told, lesion.tolist(), strict=True)]
    assert loss.item() == pytest.approx(looped(evidence, mask, lesion) + LINE * sum(line) / 5, rel=1e-5)
    assert map.grad.abs().max() > 0 and embedding.grad.abs().max() > 0
    assert all(each.grad.abs().max() > 0 for each in planting.parameters())


def test_a_networks_own_evidence_is_what_is_trained():
    own = nn.Conv2d(6, 1, 1)

    assert Planting(channels=6, dim=3, own=own).evidence is own
