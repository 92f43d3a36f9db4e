"""What holds for every joint transformer, against diffusers' own pipelines."""

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.lora import load_lora, save
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.models.attention import record_attention
from antidiffusion.models.base import Surrogate
from antidiffusion.models.memory import checkpointed
from antidiffusion.models.sampling import denoise, invert, sample
from antidiffusion.models.schedule import step
from antidiffusion.models.sd3 import StableDiffusion3
from antidiffusion.models.tuning import adapted

PROMPT = "a photo of a dog, running"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def stock(surrogate: Surrogate, kind: str = "") -> Any:
    """diffusers' text-to-image pipeline of the surrogate, or its image-to-image one."""
    pipeline = surrogate.pipeline()
    if kind:
        name = type(pipeline).__name__.replace("Pipeline", f"{kind}Pipeline")
        pipeline = getattr(diffusers, name)(**pipeline.components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_embeddings_are_diffusers(joint: Surrogate) -> None:
    prompts = [PROMPT, "b" * 300]
    three = isinstance(joint, StableDiffusion3)
    with pytest.warns(UserWarning, match="cut off") if three else nullcontext():
        ours = joint.embed(prompts)
    if three:
        tokens, _, pooled, _ = stock(joint).encode_prompt(prompts, None, None)
    else:
        pooled, tokens = (stock(joint).encode_prompt(prompts, None)[i] for i in (1, 0))
    assert torch.equal(ours.tokens, tokens) and torch.equal(ours.pooled, pooled)


@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("side", [256, 1024])
def test_steps_are_the_schedulers(joint: Surrogate, steps: int, side: int) -> None:
    """Sigmas with their shift, and Euler's step, for answers that are anything."""
    pipeline = stock(joint)
    scheduler, options = pipeline.scheduler, {}
    positions = joint.positions(side, side)
    if scheduler.config.use_dynamic_shifting:
        options["mu"] = diffusers.pipelines.flux.pipeline_flux.calculate_shift(positions, 256, 4096, 0.5, 1.15)
    if type(pipeline) is diffusers.FluxPipeline:
        options["sigmas"] = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
    scheduler.set_timesteps(steps, **options)
    times = joint.schedule.times(steps, positions)
    torch.testing.assert_close(times, scheduler.sigmas, rtol=0, atol=2e-7)
    ours = theirs = normal(1, 16, 4, 4)
    for i, (t, s) in enumerate(pairwise(times)):
        answer = normal(1, 16, 4, 4, seed=i + 1)
        ours = step(joint.schedule, ours, answer, t, s)
        theirs = scheduler.step(answer, scheduler.timesteps[i], theirs).prev_sample
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_an_edit_leaves_out_the_steps_that_diffusers_leaves_out(joint: Surrogate) -> None:
    pipeline = stock(joint, "Img2Img")
    for steps in (4, 10, 28):
        pipeline.scheduler.set_timesteps(
            steps, **({"mu": 1.0} if joint.schedule.scheduler["use_dynamic_shifting"] else {})
        )
        for strength in (0.01, 0.3, 0.55, 0.7, 1.0):
            _, left = pipeline.get_timesteps(steps, strength, "cpu")
            assert steps - joint.schedule.first(steps, strength) == left


def test_text_to_image_is_diffusers(joint: Surrogate) -> None:
    options = {"num_inference_steps": 3, "guidance_scale": joint.guidance, "height": 64, "width": 48}
    theirs = stock(joint)(PROMPT, **options, generator=Generator().manual_seed(3), output_type="pt").images
    ours = sample([PROMPT], joint, Generator().manual_seed(3), steps=3, guidance=joint.guidance, size=(64, 48))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_sdedit_is_diffusers(joint: Surrogate, x: Tensor) -> None:
    options = {"strength": 0.55, "num_inference_steps": 4, "guidance_scale": joint.guidance}
    image = x[:1, :, :, :48]
    theirs = stock(joint, "Img2Img")(
        PROMPT, image=image, height=64, width=48, **options, generator=Generator().manual_seed(3), output_type="pt"
    ).images
    ours = SDEdit(strength=0.55, steps=4, guidance=joint.guidance)(image, Prompts(PROMPT), joint, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_an_inversion_is_undone_where_the_answers_are_the_same(joint: Surrogate) -> None:
    """Up and down by the same answers come back; the model's differ a little from step to step."""
    z, embedding = normal(1, 16, 8, 8), joint.embed([PROMPT])
    times = joint.schedule.times(40, 16)[-8:]
    up = invert(z, times, embedding, joint)
    down = denoise(up[0], times, embedding, joint, guidance=1)
    assert (up[0] - z).abs().mean() > 10 * (down - z).abs().mean()


def test_a_lora_made_here_loads_in_diffusers_and_the_reverse(joint: Surrogate, tmp_path: Path) -> None:
    z, t, embedding = normal(1, 16, 8, 8), torch.tensor([0.6]), joint.embed([PROMPT])
    before = joint.predict(z, t, embedding)
    with adapted(joint, 2, text_encoders=True) as adapters:
        for i, adapter in enumerate(adapters):
            adapter.data = 0.1 * normal(*adapter.shape, seed=i)
        told = joint.embed([PROMPT])
        ours = joint.predict(z, t, told)
        save(joint, tmp_path)
    assert torch.equal(joint.predict(z, t, embedding), before) and (ours - before).abs().max() > 1e-3
    pipeline = stock(joint)
    pipeline.load_lora_weights(str(tmp_path))  # diffusers' own loader, with the surrogate's modules in it
    theirs, again = joint.predict(z, t, joint.embed([PROMPT])), joint.embed([PROMPT])
    pipeline.unload_lora_weights()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(again.pooled, told.pooled, rtol=0, atol=1e-6)
    with load_lora(joint, tmp_path):
        torch.testing.assert_close(joint.predict(z, t, told), ours, rtol=0, atol=1e-6)
    assert torch.equal(joint.predict(z, t, embedding), before)


def test_a_lora_reaches_every_layer_that_diffusers_scripts_adapt(joint: Surrogate) -> None:
    joints = [name.removesuffix(".processor") for name in joint.cross_layers() if not name.startswith("single")]
    with adapted(joint, 2):
        found = {name.split(".lora_A")[0] for name, _ in joint.denoiser.named_modules() if name.endswith(".lora_A")}
    for layer in joints:
        assert {f"{layer}.{part}" for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")} <= found
    assert not any("attn2" in name or "norm" in name for name in found)


def test_maps_are_the_joint_softmax(joint: Surrogate) -> None:
    """Against its definition from the layer's own projections, norms and rotary embedding."""
    from diffusers.models.embeddings import apply_rotary_emb

    layer = joint.map_layers()[0].removesuffix(".processor")
    attention = joint.denoiser.get_submodule(layer)
    seen: dict[str, Any] = {}
    handle = attention.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    z, embedding = normal(1, 16, 8, 6), joint.embed([PROMPT])
    with record_attention(joint, joint.map_layers()) as maps:
        watched = joint.predict(z, torch.tensor([0.4]), embedding)
    handle.remove()
    torch.testing.assert_close(watched, joint.predict(z, torch.tensor([0.4]), embedding), rtol=0, atol=1e-5)
    kept = []
    for picture, text in (("q", "add_q_proj"), ("k", "add_k_proj")):
        streams = []
        for states, name, norm in (
            (seen["hidden_states"], f"to_{picture}", f"norm_{picture}"),
            (seen["encoder_hidden_states"], text, f"norm_added_{picture}"),
        ):
            heads = getattr(attention, name)(states).unflatten(-1, (attention.heads, -1))
            norm = getattr(attention, norm)
            streams.append(heads if norm is None else norm(heads))
        rotary = seen.get("image_rotary_emb")
        both = torch.cat(streams[::-1] if rotary else streams, 1)
        kept.append((apply_rotary_emb(both, rotary, sequence_dim=1) if rotary else both).transpose(1, 2))
    query, key = kept
    mass = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
    text = slice(0, embedding.tokens.shape[1]) if seen.get("image_rotary_emb") else slice(12, None)
    picture = slice(embedding.tokens.shape[1], None) if seen.get("image_rotary_emb") else slice(0, 12)
    torch.testing.assert_close(maps[0], mass[:, :, picture, text], rtol=0, atol=1e-6)


def loss(joint: Surrogate, x: Tensor, tokens: Tensor) -> Tensor:
    embedding = joint.embed([PROMPT])
    z = joint.posterior(x).mean
    return joint.denoising_loss(
        z, normal(*z.shape), torch.tensor([0.3, 0.8]), type(embedding)(tokens, embedding.pooled, embedding.guidance)
    ).sum()


def gradients(joint: Surrogate, x: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_(), joint.embed([PROMPT]).tokens.clone().requires_grad_()]
    return list(torch.autograd.grad(loss(joint, *leaves), leaves))


def test_gradients_reach_pixels_and_tokens_recomputed_or_not(joint: Surrogate, x: Tensor) -> None:
    plain = gradients(joint, x)
    if len(joint.text_encoders) == 2 and isinstance(joint, StableDiffusion3):  # T5 is absent: its zeros stay zeros
        assert not plain[1][:, 32:].any()
        plain[1] = plain[1][:, :32]
    assert all(torch.isfinite(gradient).all() and (gradient != 0).float().mean() > 0.9 for gradient in plain)
    with checkpointed(joint.denoiser, True):
        again = gradients(joint, x)
    assert all(torch.equal(a, b[:, : a.shape[1]]) for a, b in zip(plain, again, strict=True))


def test_bfloat16_points_the_same_way(joint: Surrogate, x: Tensor) -> None:
    plain = gradients(joint, x)[0]
    joint.autocast = torch.bfloat16
    try:
        half = gradients(joint, x)[0]
    finally:
        joint.autocast = None
    assert half.dtype == torch.float32
    assert torch.cosine_similarity(plain.flatten(), half.flatten(), 0) > 0.98


def test_words_and_features_are_refused_in_a_sentence(joint: Surrogate) -> None:
    with pytest.raises(ValueError, match="to edit by words"):
        joint.words(PROMPT)
    with pytest.raises(ValueError, match="with a UNet for its features"):
        joint.features()
