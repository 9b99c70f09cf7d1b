import math

import pytest
import torch
from torch.nn import functional

from models.encoders import vit_conv
from models.encoders.vit_conv import NETWORKS, ViTConv, adapt, sine_cosine_positions

DIM, DEPTH, HEADS, SIZE = 32, 2, 4, 48


def network():
    return ViTConv(DIM, DEPTH, HEADS, SIZE).eval()


def random_state(seed=0):
    """A trained encoder's tensors: none of them zero or one, the positions as they were."""
    generator = torch.Generator().manual_seed(seed)
    state = network().state_dict()
    for name, value in state.items():
        if name != "pos_embed" and value.is_floating_point():
            spread = torch.rand(value.shape, generator=generator)
            is_scale = name.endswith("running_var") or (value.ndim == 1 and name.endswith("weight"))
            state[name] = spread + 0.5 if is_scale else (spread - 0.5) * 0.6
    return state


def loaded(checkpoint):
    encoder = network()
    encoder.load_state_dict(adapt(checkpoint, encoder), strict=True)
    return encoder


def embed(checkpoint, images):
    with torch.inference_mode():
        return loaded(checkpoint)(images)


def images(seed=0):
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def by_the_paper(state, image):
    """The class token after the final norm, one head at a time, in float64."""
    state = {name: value.double() for name, value in state.items()}

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attention(x, name):
        q, k, v = linear(x, f"{name}.qkv").chunk(3, dim=-1)
        heads = [
            torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(DIM / HEADS), dim=-1) @ v[:, part]
            for part in torch.arange(DIM).chunk(HEADS)
        ]
        return linear(torch.cat(heads, dim=-1), f"{name}.proj")

    x = image.double().unsqueeze(0)
    for layer in (0, 3, 6, 9):
        stem, scale = f"patch_embed.proj.{layer}", f"patch_embed.proj.{layer + 1}"
        x = functional.conv2d(x, state[f"{stem}.weight"], stride=2, padding=1)
        mean, variance, weight, bias = (
            state[f"{scale}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        x = (((x - mean) / (variance + 1e-5).sqrt()) * weight + bias).relu()
    x = functional.conv2d(x, state["patch_embed.proj.12.weight"], state["patch_embed.proj.12.bias"])
    tokens = torch.stack([x[0, :, row, column] for row in range(SIZE // 16) for column in range(SIZE // 16)])
    x = torch.cat([state["cls_token"][0], tokens]) + state["pos_embed"][0]
    for block in range(DEPTH):
        name = f"blocks.{block}"
        x = x + attention(norm(x, f"{name}.norm1"), f"{name}.attn")
        x = x + linear(functional.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.mlp.fc1")), f"{name}.mlp.fc2")
    return norm(x, "norm")[0]


def test_an_embedding_is_the_class_token_after_the_final_norm():
    state = random_state()

    embeddings = embed(state, images())

    expected = torch.stack([by_the_paper(state, image) for image in images()])
    assert embeddings.shape == (2, DIM)
    torch.testing.assert_close(embeddings.double(), expected, atol=1e-5, rtol=0)


def test_positions_are_sine_and_cosine_of_row_and_column():
    positions = sine_cosine_positions(grid=3, dim=16)

    assert positions.shape == (1, 10, 16)
    assert not positions[0, 0].any()  # the class token has no place
    for row in range(3):
        for column in range(3):
            waves = [
                wave(place * 10_000 ** -(k / 4))
                for place in (row, column)
                for wave in (math.sin, math.cos)
                for k in range(4)
            ]
            torch.testing.assert_close(positions[0, 1 + 3 * row + column], torch.tensor(waves), atol=1e-6, rtol=0)


def test_positions_are_fixed_from_the_start():
    encoder = network()

    assert torch.equal(encoder.pos_embed, sine_cosine_positions(SIZE // 16, DIM))
    assert not encoder.pos_embed.requires_grad


def moco(state):
    """As MoCo-v3 saves it: two encoders with projectors for heads, and a predictor."""
    projector = {
        "head.0.weight": torch.zeros(8, DIM),
        "head.1.running_mean": torch.zeros(8),
        "head.6.weight": torch.zeros(4, 8),
    }
    momentum = {name: torch.full_like(value, 7) for name, value in state.items()}
    return (
        {f"module.base_encoder.{name}": value for name, value in {**state, **projector}.items()}
        | {f"module.momentum_encoder.{name}": value for name, value in {**momentum, **projector}.items()}
        | {"module.predictor.0.weight": torch.zeros(8, 4)}
    )


def linear_probe(state):
    probe = {"head.weight": torch.zeros(5, DIM), "head.bias": torch.zeros(5)}
    return {f"module.{name}": value for name, value in {**state, **probe}.items()}


def fine_tuned(state):
    return {**state, "head.weight": torch.zeros(5, DIM), "head.bias": torch.zeros(5)}


@pytest.mark.parametrize("layout", [moco, linear_probe, fine_tuned])
def test_published_layouts_load_strictly(layout):
    state = random_state()

    assert torch.equal(embed(layout(state), images()), embed(state, images()))


def test_a_missing_a_foreign_and_a_differing_tensor_are_refused():
    state = random_state()
    for layout in (moco, fine_tuned):
        for name in ("pos_embed", "cls_token", "patch_embed.proj.1.running_var", "norm.bias"):
            with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
                loaded(layout({key: value for key, value in state.items() if key != name}))
        with pytest.raises(RuntimeError, match=r'Unexpected key.*"blocks\.9\.norm1\.bias"'):
            loaded(layout({**state, "blocks.9.norm1.bias": torch.zeros(DIM)}))
        with pytest.raises(RuntimeError, match="size mismatch for pos_embed"):
            loaded(layout({**state, "pos_embed": sine_cosine_positions(14, DIM)}))


def test_positions_that_fine_tuning_moved_are_the_checkpoints():
    state = random_state()
    moved = {**state, "pos_embed": state["pos_embed"] + 0.3}

    assert torch.equal(loaded(fine_tuned(moved)).pos_embed, moved["pos_embed"])
    expected = torch.stack([by_the_paper(moved, image) for image in images()])
    torch.testing.assert_close(embed(fine_tuned(moved), images()).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "dim", "parameters"), [("vit_conv_small", 384, 20_617_392), ("vit_conv_base", 768, 82_199_904)]
)
def test_the_networks_have_moco_v3s_sizes(name, dim, parameters):
    with torch.device("meta"):
        encoder = vit_conv.build(name)
        embeddings = encoder(torch.empty(2, 3, 224, 224))

    assert set(NETWORKS) == {"vit_conv_small", "vit_conv_base"}
    assert embeddings.shape == (2, dim)
    assert encoder.pos_embed.shape == (1, 197, dim)
    assert [block.attn.num_heads for block in encoder.blocks] == [12] * 11
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
