import numpy as np
import pytest
import torch

from models.encoders import ctvit
from models.encoders.ctvit import ContinuousPositionBias, CosineCodebook, Patches, PositionGenerator

DIM, HEADS, HEAD, INNER, VOXELS = 16, 2, 8, 42, 4 * 8 * 4  # of test_ctvit


def attention_shapes():
    return {
        "null_kv": (HEADS, 0, HEAD),
        "q_scale": (HEAD,),
        "k_scale": (HEAD,),
        "norm.gamma": (DIM,),
        "norm.beta": (DIM,),
        "context_norm.gamma": (DIM,),
        "context_norm.beta": (DIM,),
        "to_q.weight": (HEADS * HEAD, DIM),
        "to_kv.weight": (2 * HEADS * HEAD, DIM),
        "to_out.weight": (DIM, HEADS * HEAD),
    }


def block_shapes():
    return {
        "0.dsconv.weight": (DIM, 1, 3, 3, 3),
        "0.dsconv.bias": (DIM,),
        **{f"1.{name}": shape for name, shape in attention_shapes().items()},
        "3.0.weight": (DIM,),
        "3.0.bias": (DIM,),
        "3.1.weight": (2 * INNER, DIM),
        "3.4.weight": (DIM, INNER),
    }


def embedding_shapes(voxels):
    return {
        "1.weight": (voxels,),
        "1.bias": (voxels,),
        "2.weight": (DIM, voxels),
        "2.bias": (DIM,),
        "3.weight": (DIM,),
        "3.bias": (DIM,),
    }


def transformer_shapes():
    blocks = {f"layers.{k}.{name}": shape for k in range(2) for name, shape in block_shapes().items()}
    return {**blocks, "norm_out.gamma": (DIM,), "norm_out.beta": (DIM,)}


