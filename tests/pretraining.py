"""A network, slices and a configuration that take milliseconds to pretrain."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from models.lecl.config import Config
from models.lecl.ranks import Rank
from models.lecl.stop import Stop
from models.lecl.train import Result, run

SIZE, DIM = 8, 16


@dataclass(frozen=True)
class ToyBatch:
    view: Tensor  # (B, 1, SIZE, SIZE)
    lesion: Tensor  # (B,) of 0 and 1

    def to(self, device):
        return ToyBatch(self.view.to(device), self.lesion.to(device))

    def __len__(self):
        return len(self.view)


class ToyViews(torch.utils.data.Dataset):
    """Noise, brighter where there is a lesion; `asked` are the keys that were asked for, in this process."""

    def __init__(self, slices=10):
        self.slices, self.asked = slices, []

    def __len__(self):
        return self.slices

    def __getitem__(self, key):
        self.asked.append(key)
        index, draw = key
        noise = np.random.default_rng([index, draw]).normal(index % 2, 1, (1, SIZE, SIZE))
        return torch.from_numpy(noise.astype(np.float32)), float(index % 2)


def collate(samples):
    views, lesions = zip(*samples, strict=True)
    return ToyBatch(torch.stack(views), torch.tensor(lesions))


class ToyBackbone(nn.Module):
    """With state that is no parameter, and draws from torch's generator; `plain` without either."""

    def __init__(self, channels=DIM, plain=False):
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3)
        self.norm = nn.Identity() if plain else nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(0.0 if plain else 0.3)

    def forward(self, images):
        last = self.dropout(self.norm(self.stem(images)).relu())  # (B, DIM, 6, 6)
        return last, last.mean(dim=(2, 3))


class ToyPretraining(nn.Module):
    """Two objectives; the first pulls towards a slowly moving copy, as a momentum encoder does."""

    def __init__(self, channels=DIM, plain=False):
        super().__init__()
        torch.manual_seed(0)  # the weights that every run of these tests starts from
        self.backbone, self.slow = ToyBackbone(channels, plain), ToyBackbone(channels, plain).requires_grad_(False)
        self.head = nn.Linear(channels, 1)
        self.progress = []

    def forward(self, batch):
        _, embedding = self.backbone(batch.view)
        with torch.no_grad():
            _, key = self.slow(batch.view)
        evidence = self.head(embedding).squeeze(1)
        return {
            "moco": (embedding - key).square().mean(),
            "planting": nn.functional.binary_cross_entropy_with_logits(evidence, batch.lesion),
        }

    @torch.no_grad()
    def after_step(self, progress):
        self.progress.append(progress)
        for slow, fast in zip(self.slow.parameters(), self.backbone.parameters(), strict=True):
            slow.lerp_(fast, 0.1)


def toy_config(output: Path, **run_keys) -> Config:
    settings = {"steps": 6, "batch": 4, "learning_rate": 1e-2, "warmup_steps": 2, "workers": 0, "log_every": 2}
    return Config.model_validate(
        {
            "data": {"sources": [{"kind": "archive", "path": "nowhere"}]},
            "encoder": {"base": "toy"},
            "objectives": {"moco": 0.5, "planting": 2.0},
            "run": {"output": output, **settings, **run_keys},
        }
    )


def toy_run(config: Config, module=None, views=None, rank=None, stop=None) -> Result:
    return run(config, module or ToyPretraining(), views or ToyViews(), collate, rank or Rank(), stop or Stop())


class StopAfter(Stop):
    """Ends a run after so many of its own steps."""

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def reason(self):
        self.left -= 1
        return "enough" if self.left <= 0 else None
