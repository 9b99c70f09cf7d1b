"""A network in training: one step, and everything that the next step depends on."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.encoders.timm_import import timm
from models.lecl.checkpoint import check_fits, check_same_run, load
from models.lecl.clock import Clock
from models.lecl.config import Config
from models.lecl.ranks import Rank
from models.lecl.watch import Watch


class Diverged(Exception):
    """A loss is no longer a number; the last checkpoint is from before."""


class Training:
    """`done` of `steps` steps are done. `module` is as models/lecl/train.py asks; `slices` are those of an epoch."""

    def __init__(self, config: Config, module: nn.Module, slices: int, rank: Rank) -> None:
        self.done = 0
        self.steps, self._warmup = config.run.lengths(slices)
        self.watch = Watch()
        self._config, self._slices, self._rank = config, slices, rank
        self._weights = config.objectives.weights
        if rank.processes > 1 and rank.device.type == "cuda":
            # torch's own would drop the ReLU6 in timm's norms.
            module = timm.layers.convert_sync_batchnorm(module)  # type: ignore[attr-defined, no-untyped-call]
        self._module: Any = module.to(rank.device).train()
        self._model: Any = self._module
        if rank.processes > 1:
            # What a step reaches depends on the objectives: one that is computed from the map leaves the last norm.
            self._model = DistributedDataParallel(self._module, find_unused_parameters=True)
        self._optimizer = torch.optim.AdamW(
            [each for each in self._module.parameters() if each.requires_grad],
            lr=config.run.learning_rate,
            weight_decay=config.run.weight_decay,
        )
        # Summed where they are computed: reading a number from a GPU waits for all it was given.
        self._sums = torch.zeros(len(self._weights), dtype=torch.float64, device=rank.device)
        self._summed = 0  # steps since the last means()

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return learning_rate(self.done, self.steps, self._warmup, self._config.run.learning_rate)

    def step(self, batches: Iterator[Any], clock: Clock) -> None:
        """One step of the optimizer, on as many parts as the configuration accumulates."""
        run = self._config.run
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        for part in range(run.accumulate):
            with clock.waiting(run.batch // run.accumulate):
                batch = next(batches)
            last = part == run.accumulate - 1
            with nullcontext() if last or self._model is self._module else self._model.no_sync():
                self._backward(batch.to(self._rank.device))
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.done += 1
        self._summed += 1
        self._module.after_step(self.done / self.steps)

    def _backward(self, batch: Any) -> None:
        bf16 = self._config.run.precision == "bf16"
        with torch.autocast(self._rank.device.type, torch.bfloat16, enabled=bf16):
            losses: dict[str, Tensor] = self._model(batch)
        found = torch.stack([losses[name].float() for name in self._weights]) / self._config.run.accumulate
        (found * found.new_tensor(list(self._weights.values()))).sum().backward()  # type: ignore[no-untyped-call]
        self._sums += found.detach()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Meanwhile `watch` sees every embedding that the backbone computes."""
        hook = self._module.backbone.register_forward_hook(lambda _module, _images, answer: self.watch.add(answer[1]))
        try:
            yield
        finally:
            hook.remove()

    def means(self) -> dict[str, float]:
        """`loss`, weighted, and each objective's, unweighted: over the steps since this was last asked for.

        Of this process's slices alone. Raises Diverged.
        """
        self._check()
        means = (self._sums / self._summed).tolist()
        self._sums.zero_()
        self._summed = 0
        losses = dict(zip(self._weights, means, strict=True))
        return {"loss": sum(self._weights[name] * value for name, value in losses.items()), **losses}

    def state(self) -> dict[str, Any]:
        """For a checkpoint; every process must ask for it. Raises Diverged."""
        self._check()
        return {
            "step": self.done,
            "facts": json.dumps(self._facts()),
            "module": self._module.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "random": self._rank.gathered(_random_state(self._rank.device)),
            "embeddings": self.watch.window,
            "sums": self._sums,
            "summed": self._summed,
        }

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint. Raises WrongCheckpoint where it is of another run."""
        state = load(path)
        check_same_run(path, json.loads(state["facts"]), self._facts())
        check_fits(path, state["module"], self._module.state_dict())
        self._module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])
        _set_random_state(state["random"][self._rank.number], self._rank.device)
        window = state["embeddings"]
        self.watch.window = window.to(self._rank.device) if window is not None else None
        self._sums.copy_(state["sums"])
        self.done, self._summed = state["step"], state["summed"]

    def _facts(self) -> dict[str, Any]:
        return {**self._config.facts(), "slices": self._slices, "processes": self._rank.processes}

    def _check(self) -> None:
        for name, value in zip(self._weights, self._sums.tolist(), strict=True):
            if not math.isfinite(value):
                raise Diverged(f"the loss {name} is {value} by step {self.done}; try a lower learning_rate")


def learning_rate(step: int, steps: int, warmup: int, highest: float) -> float:
    """Of a step counted from 0: on a line up to `highest` in the warm-up's last step, then half a cosine down to 0."""
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _random_state(device: torch.device) -> dict[str, Tensor | None]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def _set_random_state(state: dict[str, Tensor | None], device: torch.device) -> None:
    if state["cpu"] is not None:
        torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:  # a run begun without a GPU has none
        torch.cuda.set_rng_state(state["cuda"], device)
