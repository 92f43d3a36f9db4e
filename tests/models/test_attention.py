from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import Checkpoint
from torch import Generator, Tensor

from antidiffusion.models.attention import (
    Attend,
    Watched,
    editing,
    fused,
    mean_map,
    probabilities,
    record_attention,
    recording,
    sharing,
    watched,
)
from antidiffusion.models.base import Embedding, Places, Surrogate
from antidiffusion.models.memory import checkpointed

COARSEST = {
    "sd15": ({"down_blocks.2", "up_blocks.1"}, 2 + 3),
    "sdxl": ({"down_blocks.2", "up_blocks.0"}, 2 * 2 + 3 * 2),
}
EVERYTHING = Places(slice(None), slice(None), slice(None))
JOINT = Places(slice(0, 6), slice(6, 10), slice(0, 6))  # six positions of the picture, then four tokens


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def forward(surrogate: Surrogate, height: int = 8, width: int = 8, prompts: Sequence[str] = ("a photo",)) -> Tensor:
    t = surrogate.schedule.time(torch.tensor([0.1, 0.9]))
    with torch.no_grad():
        return surrogate.predict(normal(2, surrogate.channels, height, width), t, surrogate.embed(prompts))


def processors(surrogate: Surrogate) -> dict[str, Any]:
    return dict(surrogate.denoiser.attn_processors)


def test_recording_does_not_change_the_answer(surrogate: Surrogate) -> None:
    plain = forward(surrogate)
    with record_attention(surrogate, surrogate.cross_layers()) as maps:
        recorded = forward(surrogate)
    assert len(maps) == len(surrogate.cross_layers())
    torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-5)
    assert torch.equal(forward(surrogate), plain)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (24, 8)])
def test_maps_of_a_unet_are_distributions_over_the_tokens(surrogate: Surrogate, height: int, width: int) -> None:
    layers = surrogate.map_layers()
    with record_attention(surrogate, layers) as maps:
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


def test_maps_of_a_joint_layer_are_what_the_text_gets(joint: Surrogate) -> None:
    with record_attention(joint, joint.cross_layers()) as maps:
        forward(joint)
    text = joint.embed([""]).tokens.shape[1]
    assert len(maps) == len(joint.cross_layers())
    for layer in maps:
        mass = layer.sum(-1)
        assert layer.shape[2:] == (16, text) and mass.max() <= 1 + 1e-6 and 0 < mass.mean() < 0.99


def test_the_map_layers_have_a_quarter_of_the_latent_s_side(checkpoint: Checkpoint, surrogate: Surrogate) -> None:
    blocks, count = COARSEST.get(checkpoint.name, COARSEST["sd15"])
    layers = surrogate.map_layers()
    assert {name[: name.index(".attentions")] for name in layers} == blocks and len(layers) == count


def test_the_mini_model_s_map_layers_have_half_the_latent_s_side(mini: Surrogate) -> None:
    layers = mini.map_layers()
    assert {name[: name.index(".attentions")] for name in layers} == {"down_blocks.1", "up_blocks.1"}
    with record_attention(mini, layers) as maps:
        forward(mini, 16, 24)
    assert len(maps) == len(layers) == 3 and {layer.shape[2] for layer in maps} == {8 * 12}


def test_only_the_positions_asked_for_are_recorded(tiny: Surrogate) -> None:
    plain = forward(tiny)
    with record_attention(tiny, tiny.cross_layers(), positions=16) as maps:
        recorded = forward(tiny)
    assert {layer.shape[2] for layer in maps} == {16} and len(maps) == 2 + 3
    torch.testing.assert_close(recorded, plain, rtol=0, atol=1e-5)


def test_layers_are_in_the_order_in_which_they_run(surrogate: Surrogate) -> None:
    order: list[str] = []
    modules, names = dict(surrogate.denoiser.named_modules()), surrogate.denoiser.attn_processors
    hooks = [
        modules[name.removesuffix(".processor")].register_forward_hook(lambda *_, name=name: order.append(name))
        for name in names
    ]
    forward(surrogate)
    for hook in hooks:
        hook.remove()
    cross, selves = surrogate.cross_layers(), surrogate.self_layers()
    assert [name for name in order if name in cross] == cross
    assert [name for name in order if name in selves] == selves
    assert sorted([*cross, *selves]) == sorted(names)


@pytest.mark.parametrize("attend", [fused, recording([]), editing(lambda m: m, text=False), sharing(2)])
def test_what_changes_nothing_changes_nothing(tiny: Surrogate, attend: Attend) -> None:
    plain = forward(tiny)
    with watched(tiny, tiny.self_layers(), attend):
        same = forward(tiny)
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("text", [True, False])
def test_editing_without_a_change_is_the_layer_s_own_answer(joint: Surrogate, text: bool) -> None:
    plain = forward(joint)
    with watched(joint, joint.cross_layers(), editing(lambda maps: maps, text=text)):
        same = forward(joint)
    torch.testing.assert_close(same, plain, rtol=0, atol=1e-5)


def test_edited_probabilities_mix_the_values() -> None:
    query, key, value = normal(3, 2, 4, 5, 8)
    attend = editing(lambda maps: maps.roll(1, 0), text=True, most=5)
    expected = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1).roll(1, 0) @ value
    torch.testing.assert_close(attend(query, key, value, 8**-0.5, EVERYTHING), expected)
    more = normal(2, 4, 6, 8)  # finer than it changes
    assert torch.equal(attend(more, key, value, 8**-0.5, EVERYTHING), fused(more, key, value, 8**-0.5, EVERYTHING))


