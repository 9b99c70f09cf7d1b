import math

import numpy as np
import pytest
import torch

from models.abmil import Ensemble, GatedABMIL, MaxPooling, MeanPooling
from models.heads.export import to_onnx
from models.heads.loader import pad
from models.heads.run import HeadRunner

DIM, LABELS, HIDDEN, ATTENTION = 6, 2, 5, 3


def random_head(kind, seed=0):
    torch.manual_seed(seed)
    sizes = (DIM, LABELS, HIDDEN, 0.5, ATTENTION) if kind is GatedABMIL else (DIM, LABELS, HIDDEN, 0.5)
    head = kind(*sizes).eval()
    with torch.no_grad():  # large enough that attention is far from uniform
        for parameter in head.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return head


def random_bag(instances, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(instances, DIM)).astype(np.float32))


def read(head, bag):
    with torch.inference_mode():
        logits, attention = head(bag.unsqueeze(0), torch.ones(1, len(bag), dtype=torch.bool))
    return logits[0].numpy(), attention[0].numpy()


def hidden(head, bag):
    """The first layer, one number at a time: a list per instance."""
    weight, bias = (head.state_dict()[f"encoder.0.{name}"].double().numpy() for name in ("weight", "bias"))
    return [
        [max(0.0, sum(weight[i][j] * x[j] for j in range(DIM)) + bias[i]) for i in range(HIDDEN)]
        for x in bag.double().numpy()
    ]


def classified(head, z):
    with torch.inference_mode():
        return head.head(torch.tensor(np.array([z]), dtype=torch.float32))[0].numpy()


def test_the_gate_is_equation_9_of_ilse():
    head, bag = random_head(GatedABMIL), random_bag(7)
    v, u, w = (head.state_dict()[f"{name}.weight"].double().numpy() for name in ("V", "U", "w"))
    h = hidden(head, bag)

    score = []
    for each in h:
        tanh = [math.tanh(sum(v[i][j] * each[j] for j in range(HIDDEN))) for i in range(ATTENTION)]
        gate = [1 / (1 + math.exp(-sum(u[i][j] * each[j] for j in range(HIDDEN)))) for i in range(ATTENTION)]
        score.append(sum(w[0][i] * tanh[i] * gate[i] for i in range(ATTENTION)))
    total = sum(math.exp(each) for each in score)
    expected = [math.exp(each) / total for each in score]

    logits, attention = read(head, bag)
    np.testing.assert_allclose(attention, expected, atol=1e-5)
    z = [sum(expected[k] * h[k][d] for k in range(7)) for d in range(HIDDEN)]
    np.testing.assert_allclose(logits, classified(head, z), atol=1e-4)


def test_the_mean_weighs_every_instance_the_same():
    head, bag = random_head(MeanPooling), random_bag(7)

    logits, attention = read(head, bag)

    np.testing.assert_allclose(attention, np.full(7, 1 / 7), atol=1e-6)
    np.testing.assert_allclose(logits, classified(head, np.mean(hidden(head, bag), axis=0)), atol=1e-4)


def test_the_maximum_is_that_of_each_hidden_unit_and_names_its_instances():
    head, bag = random_head(MaxPooling), random_bag(7)
    h = np.array(hidden(head, bag))

    logits, attention = read(head, bag)

    np.testing.assert_allclose(logits, classified(head, h.max(axis=0)), atol=1e-4)
    np.testing.assert_allclose(attention, np.bincount(h.argmax(axis=0), minlength=7) / HIDDEN, atol=1e-6)


@pytest.mark.parametrize("kind", [GatedABMIL, MeanPooling, MaxPooling])
def test_padding_a_bag_changes_nothing(kind):
    head, bags = random_head(kind), [random_bag(n, seed=n) for n in (1, 4, 7)]
    padded, present = pad(bags)
    padded[~present] = 1000.0  # whatever lies there

    with torch.inference_mode():
        logits, attention = head(padded, present)

    for row, bag in enumerate(bags):
        alone, weights = read(head, bag)
        np.testing.assert_allclose(logits[row], alone, atol=1e-4)
        np.testing.assert_allclose(attention[row, present[row]], weights, atol=1e-6)
    assert attention[~present].tolist() == [0.0] * int((~present).sum())


@pytest.mark.parametrize("kind", [GatedABMIL, MeanPooling, MaxPooling])
def test_exported_it_answers_as_torch_does_and_at_its_temperature(kind):
    ensemble = Ensemble([random_head(kind, seed) for seed in (1, 2)], one_of_n=False, temperature=[2.0, 0.5]).eval()
    bag = np.random.default_rng(3).normal(size=(9, 2, DIM)).astype(np.float16)

    probabilities, attention = HeadRunner(to_onnx(ensemble, DIM)).predict(bag)

    flat = torch.from_numpy(bag.reshape(-1, DIM).astype(np.float32))
    singles = [read(head, flat) for head in ensemble.heads]
    expected = np.mean([1 / (1 + np.exp(-logits / [2.0, 0.5])) for logits, _ in singles], axis=0)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    np.testing.assert_allclose(attention.reshape(-1), np.mean([each for _, each in singles], axis=0), atol=1e-5)
