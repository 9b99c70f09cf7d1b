"""Attention-based multiple instance learning: the paper's head (CLEAR, Eq. 5 and 6)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ABMIL(nn.Module):
    """Attention pooling over a bag of slice embeddings, then a small classifier.

    Eq. 6: a_k = softmax_k(w^T tanh(V h_k)), and Eq. 5: z = sum_k a_k h_k, over the real instances only.
    """

    def __init__(self, dim: int, labels: int, hidden: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.V = nn.Linear(hidden, hidden, bias=False)
        self.w = nn.Linear(hidden, 1, bias=False)
        self.head = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Linear(hidden, hidden),
            nn.Dropout(dropout),
            nn.SiLU(),
            nn.Linear(hidden, labels),
        )

    def forward(self, bag: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """bag (B, N, D) and present (B, N) bool -> logits (B, labels), attention (B, N)."""
        h = self.encoder(bag)  # (B, N, hidden)
        score = self.w(torch.tanh(self.V(h))).squeeze(-1)  # (B, N)
        attention = score.masked_fill(~present, float("-inf")).softmax(dim=1)  # rows sum to 1
        z = torch.einsum("bn,bnd->bd", attention, h)  # (B, hidden)
        return self.head(z), attention


class Ensemble(nn.Module):
    """Heads of several folds as one: the mean of their probabilities and of their attention."""

    def __init__(self, heads: Sequence[ABMIL], one_of_n: bool) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.one_of_n = one_of_n

    def forward(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """bag (N, D), all of it real -> probabilities (labels,), attention (N,)."""
        present = torch.ones(bag.shape[:1], dtype=torch.bool, device=bag.device).unsqueeze(0)  # (1, N)
        answers = [head(bag.unsqueeze(0), present) for head in self.heads]
        logits = torch.stack([logit for logit, _ in answers])  # (heads, 1, labels)
        probabilities = logits.softmax(dim=-1) if self.one_of_n else logits.sigmoid()
        attention = torch.stack([weights for _, weights in answers])  # (heads, 1, N)
        return probabilities.mean(dim=(0, 1)), attention.mean(dim=(0, 1))
