import pytest
import torch
from conftest import Checkpoint

from antidiffusion.models.attention import (
    AttentionProcessor,
    EditingProcessor,
    SharingProcessor,
    coarsest_layers,
    cross_attention_layers,
    mean_map,
    processed,
    record_attention,
    self_attention_layers,
)
from antidiffusion.models.base import Embedding, Surrogate

PREFIXES = {"sd15": ("down_blocks.2.", "up_blocks.1."), "sdxl": ("down_blocks.2.", "up_blocks.0.")}
COUNTS = {"sd15": 2 + 3, "sdxl": 2 * 2 + 3 * 2}


def forward(surrogate: Surrogate, height: int = 8, width: int = 8, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, 4, height, width, generator=generator)
    with torch.no_grad():
        return surrogate.predict(z, torch.tensor([10, 900])[:batch], surrogate.embed(["a photo"]))


def test_recording_does_not_change_the_answer(surrogate: Surrogate) -> None:
    unet = surrogate.denoiser
    fused = forward(surrogate)
    with record_attention(unet, [name for name in unet.attn_processors if ".attn2." in name]) as maps:
        recorded = forward(surrogate)
    assert maps and torch.allclose(fused, recorded, atol=1e-5)
    assert torch.equal(forward(surrogate), fused)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 16), (24, 8)])
def test_maps_are_distributions_over_the_tokens(surrogate: Surrogate, height: int, width: int) -> None:
    layers = coarsest_layers(surrogate.denoiser)
    with record_attention(surrogate.denoiser, layers) as maps:
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
    layers = coarsest_layers(surrogate.denoiser)
    prefixes = PREFIXES.get(checkpoint.name, PREFIXES["sd15"])
    assert layers == cross_attention_layers(surrogate.denoiser, prefixes)
    assert len(layers) == COUNTS.get(checkpoint.name, COUNTS["sd15"])


def test_the_mini_model_s_coarsest_layers_have_half_the_latent_s_side(mini: Surrogate) -> None:
    layers = coarsest_layers(mini.denoiser)
    assert {name[: name.index(".attentions")] for name in layers} == {"down_blocks.1", "up_blocks.1"}
    with record_attention(mini.denoiser, layers) as maps:
        forward(mini, 16, 24, batch=1)
    assert len(maps) == len(layers) == 3 and {layer.shape[2] for layer in maps} == {8 * 12}


def test_only_the_positions_asked_for_are_recorded(tiny: Surrogate) -> None:
    fused = forward(tiny)
    with record_attention(tiny.denoiser, cross_attention_layers(tiny.denoiser), positions=16) as maps:
        recorded = forward(tiny)
    assert {layer.shape[2] for layer in maps} == {16} and len(maps) == 2 + 3
    assert torch.allclose(fused, recorded, atol=1e-5)


def test_processors_come_back_after_an_error(tiny: Surrogate) -> None:
    before = tiny.denoiser.attn_processors
    with pytest.raises(RuntimeError, match="stop"), record_attention(tiny.denoiser, coarsest_layers(tiny.denoiser)):
        assert tiny.denoiser.attn_processors != before
        raise RuntimeError("stop")
    assert all(value is before[name] for name, value in tiny.denoiser.attn_processors.items())


@pytest.mark.parametrize("processor", [AttentionProcessor(), EditingProcessor(lambda maps: maps), SharingProcessor(2)])
def test_processors_that_change_nothing(surrogate: Surrogate, processor: AttentionProcessor) -> None:
    fused, unet = forward(surrogate), surrogate.denoiser
    with processed(unet, unet.attn_processors.keys(), processor):
        same = forward(surrogate)
    assert torch.allclose(fused, same, atol=1e-5)


def test_edited_probabilities_mix_the_values() -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    processor = EditingProcessor(lambda maps: maps.roll(1, 0), lambda positions: positions == 5)
    expected = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1).roll(1, 0) @ value
    torch.testing.assert_close(processor.attend(query, key, value, 8**-0.5), expected)
    plain = AttentionProcessor().attend(query[:, :, :3], key, value, 8**-0.5)
    assert torch.equal(processor.attend(query[:, :, :3], key, value, 8**-0.5), plain)


def test_shared_keys_and_values_are_those_of_the_first_entries() -> None:
    query, key, value = torch.randn(3, 6, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    mixed = SharingProcessor(2).attend(query, key, value, 0.3)
    for entry in range(6):
        first = entry % 2
        expected = (0.3 * query[entry] @ key[first].transpose(-1, -2)).softmax(-1) @ value[first]
        torch.testing.assert_close(mixed[entry], expected)


def test_self_attention_layers_are_in_the_order_in_which_they_run(surrogate: Surrogate) -> None:
    order: list[str] = []
    modules = dict(surrogate.denoiser.named_modules())
    layers = self_attention_layers(surrogate.denoiser)
    hooks = [
        modules[name.removesuffix(".processor")].register_forward_hook(lambda *_, name=name: order.append(name))
        for name in layers
    ]
    forward(surrogate)
    for hook in hooks:
        hook.remove()
    assert layers == order and len(layers) == sum(".attn1." in name for name in surrogate.denoiser.attn_processors)


def test_nested_blocks_keep_each_other_s_layers(tiny: Surrogate) -> None:
    outer, inner, before = AttentionProcessor(), AttentionProcessor(), tiny.denoiser.attn_processors
    cross, selves = cross_attention_layers(tiny.denoiser), self_attention_layers(tiny.denoiser)
    with processed(tiny.denoiser, cross, outer):
        with processed(tiny.denoiser, selves, inner):
            now = tiny.denoiser.attn_processors
            assert all(now[name] is outer for name in cross) and all(now[name] is inner for name in selves)
        assert all(tiny.denoiser.attn_processors[name] is before[name] for name in selves)
        assert all(tiny.denoiser.attn_processors[name] is outer for name in cross)
    assert all(value is before[name] for name, value in tiny.denoiser.attn_processors.items())


def test_maps_carry_gradients_to_the_tokens(tiny: Surrogate) -> None:
    tokens = tiny.embed([""]).tokens.requires_grad_()
    with record_attention(tiny.denoiser, coarsest_layers(tiny.denoiser)) as maps:
        tiny.predict(torch.ones(1, 4, 8, 8), torch.tensor([10]), Embedding(tokens))
    (slope,) = torch.autograd.grad(mean_map(maps)[..., 0].sum(), tokens)
    assert slope.isfinite().all() and slope.abs().max() > 0


def test_errors_name_the_remedy(tiny: Surrogate) -> None:
    with pytest.raises(ValueError, match=r"expected at least one attention map, got none; name layers"):
        mean_map([])
    selves = [name for name in tiny.denoiser.attn_processors if ".attn1." in name]
    named = pytest.raises(ValueError, match=r"got self-attention; record layers named attn2")
    with named, record_attention(tiny.denoiser, selves):
        forward(tiny)