def tower_shapes():
    """CT-CLIP's image tower as its authors' code names it, at the size of test_ctvit."""
    parts = {
        "spatial_rel_pos_bias.net": {
            "0.0.weight": (DIM, 2),
            "0.0.bias": (DIM,),
            "1.0.weight": (DIM, DIM),
            "1.0.bias": (DIM,),
            "2.weight": (HEADS, DIM),
            "2.bias": (HEADS,),
        },
        "to_patch_emb_first_frame": embedding_shapes(VOXELS // 4),
        "to_patch_emb": embedding_shapes(VOXELS),
        "enc_spatial_transformer": transformer_shapes(),
        "enc_temporal_transformer": transformer_shapes(),
        "vq._codebook": {"initted": (1,), "cluster_size": (1, 32), "embed": (1, 32, DIM)},
        "to_pixels_first_frame": {"0.weight": (VOXELS // 4, DIM), "0.bias": (VOXELS // 4,)},
        "to_pixels": {"0.weight": (VOXELS, DIM), "0.bias": (VOXELS,)},
    }
    return {f"{part}.{name}": shape for part, shapes in parts.items() for name, shape in shapes.items()}


def waves(number, shape):
    """Numbers that every machine makes alike."""
    values = torch.sin(torch.arange(np.prod(shape), dtype=torch.float64) * 0.7 + number).float().reshape(shape)
    return values / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 and np.prod(shape) else values


@pytest.fixture
def checkpoint():
    """What CT-CLIP's code saves: both towers, their projections and the temperature."""
    shapes = {f"visual_transformer.{name}": shape for name, shape in tower_shapes().items()}
    shapes |= {"to_visual_latent.weight": (24, 3 * 4 * DIM), "to_visual_latent_extra.weight": (24, 3 * 4 * DIM)}
    shapes |= {"to_text_latent.weight": (24, 5), "to_text_latent_extra.weight": (24, 5), "temperature": ()}
    shapes |= {"text_transformer.embeddings.word_embeddings.weight": (7, 5)}
    state = {name: waves(number, shape) for number, (name, shape) in enumerate(sorted(shapes.items()))}
    untrained = {name: torch.zeros_like(value) for name, value in state.items() if name.endswith("beta")}
    return state | untrained


def load(state, network="test_ctvit"):
    built = ctvit.build(network)
    built.load_state_dict(ctvit.adapt(state, built), strict=True)
    return built.eval().requires_grad_(False)


def test_tokens_and_latent_are_those_of_the_authors_code(checkpoint):
    """Worked out once with CT-CLIP's own CTViT (vector-quantize-pytorch 1.1.2) on this checkpoint."""
    network = load(checkpoint)
    volume = waves(47, (16 * 24 * 16,)).view(1, 1, 16, 24, 16)
    seen = []
    network.visual_transformer.vq.register_forward_pre_hook(lambda _, tokens: seen.append(tokens[0]))

    latent = network(volume)

    assert seen[0].shape == (1, 4, 3, 4, DIM)
    expected = [-0.5511231, -0.5283852, 0.9479987, -0.1286989, 0.6378809, 0.6417673]
    np.testing.assert_allclose(seen[0][0, 3, 2, 1, :6], expected, atol=1e-5)
    assert latent.shape == (1, 24)
    expected = [0.01264083, -0.01213311, 0.00609779, 0.00271556, -0.01029175, 0.01317922]
    np.testing.assert_allclose(latent[0, :6], expected, atol=1e-6)


def test_the_latent_projects_the_mean_over_depth_of_the_codebooks_entries(checkpoint):
    network = load(checkpoint)
    volumes = torch.rand(2, 1, 16, 24, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    tokens, latent = network.visual_transformer(volumes), network(volumes)

    entries = {tuple(entry) for entry in checkpoint["visual_transformer.vq._codebook.embed"][0].tolist()}
    assert {tuple(token) for token in tokens.reshape(-1, DIM).tolist()} <= entries
    mean = tokens.numpy().astype(np.float64).sum(axis=1).reshape(2, -1) / 4
    np.testing.assert_allclose(latent, mean @ checkpoint["to_visual_latent.weight"].numpy().T, atol=1e-6)


def test_a_patch_keeps_its_voxels_in_order():
    volume = torch.arange(16 * 24 * 16.0).view(1, 1, 16, 24, 16)

    patches = Patches((4, 8, 4))(volume)

    assert patches.shape == (1, 4, 3, 4, VOXELS)
    assert torch.equal(patches[0, 2, 1, 3], volume[0, 0, 8:12, 8:16, 12:16].flatten())


def test_the_position_bias_is_the_networks_answer_to_the_logarithmic_distance_of_each_pair():
    torch.manual_seed(0)
    network = ContinuousPositionBias(height=3, width=4, dim=DIM, heads=HEADS)

    bias = network()

    assert bias.shape == (HEADS, 12, 12)
    for one, other in np.ndindex(12, 12):
        distance = np.subtract(divmod(one, 4), divmod(other, 4))
        scaled = torch.tensor(np.sign(distance) * np.log1p(abs(distance)), dtype=torch.float32)
        np.testing.assert_allclose(bias[:, one, other].detach(), network.net(scaled).detach(), atol=1e-6)


def test_the_position_generator_looks_down_and_never_up():
    torch.manual_seed(0)
    network, tokens = PositionGenerator((4, 3, 4), DIM), torch.rand(4, 12, DIM)  # the planes of one volume
    changed = tokens.clone()
    changed[2] += 1

    moved = (network(changed) - network(tokens)).abs().amax(dim=(1, 2))

    assert (moved > 0).tolist() == [False, False, True, True]


def test_a_token_becomes_the_entry_at_the_smallest_angle_with_that_entrys_length():
    codebook = CosineCodebook(3, 2)
    codebook.embed.copy_(torch.tensor([[[1.0, 0.0], [0.0, 5.0], [-0.1, -0.1]]]))

    found = codebook(torch.tensor([[[30.0, 1.0], [0.1, 0.2]], [[-9.0, -8.0], [-1.0, 3.0]]]))

    np.testing.assert_allclose(found, [[[1, 0], [0, 5]], [[-0.1, -0.1], [0, 5]]])


@pytest.mark.parametrize(
    "name", ["visual_transformer.enc_temporal_transformer.layers.1.3.4.weight", "to_visual_latent.weight"]
)
def test_a_missing_tensor_is_refused(checkpoint, name):
    del checkpoint[name]

    with pytest.raises(RuntimeError, match="Missing key"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["visual_transformer.discr.weight", "to_visual_latent.0.weight", "foreign"])
def test_a_foreign_tensor_is_refused(checkpoint, name):
    with pytest.raises(RuntimeError, match="Unexpected key"):
        load({**checkpoint, name: torch.zeros(1)})


def test_keys_to_attend_to_beside_the_tokens_are_refused_where_there_are_any(checkpoint):
    name = "visual_transformer.enc_spatial_transformer.layers.0.1.null_kv"

    with pytest.raises(RuntimeError, match="null_kv"):
        load({**checkpoint, name: torch.zeros(HEADS, 4, HEAD)})


def test_ct_clips_own_size():
    with torch.device("meta"):
        network = ctvit.build("ctvit")
        state = network.state_dict()

        assert network(torch.empty(1, 1, 240, 480, 480)).shape == (1, 512)

    assert state["to_visual_latent.weight"].shape == (512, 294912)
    assert state["visual_transformer.to_patch_emb.2.weight"].shape == (512, 4000)
    assert state["visual_transformer.vq.embed"].shape == (1, 8192, 512)
    assert state["visual_transformer.enc_spatial_transformer.layers.3.feed_forward.4.weight"].shape == (512, 1365)
    assert sum(parameter.numel() for parameter in network.parameters()) == 174_416_712


def test_it_can_be_exported(checkpoint):
    network = load(checkpoint)
    volumes = torch.rand(2, 1, 16, 24, 16)

    exported = torch.export.export(network, (volumes,)).module()

    np.testing.assert_allclose(exported(volumes), network(volumes), atol=1e-6)
