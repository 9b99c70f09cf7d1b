"""Which of how many training processes this is, and what they tell each other."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rank:
    """One process of a run; alone unless torchrun started several."""

    number: int = 0
    processes: int = 1
    device: torch.device = CPU
    control: Any = None  # a gloo group: what is said over it does not wait for a GPU's queue

    @property
    def first(self) -> bool:
        return self.number == 0

    def any(self, here: bool) -> bool:
        """Whether it is so in any process."""
        if self.processes == 1:
            return here
        flag = torch.tensor(int(here))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return bool(flag)

    def gathered(self, value: Any) -> list[Any]:
        """Every process's value, by rank, in the first process; nothing in the others."""
        if self.processes == 1:
            return [value]
        values = [None] * self.processes if self.first else None
        dist.gather_object(value, values, group=self.control)
        return values or []


@contextmanager
def joined() -> Iterator[Rank]:
    """This process as torchrun's environment names it, its group open meanwhile."""
    processes, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else CPU
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if processes == 1:
        yield Rank(device=device)
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Rank(dist.get_rank(), processes, device, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()
