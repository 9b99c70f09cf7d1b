import pytest
import torch
from torch.nn import functional

from models.encoders import mambaout
from models.encoders.mambaout import MambaOutEmbedding, adapt

DEPTHS, DIMS = (1, 2, 1, 1), (8, 16, 24, 32)


def network():
    """The shape of MambaOut's published networks, in small."""
    return MambaOutEmbedding("mambaout_femto", depths=DEPTHS, dims=DIMS).eval()


def official_shapes():
    """Every tensor of the authors' class below its head, under their names."""
    shapes = {}

    def layer(name, *weight, bias=None):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = weight, (bias or weight[0],)

    layer("downsample_layers.0.conv1", DIMS[0] // 2, 3, 3, 3)
    layer("downsample_layers.0.norm1", DIMS[0] // 2)
    layer("downsample_layers.0.conv2", DIMS[0], DIMS[0] // 2, 3, 3)
    layer("downsample_layers.0.norm2", DIMS[0])
    for stage, (depth, dim) in enumerate(zip(DEPTHS, DIMS, strict=True)):
        if stage > 0:
            layer(f"downsample_layers.{stage}.conv", dim, DIMS[stage - 1], 3, 3)
            layer(f"downsample_layers.{stage}.norm", dim)
        hidden = int(8 / 3 * dim)
        for block in range(depth):
            layer(f"stages.{stage}.{block}.norm", dim)
            layer(f"stages.{stage}.{block}.fc1", 2 * hidden, dim)
            layer(f"stages.{stage}.{block}.conv", dim, 1, 7, 7)
            layer(f"stages.{stage}.{block}.fc2", dim, hidden)
    layer("norm", DIMS[-1])
    return shapes


def official_state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(shape, generator=generator) * 0.6 - 0.2 for name, shape in official_shapes().items()}


def by_the_paper(state, images):
    """The authors' arithmetic on the authors' names, in float64: norm of the mean over the last map."""
    state = {name: value.double() for name, value in state.items()}

    def parameters(name):
        return state[f"{name}.weight"], state[f"{name}.bias"]

    def norm(x, name):
        return functional.layer_norm(x, x.shape[-1:], *parameters(name), eps=1e-6)

    def conv(x, name, **options):
        return functional.conv2d(x.movedim(-1, 1), *parameters(name), **options).movedim(1, -1)

    def gated(x, name, dim):
        hidden = int(8 / 3 * dim)
        g, i, c = functional.linear(norm(x, f"{name}.norm"), *parameters(f"{name}.fc1")).split(
            (hidden, hidden - dim, dim), -1
        )
        mixed = torch.cat([i, conv(c, f"{name}.conv", padding=3, groups=dim)], dim=-1)
        return x + functional.linear(functional.gelu(g) * mixed, *parameters(f"{name}.fc2"))

    x = images.double().movedim(1, -1)
    x = norm(conv(x, "downsample_layers.0.conv1", stride=2, padding=1), "downsample_layers.0.norm1")
    x = norm(conv(functional.gelu(x), "downsample_layers.0.conv2", stride=2, padding=1), "downsample_layers.0.norm2")
    for stage, (depth, dim) in enumerate(zip(DEPTHS, DIMS, strict=True)):
        if stage > 0:
            x = norm(conv(x, f"downsample_layers.{stage}.conv", stride=2, padding=1), f"downsample_layers.{stage}.norm")
        for block in range(depth):
            x = gated(x, f"stages.{stage}.{block}", dim)
    return norm(x.mean(dim=(1, 2)), "norm")


def official(state):
    """With the authors' classifier."""
    width = 4 * DIMS[-1]
    head = {"fc1.weight": (width, DIMS[-1]), "norm.weight": (width,), "fc2.bias": (1000,)}
    return state | {f"head.{name}": torch.zeros(shape) for name, shape in head.items()}


def clear_moco(state):
    """As CLEAR's pretraining saves it: two encoders with projectors for heads, and a predictor."""
    projector = {"head.0.weight": torch.zeros(9, DIMS[-1]), "head.7.running_mean": torch.zeros(4)}
    momentum = {name: torch.full_like(value, 7) for name, value in state.items()}
    return (
        {f"module.base_encoder.{name}": value for name, value in {**state, **projector}.items()}
        | {f"module.momentum_encoder.{name}": value for name, value in {**momentum, **projector}.items()}
        | {"module.predictor.0.weight": torch.zeros(9, 4)}
    )


def clear_converted(state):
    """As CLEAR's extraction reads it: the encoder alone."""
    return state


def loaded(checkpoint):
    encoder = network()
    encoder.load_state_dict(adapt(checkpoint, encoder), strict=True)
    return encoder


@pytest.mark.parametrize("layout", [official, clear_moco, clear_converted])
def test_the_authors_and_clears_checkpoints_give_the_norm_of_the_mean_over_the_last_map(layout):
    state = official_state()
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        embeddings = loaded(layout(state))(images)

    assert embeddings.shape == (2, DIMS[-1])
    torch.testing.assert_close(embeddings.double(), by_the_paper(state, images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", [official, clear_moco, clear_converted])
def test_a_missing_and_a_foreign_tensor_are_refused(layout):
    state = official_state()

    for name, ours in [("norm.weight", "head.norm.weight"), ("stages.1.1.conv.bias", "stages.1.blocks.1.conv.bias")]:
        with pytest.raises(RuntimeError, match=rf'Missing key.*"network\.{ours}"'):
            loaded(layout({key: value for key, value in state.items() if key != name}))
    for name in ("norm.foreign", "stages.0.5.norm.weight", "classifier.weight"):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            loaded(layout({**state, name: torch.zeros(1)}))


def test_timms_own_names_with_its_classifier_are_accepted_too():
    encoder = loaded(official_state())
    names = {name.removeprefix("network."): value for name, value in encoder.state_dict().items()}
    classifier = {"head.pre_logits.fc.weight": torch.zeros(1), "head.fc.bias": torch.zeros(1)}

    again = loaded({**names, **classifier})

    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize(
    ("name", "dim", "blocks", "parameters"),
    [
        ("mambaout_femto", 288, 18, 5_816_304),
        ("mambaout_kobe", 288, 24, 7_652_976),
        ("mambaout_tiny", 576, 18, 22_906_080),
        ("mambaout_small", 576, 37, 44_849_056),
        ("mambaout_base", 768, 37, 79_371_580),
    ],
)
def test_the_networks_have_the_papers_sizes(name, dim, blocks, parameters):
    with torch.device("meta"):
        encoder = mambaout.build(name)
        embeddings = encoder(torch.empty(2, 3, 224, 224))

    assert embeddings.shape == (2, dim)
    assert sum(len(stage.blocks) for stage in encoder.network.stages) == blocks
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
