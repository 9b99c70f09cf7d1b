"""Supervised planting: where a lesion was planted, the network's evidence of one must be high, and nowhere else."""

from torch import Tensor, nn
from torch.nn import functional

ENOUGH = 0.2  # of a cell that is lesion, from which on it must be found; between none and this nothing is asked
LINE = 0.25  # the weight of the embedding's line beside the evidence
HARDEST = 12  # cells without lesion per slice that count: most are easy from the first step on


def planting_loss(evidence: Tensor, mask: Tensor, lesion: Tensor) -> Tensor:
    """Mean of three cross-entropies, a scalar in nats: of lesion cells, of the hardest other cells, of slices.

    evidence (B, 1, h, w), logits; mask (B, 1, H, W) in [0, 1]; lesion (B,) bool. A slice's own logit is its
    evidence averaged by its softmax, what the attention pools. Of a slice whose lesion is only known as a box (its
    mask is empty) only that logit is asked.
    """
    logits = evidence.flatten(1).float()  # (B, cells)
    size = (evidence.shape[2], evidence.shape[3])
    share = functional.adaptive_avg_pool2d(mask, size).flatten(1)  # (B, cells)
    fullest = share.amax(dim=1, keepdim=True)
    found = (share >= ENOUGH) | ((share == fullest) & (fullest > 0))  # (B, cells): small ones have one cell
    found &= lesion[:, None]  # what of a lesion is left at the view's edge is not asked for
    boxed = lesion & (fullest.squeeze(1) == 0)  # (B,)
    missed = functional.softplus(-logits)[found]
    wrong = functional.softplus(logits).masked_fill((share > 0) | boxed[:, None], 0.0)  # (B, cells)
    hardest = wrong.topk(min(HARDEST, wrong.shape[1]), dim=1).values  # (B, HARDEST)
    slices = (logits * logits.softmax(dim=1)).sum(dim=1)  # (B,)
    of_slices = functional.binary_cross_entropy_with_logits(slices, lesion.float())
    return (missed.sum() / max(1, len(missed)) + hardest.mean() + of_slices) / 3


class Planting(nn.Module):
    """The evidence per cell, the network's own where it has one, and a line through the embeddings."""

    def __init__(self, channels: int, dim: int, own: nn.Module | None) -> None:
        super().__init__()
        self.evidence = own or nn.Conv2d(channels, 1, 1)
        self.slice = nn.Linear(dim, 1)

    def forward(self, map: Tensor, embedding: Tensor, mask: Tensor, lesion: Tensor) -> Tensor:
        """map (B, channels, h, w), embedding (B, dim), mask (B, 1, H, W), lesion (B,) -> a scalar.

        The line is what a linear probe would draw: with it the whole embedding, not the evidence alone, tells lesions.
        """
        told = self.slice(embedding).squeeze(1)  # (B,)
        line = functional.binary_cross_entropy_with_logits(told.float(), lesion.float())
        return planting_loss(self.evidence(map), mask, lesion) + LINE * line
