"""The contrastive losses of CLEAR (Ligero, Lenz et al., MICCAI 2025): InfoNCE (Eq. 1 and 2) and LECL (Eq. 4)."""

import math

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize


def info_nce(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """InfoNCE of one direction, a scalar in nats: queries (B, D) against the keys (B, D) of all processes.

    Eq. 1 and 2: -log( exp(sim(q, k+) / tau) / sum_i exp(sim(q, k_i) / tau) ), sim the cosine, mean over the queries;
    a query's k+ is the key of its own row. Keys carry no gradient, and MoCo-v3's factor 2 * tau is left out.
    """
    nowhere = torch.zeros(len(keys), dtype=torch.bool, device=keys.device)
    return lecl(queries, keys, nowhere, temperature, weight=0.0)


def lecl(queries: Tensor, keys: Tensor, lesion: Tensor, temperature: float, weight: float) -> Tensor:
    """LECL of one direction, a scalar in nats: lesion slices' keys weigh more among what a query is set apart from.

    Eq. 4: -log( exp(sim(q, k+) / tau) / (sum_i exp(sim(q, k_i) / tau) + lambda sum_j exp(sim(q, l_j) / tau)) ).
    queries, keys (B, D); lesion (B,) bool, of the keys' slices; l_j are the keys of all processes' lesion slices,
    a query's own among them; weight is lambda, and 0 is InfoNCE. ValueError if processes bring unequal batches.
    """
    if temperature <= 0 or weight < 0:
        raise ValueError(f"temperature {temperature} and weight {weight}, expected above 0, and 0 or more")
    if not len(queries) == len(keys) == len(lesion):
        raise ValueError(
            f"{len(queries)} queries, {len(keys)} keys, {len(lesion)} lesion flags: expected as many of each"
        )
    everyone, first = gathered(torch.cat([keys, lesion.to(keys.dtype).unsqueeze(1)], dim=1))  # (N, D + 1)
    logits = similarities(queries, everyone[:, :-1], temperature)  # (B, N)
    # A lesion slice's key stands in both sums: once, and lambda times. Together 1 + lambda, here as its logarithm,
    # so that nothing is exponentiated outside logsumexp and lambda = 0 adds exactly nothing.
    boost = math.log1p(weight) * everyone[:, -1].to(logits.dtype)  # (N,)
    denominator = (logits + boost).logsumexp(dim=1)  # (B,)
    return (denominator - logits.diagonal(offset=first)).mean()


def similarities(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """sim(q, k) / tau (B, N): cosines of queries (B, D) and keys (N, D) over the temperature, in fp32 or better."""
    # Under autocast the product would be taken in bf16, whose steps below 1 are 0.004: at tau 0.2 a fiftieth of a nat.
    with torch.autocast(device_type=queries.device.type, enabled=False):
        exact = torch.promote_types(queries.dtype, torch.float32)
        q = normalize(queries.to(exact), dim=1)
        k = normalize(keys.to(exact), dim=1)
        return q @ k.T / temperature


def gathered(rows: Tensor) -> tuple[Tensor, int]:
    """The rows (B, ...) of all processes in order of rank (N, ...), without gradient, and where one's own begin.

    MoCo-v3's concat_all_gather; without an initialised process group the rows themselves.
    """
    rows = rows.detach()
    if not (dist.is_available() and dist.is_initialized()):
        return rows, 0
    world = dist.get_world_size()
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world)]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    sizes = torch.cat(counts).tolist()
    if len(set(sizes)) > 1:  # all_gather does not check: it would hang, or fill the keys with what was in memory
        raise ValueError(f"batches of {sizes} slices in {world} processes, expected the same size in each")
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts), dist.get_rank() * len(rows)
