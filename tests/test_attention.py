import pytest
import torch
from conftest import Checkpoint

from antidiffusion.attention import coarsest_layers, cross_attention_layers, mean_map, record_attention
from antidiffusion.surrogate import Embedding, Surrogate

PREFIXES = {"sd15": ("down_blocks.2.", "up_blocks.1."), "sdxl": ("down_blocks.2.", "up_blocks.0.")}
COUNTS = {"sd15": 2 + 3, "sdxl": 2 * 2 + 3 * 2}


def forward(surrogate: Surrogate, height: int = 8, width: int = 8, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, 4, height, width, generator=generator)
    with torch.no_grad():
        return surrogate.predict(z, torch.tensor([10, 900])[:batch], surrogate.embed(["a photo"]))


def test_recording_does_not_change_the_answer(surrogate: Surrogate) -> None:
    unet = surrogate.unet
    fused = forward(surrogate)
    with record_attention(unet, [name for name in unet.attn_processors if ".attn2." in name]) as maps:
        recorded = forward(surrogate)
    assert maps and torch.allclose(fused, recorded, atol=1e-5)
    assert torch.equal(forward(surrogate), fused)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (24, 8)])
def test_maps_are_distributions_over_the_tokens(surrogate: Surrogate, height: int, width: int) -> None:
    layers = coarsest_layers(surrogate.unet)
    with record_attention(surrogate.unet, layers) as maps:
        forward(surrogate, height, width)
    positions, window = height // 4 * width // 4, surrogate.tokenizers[0].model_max_length
    assert len(maps) == len(layers)
    for layer in maps:
        assert layer.dtype == torch.float32 and layer.shape[::2] == (2, positions) and layer.shape[3] == window
        torch.testing.assert_close(layer.sum(-1), torch.ones(layer.shape[:3]))
    mean = mean_map(maps)
    assert mean.shape == (2, positions, window) and mean.min() >= 0
    assert mean.std() > 1e-4  # not uniform: the maps say something
    torch.testing.assert_close(mean[0, 0], torch.stack([layer[0, :, 0].mean(0) for layer in maps]).mean(0))


def test_the_coarsest_layers_have_a_quarter_of_the_latent_s_side(checkpoint: Checkpoint, surrogate: Surrogate) -> None:
    layers = coarsest_layers(surrogate.unet)
    prefixes = PREFIXES.get(checkpoint.name, PREFIXES["sd15"])
    assert layers == cross_attention_layers(surrogate.unet, prefixes)
    assert len(layers) == COUNTS.get(checkpoint.name, COUNTS["sd15"])


def test_the_mini_model_s_coarsest_layers_have_half_the_latent_s_side(mini: Surrogate) -> None:
    layers = coarsest_layers(mini.unet)
    assert {name[: name.index(".attentions")] for name in layers} == {"down_blocks.1", "up_blocks.1"}
    with record_attention(mini.unet, layers) as maps:
        forward(mini, 16, 24, batch=1)
    assert len(maps) == len(layers) == 3 and {layer.shape[2] for layer in maps} == {8 * 12}


def test_only_the_positions_asked_for_are_recorded(tiny: Surrogate) -> None:
    fused = forward(tiny)
    with record_attention(tiny.unet, cross_attention_layers(tiny.unet), positions=16) as maps:
        recorded = forward(tiny)
    assert {layer.shape[2] for layer in maps} == {16} and len(maps) == 2 + 3
    assert torch.allclose(fused, recorded, atol=1e-5)


def test_processors_come_back_after_an_error(tiny: Surrogate) -> None:
    before = tiny.unet.attn_processors
    with pytest.raises(RuntimeError, match="stop"), record_attention(tiny.unet, coarsest_layers(tiny.unet)):
        assert tiny.unet.attn_processors != before
        raise RuntimeError("stop")
    assert all(value is before[name] for name, value in tiny.unet.attn_processors.items())


def test_maps_carry_gradients_to_the_tokens(tiny: Surrogate) -> None:
    tokens = tiny.embed([""]).tokens.requires_grad_()
    with record_attention(tiny.unet, coarsest_layers(tiny.unet)) as maps:
        tiny.predict(torch.ones(1, 4, 8, 8), torch.tensor([10]), Embedding(tokens))
    (slope,) = torch.autograd.grad(mean_map(maps)[..., 0].sum(), tokens)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_errors_name_the_remedy(tiny: Surrogate) -> None:
    with pytest.raises(ValueError, match=r"expected at least one attention map, got none; name layers"):
        mean_map([])
    selves = [name for name in tiny.unet.attn_processors if ".attn1." in name]
    named = pytest.raises(ValueError, match=r"got self-attention; record layers named attn2")
    with named, record_attention(tiny.unet, selves):
        forward(tiny)
