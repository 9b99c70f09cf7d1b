import math

import numpy as np
import pytest
import torch
from safetensors.torch import load

from models.abmil import ABMIL, Ensemble
from models.heads.export import to_onnx, to_safetensors
from models.heads.loader import pad
from models.heads.run import HeadRunner

DIM, LABELS, HIDDEN = 6, 3, 5


def random_head(seed, dropout=0.5):
    torch.manual_seed(seed)
    head = ABMIL(DIM, LABELS, hidden=HIDDEN, dropout=dropout).eval()
    with torch.no_grad():  # large enough that attention is far from uniform
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return head


def random_bag(instances, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(instances, DIM)).astype(np.float32))


def everything(bag):
    return torch.ones(1, len(bag), dtype=torch.bool)


def slow_abmil(head, bag):
    """Eq. 5 and 6 and the classifier on one bag, one number at a time."""
    p = {name: tensor.double().numpy() for name, tensor in head.state_dict().items()}

    def linear(weight, bias, x):
        return [sum(weight[i][j] * x[j] for j in range(len(x))) + bias[i] for i in range(len(weight))]

    nothing = [0.0] * HIDDEN
    h, score = [], []
    for instance in bag.double().numpy():
        h.append([max(0.0, value) for value in linear(p["encoder.0.weight"], p["encoder.0.bias"], instance)])
        tanh = [math.tanh(value) for value in linear(p["V.weight"], nothing, h[-1])]
        score.append(sum(p["w.weight"][0][j] * tanh[j] for j in range(HIDDEN)))
    total = sum(math.exp(each) for each in score)
    attention = [math.exp(each) / total for each in score]
    z = [sum(attention[k] * h[k][d] for k in range(len(h))) for d in range(HIDDEN)]

    mean = sum(z) / HIDDEN
    variance = sum((value - mean) ** 2 for value in z) / HIDDEN
    x = [(value - mean) / math.sqrt(variance + 1e-5) for value in z]
    x = [value * p["head.0.weight"][d] + p["head.0.bias"][d] for d, value in enumerate(x)]
    x = linear(p["head.1.weight"], p["head.1.bias"], x)
    x = [value / (1 + math.exp(-value)) for value in x]  # SiLU
    return linear(p["head.4.weight"], p["head.4.bias"], x), attention


@pytest.mark.parametrize("instances", [1, 2, 9])
def test_the_head_is_equations_5_and_6_of_the_paper(instances):
    head, bag = random_head(1), random_bag(instances)

    with torch.inference_mode():
        logits, attention = head(bag.unsqueeze(0), everything(bag))

    expected_logits, expected_attention = slow_abmil(head, bag)
    np.testing.assert_allclose(logits[0], expected_logits, atol=1e-4)
    np.testing.assert_allclose(attention[0], expected_attention, atol=1e-5)


def test_padding_a_bag_changes_nothing():
    head, bags = random_head(2), [random_bag(n, seed=n) for n in (1, 4, 7)]
    padded, present = pad(bags)
    padded[~present] = 1000.0  # whatever lies there

    with torch.inference_mode():
        logits, attention = head(padded, present)
        alone = [head(bag.unsqueeze(0), everything(bag)) for bag in bags]

    np.testing.assert_allclose(logits, torch.cat([each for each, _ in alone]), atol=1e-5)
    for row, (_, expected) in enumerate(alone):
        np.testing.assert_allclose(attention[row, present[row]], expected[0], atol=1e-6)
    assert attention[~present].tolist() == [0.0] * int((~present).sum())


def test_pad_puts_bags_in_front_and_zeros_behind():
    padded, present = pad([torch.tensor([[1.0, 2.0]]).half(), torch.tensor([[3.0, 4.0], [5.0, 6.0]]).half()])

    assert padded.dtype == torch.float32
    assert padded.tolist() == [[[1, 2], [0, 0]], [[3, 4], [5, 6]]]
    assert present.tolist() == [[True, False], [True, True]]


