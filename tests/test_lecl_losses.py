"""InfoNCE and LECL against a double loop over their formulas, in one process and in two."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from models.lecl.losses import info_nce, lecl


def looped(queries: Tensor, keys: Tensor, lesion: Tensor, temperature: float, weight: float, first: int = 0) -> Tensor:
    """Eq. 4, term by term; the positive of query i is key first + i."""

    def psi(q: Tensor, k: Tensor) -> Tensor:
        return torch.exp((q * k).sum() / ((q**2).sum().sqrt() * (k**2).sum().sqrt()) / temperature)

    total = torch.zeros((), dtype=queries.dtype)
    for i, query in enumerate(queries):
        denominator = torch.zeros((), dtype=queries.dtype)
        for key in keys:
            denominator = denominator + psi(query, key)
        for key, is_lesion in zip(keys, lesion, strict=True):
            if is_lesion:
                denominator = denominator + weight * psi(query, key)
        total = total - torch.log(psi(query, keys[first + i]) / denominator)
    return total / len(queries)


def drawn(batch: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """queries, keys (batch, 5), every third slice with a lesion."""
    random = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randn(batch, 5, generator=random, dtype=dtype) for _ in range(2))
    return queries, keys, torch.arange(batch) % 3 == 0


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0, 5.0])
def test_lecl_and_its_gradient_are_the_formulas(weight: float, temperature: float) -> None:
    queries, keys, lesion = drawn(7)
    ours, theirs = queries.clone().requires_grad_(), queries.clone().requires_grad_()

    loss = lecl(ours, keys, lesion, temperature, weight)
    expected = looped(theirs, keys, lesion, temperature, weight)
    loss.backward()
    expected.backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert torch.autograd.gradcheck(lambda q: lecl(q, keys, lesion, temperature, weight), ours)


def test_info_nce_is_the_formula_without_lesions() -> None:
    queries, keys, lesion = drawn(6)

    torch.testing.assert_close(info_nce(queries, keys, 0.2), looped(queries, keys, lesion, 0.2, weight=0.0))


def test_lecl_without_weight_is_info_nce_to_the_digit() -> None:
    queries, keys, lesion = drawn(6, dtype=torch.float32)

    assert torch.equal(lecl(queries, keys, lesion, 0.2, weight=0.0), info_nce(queries, keys, 0.2))


def test_a_lesion_slice_of_its_own_costs_the_logarithm_of_one_plus_lambda() -> None:
    queries, keys, _ = drawn(1)

    torch.testing.assert_close(
        lecl(queries, keys, torch.tensor([True]), 0.2, weight=3.0), torch.tensor(4.0, dtype=torch.float64).log()
    )


def test_among_lesion_slices_alone_lambda_moves_nothing() -> None:
    queries, keys, _ = drawn(5)
    everywhere = torch.ones(5, dtype=torch.bool)
    with_lambda, without = queries.clone().requires_grad_(), queries.clone().requires_grad_()

    lecl(with_lambda, keys, everywhere, 0.2, weight=5.0).backward()
    info_nce(without, keys, 0.2).backward()

    torch.testing.assert_close(with_lambda.grad, without.grad)


def test_keys_get_no_gradient() -> None:
    queries, keys, lesion = drawn(4)
    queries.requires_grad_()
    keys.requires_grad_()

    lecl(queries, keys, lesion, 0.2, 3.0).backward()

    assert keys.grad is None and queries.grad is not None


def test_a_cold_temperature_overflows_nothing() -> None:
    queries, keys, lesion = drawn(5, dtype=torch.float32)
    queries.requires_grad_()

    loss = lecl(queries, keys, lesion, temperature=1e-4, weight=1e30)  # exp(1e4) is far beyond fp32
    loss.backward()

    assert loss.isfinite() and queries.grad.isfinite().all()


def test_autocast_does_not_round_the_similarities() -> None:
    queries, keys, lesion = drawn(6, dtype=torch.float32)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = lecl(queries, keys, lesion, 0.05, 3.0)

    assert torch.equal(loss, lecl(queries, keys, lesion, 0.05, 3.0))


@pytest.mark.parametrize(
    ("temperature", "weight", "flags", "said"),
    [
        (0.0, 1.0, 4, "temperature 0.0"),
        (0.2, -1.0, 4, "weight -1.0"),
        (0.2, 1.0, 3, "4 queries, 4 keys, 3 lesion flags"),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(temperature: float, weight: float, flags: int, said: str) -> None:
    queries, keys, lesion = drawn(4)

    with pytest.raises(ValueError, match=said):
        lecl(queries, keys, lesion[:flags], temperature, weight)


def one_of_two(rank: int, folder: str) -> None:
    """A process of two: its share of 8 slices, then a batch that is larger than the other's."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", world_size=2, rank=rank)
    queries, keys, lesion = (share.chunk(2)[rank] for share in drawn(8))
    queries = queries.clone().requires_grad_()
    loss = lecl(queries, keys, lesion, 0.2, 3.0)
    loss.backward()
    try:
        lecl(*drawn(3 + rank), 0.2, 3.0)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    torch.save({"loss": loss.detach(), "grad": queries.grad, "refusal": refusal}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_contrast_against_the_keys_and_lesions_of_both(tmp_path) -> None:
    queries, keys, lesion = drawn(8)

    torch.multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    for rank, answer in enumerate(answers):
        mine = queries[4 * rank : 4 * rank + 4].clone().requires_grad_()
        expected = looped(mine, keys, lesion, 0.2, 3.0, first=4 * rank)
        expected.backward()
        torch.testing.assert_close(answer["loss"], expected.detach())
        torch.testing.assert_close(answer["grad"], mine.grad)
        assert answer["refusal"] == "batches of [3, 4] slices in 2 processes, expected the same size in each"
