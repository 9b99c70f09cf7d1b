"""Attention-based multiple instance learning: the paper's head (CLEAR, Eq. 5 and 6) and what it is compared with."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ABMIL(nn.Module):
    """Attention pooling over a bag of slice embeddings, then a small classifier.

    Eq. 6: a_k = softmax_k(w^T tanh(V h_k)), and Eq. 5: z = sum_k a_k h_k, over the real instances only.
    """

    def __init__(
        self, dim: int, labels: int, hidden: int = 256, dropout: float = 0.5, attention: int | None = None
    ) -> None:
        super().__init__()
        self.encoder = _encoder(dim, hidden)
        self.V = nn.Linear(hidden, attention or hidden, bias=False)
        self.w = nn.Linear(attention or hidden, 1, bias=False)
        self.head = _classifier(hidden, labels, dropout)

    def forward(self, bag: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """bag (B, N, D) and present (B, N) bool -> logits (B, labels), attention (B, N).

        One bag (1, N, D) is read once for each row of `present`; so are those of the poolings below.
        """
        h = self.encoder(bag)  # (B, N, hidden)
        attention = self.score(h).masked_fill(~present, float("-inf")).softmax(dim=1)  # rows sum to 1
        z = torch.einsum("bn,bnd->bd", attention, h)  # (B, hidden)
        return self.head(z), attention

    def score(self, h: Tensor) -> Tensor:
        """h (B, N, hidden) -> how much each instance asks for, before the softmax (B, N)."""
        answer: Tensor = self.w(torch.tanh(self.V(h))).squeeze(-1)
        return answer


class GatedABMIL(ABMIL):
    """The same with a gate beside the tanh: a_k = softmax_k(w^T (tanh(V h_k) * sigm(U h_k))).

    Ilse et al. 2018, Eq. 9, arXiv:1802.04712.
    """

    def __init__(
        self, dim: int, labels: int, hidden: int = 256, dropout: float = 0.5, attention: int | None = None
    ) -> None:
        super().__init__(dim, labels, hidden, dropout, attention)
        self.U = nn.Linear(hidden, attention or hidden, bias=False)

    def score(self, h: Tensor) -> Tensor:
        """h (B, N, hidden) -> (B, N)."""
        answer: Tensor = self.w(torch.tanh(self.V(h)) * torch.sigmoid(self.U(h))).squeeze(-1)
        return answer


class MeanPooling(nn.Module):
    """The head without attention: every real instance weighs the same."""

    def __init__(self, dim: int, labels: int, hidden: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = _encoder(dim, hidden)
        self.head = _classifier(hidden, labels, dropout)

    def forward(self, bag: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """bag (B, N, D) and present (B, N) bool -> logits (B, labels), 1 / N for every real instance (B, N)."""
        attention = present.to(bag.dtype) / present.sum(dim=1, keepdim=True)  # (B, N)
        z = torch.einsum("bn,bnd->bd", attention, self.encoder(bag))  # (B, hidden)
        return self.head(z), attention


class MaxPooling(nn.Module):
    """The largest value of every hidden unit over the real instances."""

    def __init__(self, dim: int, labels: int, hidden: int = 256, dropout: float = 0.5) -> None:
        super().__init__()
        self.encoder = _encoder(dim, hidden)
        self.head = _classifier(hidden, labels, dropout)

    def forward(self, bag: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """bag (B, N, D) and present (B, N) bool -> logits (B, labels), attention (B, N).

        The attention of an instance is the share of hidden units whose maximum it is.
        """
        h = self.encoder(bag).masked_fill(~present.unsqueeze(-1), float("-inf"))  # (B, N, hidden)
        z, winner = h.max(dim=1)  # (B, hidden) each
        instances = torch.arange(bag.shape[1], device=bag.device)[None, :, None]  # (1, N, 1)
        return self.head(z), (winner.unsqueeze(1) == instances).float().mean(dim=-1)


class Ensemble(nn.Module):
    """Heads of several folds as one: the mean of their calibrated probabilities and of their attention."""

    temperature: Tensor  # logits are divided by it before they become probabilities

    def __init__(self, heads: Sequence[nn.Module], one_of_n: bool, temperature: Sequence[float] | None = None) -> None:
        """`temperature` holds one number per label, or one for all; 1 leaves the logits as they are."""
        super().__init__()
        self.heads = nn.ModuleList(heads)
        self.one_of_n = one_of_n
        self.register_buffer("temperature", torch.tensor(temperature or [1.0], dtype=torch.float32))

    def forward(self, bag: Tensor) -> tuple[Tensor, Tensor]:
        """bag (N, D), all of it real -> probabilities (labels,), attention (N,)."""
        present = torch.ones(1, bag.shape[0], dtype=torch.bool, device=bag.device)
        probabilities, attention = self.by_fold(bag, present)
        return probabilities.mean(dim=(0, 1)), attention.mean(dim=(0, 1))

    def by_fold(self, bag: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """bag (N, D) read several times, where present (runs, N) bool says which instances each time.

        Answers probabilities (folds, runs, labels) and attention (folds, runs, N). Instances are encoded once.
        """
        answers = [head(bag.unsqueeze(0), present) for head in self.heads]
        logits = torch.stack([logit for logit, _ in answers]) / self.temperature  # (folds, runs, labels)
        probabilities = logits.softmax(dim=-1) if self.one_of_n else logits.sigmoid()
        return probabilities, torch.stack([weights for _, weights in answers])


def _encoder(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())


def _classifier(hidden: int, labels: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(hidden),
        nn.Linear(hidden, hidden),
        nn.Dropout(dropout),
        nn.SiLU(),
        nn.Linear(hidden, labels),
    )