def test_permuting_a_bag_permutes_the_attention_and_keeps_the_answer():
    head, bag = random_head(3), random_bag(8)
    order = torch.tensor([5, 2, 7, 0, 1, 6, 3, 4])

    with torch.inference_mode():
        logits, attention = head(bag.unsqueeze(0), everything(bag))
        shuffled_logits, shuffled_attention = head(bag[order].unsqueeze(0), everything(bag))

    assert attention.std() > 0.01
    np.testing.assert_allclose(shuffled_logits, logits, atol=1e-5)
    np.testing.assert_allclose(shuffled_attention[0], attention[0, order], atol=1e-6)


def test_attention_of_every_bag_sums_to_1():
    padded, present = pad([random_bag(n, seed=n) * 10 for n in (1, 3, 50)])

    with torch.inference_mode():
        _, attention = random_head(4)(padded, present)

    assert (attention >= 0).all()
    np.testing.assert_allclose(attention.sum(dim=1), 1.0, atol=1e-6)


@pytest.mark.parametrize("one_of_n", [False, True])
def test_an_ensemble_is_the_mean_of_its_heads_probabilities_and_attention(one_of_n):
    heads, bag = [random_head(seed) for seed in (5, 6, 7)], random_bag(4)

    with torch.inference_mode():
        probabilities, attention = Ensemble(heads, one_of_n).eval()(bag)

    answers = [slow_abmil(head, bag) for head in heads]
    singles = []
    for logits, _ in answers:
        if one_of_n:
            total = sum(math.exp(logit) for logit in logits)
            singles.append([math.exp(logit) / total for logit in logits])
        else:
            singles.append([1 / (1 + math.exp(-logit)) for logit in logits])
    assert (probabilities.shape, attention.shape) == ((LABELS,), (4,))
    np.testing.assert_allclose(probabilities, np.mean(singles, axis=0), atol=1e-5)
    np.testing.assert_allclose(attention, np.mean([each for _, each in answers], axis=0), atol=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["multilabel", "one_of_n"])
def exported(request):
    ensemble = Ensemble([random_head(8), random_head(9)], one_of_n=request.param).eval()
    return ensemble, HeadRunner(to_onnx(ensemble, DIM))


@pytest.mark.parametrize(("slices", "windows"), [(1, 1), (1, 2), (2, 2), (133, 2), (40, 3)])
def test_an_exported_head_answers_as_torch_does(exported, slices, windows):
    ensemble, runner = exported
    bag = np.random.default_rng(slices).normal(size=(slices, windows, DIM)).astype(np.float16)

    probabilities, attention = runner.predict(bag)

    with torch.inference_mode():
        expected = ensemble(torch.from_numpy(bag.reshape(-1, DIM).astype(np.float32)))
    assert attention.shape == (slices, windows)
    np.testing.assert_allclose(probabilities, expected[0], atol=1e-5)
    np.testing.assert_allclose(attention.reshape(-1), expected[1], atol=1e-5)
    np.testing.assert_allclose(attention.sum(), 1.0, atol=1e-5)


def test_exporting_leaves_dropout_out():
    ensemble = Ensemble([random_head(10, dropout=0.9)], one_of_n=False).train()
    runner, bag = HeadRunner(to_onnx(ensemble, DIM)), np.ones((2, 1, DIM), np.float16)

    with torch.inference_mode():
        expected, _ = ensemble.eval()(torch.ones(2, DIM))
    np.testing.assert_allclose(runner.predict(bag)[0], expected, atol=1e-5)


def test_safetensors_hold_the_whole_ensemble_by_fold():
    ensemble = Ensemble([random_head(11), random_head(12)], one_of_n=False)
    copy = Ensemble([random_head(0), random_head(0)], one_of_n=False)

    state = load(to_safetensors(ensemble))
    copy.load_state_dict(state, strict=True)

    assert sorted({name.rsplit(".", 1)[0] for name in state if name.startswith("heads.1.")}) == [
        "heads.1.V",
        "heads.1.encoder.0",
        "heads.1.head.0",
        "heads.1.head.1",
        "heads.1.head.4",
        "heads.1.w",
    ]
    assert all(torch.equal(copy.state_dict()[name], value) for name, value in ensemble.state_dict().items())