@pytest.mark.parametrize("text", [True, False])
def test_an_edited_row_keeps_its_share_between_text_and_picture(text: bool) -> None:
    query, key = normal(2, 2, 4, 10, 8)
    eye = torch.eye(10).expand(2, 4, 10, 10)  # values that show the probabilities
    plain, seen = probabilities(query, key, 0.4), list[Tensor]()

    def edit(maps: Tensor) -> Tensor:
        seen.append(maps)
        return maps.flip(-1)

    mixed = editing(edit, text=text)(query, key, eye, 0.4, JOINT)
    changed, other = (slice(6, 10), slice(0, 6)) if text else (slice(0, 6), slice(6, 10))
    torch.testing.assert_close(seen[0].sum(-1), torch.ones(2, 4, 6))
    torch.testing.assert_close(mixed[:, :, :6, changed], plain[:, :, :6, changed].flip(-1))
    torch.testing.assert_close(mixed[:, :, :6, other], plain[:, :, :6, other])
    torch.testing.assert_close(mixed[:, :, 6:], plain[:, :, 6:])  # what the text reads


def test_shared_keys_and_values_are_those_of_the_first_entries() -> None:
    query, key, value = normal(3, 6, 4, 10, 8)
    mixed = sharing(2)(query, key, value, 0.3, JOINT)
    for entry in range(6):
        source = entry % 2
        keys, values = (torch.cat([tensor[source, :, :6], tensor[entry, :, 6:]], 1) for tensor in (key, value))
        expected = (0.3 * query[entry] @ keys.transpose(-1, -2)).softmax(-1) @ values
        torch.testing.assert_close(mixed[entry], expected)


def test_sharing_in_a_joint_transformer_leaves_the_source_and_moves_the_target(joint: Surrogate) -> None:
    prompts = ["a photo", "a red hat"]
    plain = forward(joint, prompts=prompts)
    with watched(joint, joint.self_layers(), sharing(1)):
        shared = forward(joint, prompts=prompts)
    torch.testing.assert_close(shared[0], plain[0], rtol=0, atol=1e-5)
    assert (shared[1] - plain[1]).abs().max() > 1e-4


def test_processors_come_back_after_an_error(tiny: Surrogate) -> None:
    before = processors(tiny)
    with pytest.raises(RuntimeError, match="stop"), record_attention(tiny, tiny.map_layers()):
        assert {name for name, value in processors(tiny).items() if isinstance(value, Watched)} == set(
            tiny.map_layers()
        )
        raise RuntimeError("stop")
    assert all(value is before[name] for name, value in processors(tiny).items())


def test_blocks_can_be_nested(tiny: Surrogate) -> None:
    plain, before, cross = forward(tiny), processors(tiny), tiny.cross_layers()
    maps, inner = list[Tensor](), list[Tensor]()
    with watched(tiny, cross, recording(maps)):
        with watched(tiny, tiny.self_layers(), sharing(2)), watched(tiny, cross[:3], recording(inner)):
            both = forward(tiny)
        assert len(maps) == len(cross) - 3 and len(inner) == 3  # the inner block's layers are its own
        maps.clear()
        forward(tiny)
    assert len(maps) == len(cross) and len(inner) == 3
    torch.testing.assert_close(both, plain, rtol=0, atol=1e-5)
    assert all(value is before[name] for name, value in processors(tiny).items())


def slopes(surrogate: Surrogate, recompute: bool) -> tuple[Tensor, ...]:
    """Gradients of an answer and of the maps that were read in it, with the processors back before they are taken."""
    embedding, z = surrogate.embed([""]), normal(1, surrogate.channels, 8, 8).requires_grad_()
    tokens = embedding.tokens.clone().requires_grad_()
    told = Embedding(tokens, embedding.pooled, embedding.guidance)
    with checkpointed(surrogate.denoiser, recompute):
        with record_attention(surrogate, surrogate.map_layers()) as maps:
            answer = surrogate.predict(z, surrogate.schedule.time(torch.tensor([0.3])), told)
        loss = answer.square().sum() + 100 * mean_map(maps)[..., 0].sum()
        return torch.autograd.grad(loss, [z, tokens])


def test_the_gradient_is_the_same_where_activations_are_recomputed(tiny: Surrogate) -> None:
    plain, recomputed = slopes(tiny, False), slopes(tiny, True)
    assert all(torch.equal(*pair) for pair in zip(plain, recomputed, strict=True))
    assert all(slope.isfinite().all() and slope.abs().max() > 0 for slope in plain)


def test_the_gradient_of_a_joint_transformer_is_the_same_where_activations_are_recomputed(joint: Surrogate) -> None:
    assert all(torch.equal(*pair) for pair in zip(slopes(joint, False), slopes(joint, True), strict=True))


def test_errors_name_the_remedy(tiny: Surrogate) -> None:
    with pytest.raises(ValueError, match=r"expected at least one attention map, got none; name layers"):
        mean_map([])
    named = pytest.raises(
        ValueError, match=r"expected cross-attention layers, got .*attn1.*; take some of cross_layers"
    )
    with named, record_attention(tiny, tiny.self_layers()):
        forward(tiny)
