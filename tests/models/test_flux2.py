"""FLUX.2 klein, against diffusers' own pipeline."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ascents import PORTRAIT
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from klein_layout import build_pipeline
from torch import Generator, Tensor

from antidiffusion.attacks.lora import load_lora, save
from antidiffusion.models.attention import record_attention
from antidiffusion.models.base import Surrogate
from antidiffusion.models.flux2 import Flux2Klein, Flux2KleinDistilled
from antidiffusion.models.memory import low_memory
from antidiffusion.models.sampling import sample
from antidiffusion.models.tuning import adapted
from antidiffusion.pictures.picture import Picture
from antidiffusion.protection import protect
from antidiffusion.recipes import Attention, PhotoGuard

PROMPT = "a photo of a dog, running"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def load(root: Path, *, distilled: bool) -> Surrogate:
    build_pipeline(distilled=distilled).save_pretrained(root)
    return Surrogate.from_pretrained(str(root))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return load(tmp_path_factory.mktemp("base"), distilled=False)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return load(tmp_path_factory.mktemp("klein"), distilled=True)


def stock(surrogate: Surrogate) -> Any:
    pipeline = surrogate.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_folder_says_whether_it_is_distilled(base: Surrogate, klein: Surrogate) -> None:
    assert (type(base), base.guidance, base.steps) == (Flux2Klein, 4, 50)
    assert (type(klein), klein.guidance, klein.steps) == (Flux2KleinDistilled, 1, 4)
    assert [model.pipeline().config.is_distilled for model in (base, klein)] == [False, True]
    assert (klein.channels, klein.factor, klein.multiple, klein.positions(64, 48)) == (128, 16, 16, 12)


def test_the_autoencoder_is_never_in_float16(klein: Surrogate) -> None:
    half = Surrogate.from_pretrained(klein.name, dtype="float16")
    assert [next(module.parameters()).dtype for module in (half.vae, half.denoiser)] == [torch.float32, torch.float16]


def test_embeddings_are_diffusers_and_what_is_cut_off_is_said(klein: Surrogate) -> None:
    prompts = [PROMPT, "b" * 510 + "!"]
    with pytest.warns(UserWarning, match="b!'"):  # "user" and its marks stand before
        ours = klein.embed(prompts)
    assert torch.equal(ours.tokens, stock(klein).encode_prompt(prompts)[0])
    assert ours.tokens[0].std() > 0.1 and not torch.equal(ours.tokens[0], ours.tokens[1])


def test_latents_are_squares_normalised_by_the_batch_norm(klein: Surrogate, x: Tensor) -> None:
    pipeline, encoded = stock(klein), klein.vae.encode(2 * x - 1).latent_dist
    torch.testing.assert_close(klein.posterior(x).mean, pipeline._encode_vae_image(2 * x - 1, None), rtol=0, atol=1e-5)
    spread = klein.posterior(x).std * (klein.vae.bn.running_var + klein.vae.config.batch_norm_eps).sqrt()[:, None, None]
    torch.testing.assert_close(spread, Flux2KleinPipeline._patchify_latents(encoded.std), rtol=0, atol=1e-5)
    flat = klein.vae.decode(encoded.mean).sample / 2 + 0.5
    torch.testing.assert_close(klein.decode_with_gradient(klein.posterior(x).mean), flat, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("steps", "side"), [(4, 1024), (50, 1024), (4, 1088), (28, 256)])
def test_steps_are_the_pipelines(klein: Surrogate, steps: int, side: int) -> None:
    positions, scheduler = klein.positions(side, side), stock(klein).scheduler
    sigmas = torch.linspace(1, 1 / steps, steps, dtype=torch.float64).numpy()
    scheduler.set_timesteps(sigmas=sigmas, mu=compute_empirical_mu(positions, steps))
    torch.testing.assert_close(klein.schedule.times(steps, positions), scheduler.sigmas, rtol=0, atol=2e-7)


@pytest.mark.parametrize("kind", ["base", "klein"])
def test_text_to_image_is_diffusers(kind: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(kind)
    options = {"num_inference_steps": 2, "guidance_scale": model.guidance, "height": 64, "width": 48}
    theirs = stock(model)(prompt=PROMPT, **options, generator=Generator().manual_seed(3), output_type="pt").images
    ours = sample([PROMPT], model, Generator().manual_seed(3), steps=2, guidance=model.guidance, size=(64, 48))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert ours.std() > 0.01


def gradients(model: Surrogate, x: Tensor) -> list[Tensor]:
    leaf, told = x.clone().requires_grad_(), model.embed([PROMPT])
    told.tokens.requires_grad_()
    z = model.posterior(leaf).mean
    loss = model.denoising_loss(z, normal(*z.shape), torch.tensor([0.3, 0.8]), told).sum()
    return list(torch.autograd.grad(loss, [leaf, told.tokens]))


def test_gradients_reach_pixels_and_tokens_with_little_memory_too(klein: Surrogate, x: Tensor) -> None:
    plain = gradients(klein, x)
    assert all(gradient.isfinite().all() and (gradient != 0).float().mean() > 0.9 for gradient in plain)
    with low_memory(klein):  # one block at a time; a single one answers with a tensor, not a tuple
        again = gradients(klein, x)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)


def test_maps_are_the_text_s_share_of_the_joint_softmax(klein: Surrogate) -> None:
    z, t, told = normal(1, 128, 4, 3), torch.tensor([0.4]), klein.embed([PROMPT])
    plain = klein.predict(z, t, told)
    with record_attention(klein, klein.cross_layers()) as maps:
        watched = klein.predict(z, t, told)
    torch.testing.assert_close(watched, plain, rtol=0, atol=1e-5)
    assert [tuple(layer.shape) for layer in maps] == [(1, 2, 12, 512)] * 4  # double and single blocks
    for layer in maps:
        share = layer.sum(-1)
        assert layer.min() >= 0 and share.min() > 0 and share.max() < 1
    assert klein.map_layers() == ["transformer_blocks.0.attn.processor"]


@pytest.mark.parametrize("recipe", [PhotoGuard(steps=2), Attention(steps=2)])
def test_protecting(klein: Surrogate, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("antidiffusion.card.HELD_OUT_STEPS", 1)
    (protected,) = protect([Picture(PORTRAIT[:64, :64])], recipe, surrogate=klein)
    moved = abs(protected.picture.pixels.astype(int) - PORTRAIT[:64, :64]).max()
    assert 1 <= moved <= recipe.budget


def test_a_lora_made_here_loads_in_diffusers_and_the_reverse(klein: Surrogate, tmp_path: Path) -> None:
    z, t, told = normal(1, 128, 4, 4), torch.tensor([0.6]), klein.embed([PROMPT])
    before = klein.predict(z, t, told)
    with adapted(klein, 2, text_encoders=True) as adapters:
        for i, adapter in enumerate(adapters):
            adapter.data = 0.1 * normal(*adapter.shape, seed=i)
        ours = klein.predict(z, t, told)
        save(klein, tmp_path)
    assert len(adapters) == 2 * (2 * 4 + 2 * 2)  # A and B of four layers in a double block, two in a single one
    assert torch.equal(klein.predict(z, t, told), before) and (ours - before).abs().max() > 1e-3
    pipeline = stock(klein)
    pipeline.load_lora_weights(str(tmp_path))
    theirs = klein.predict(z, t, told)
    pipeline.unload_lora_weights()
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    with load_lora(klein, tmp_path):
        torch.testing.assert_close(klein.predict(z, t, told), ours, rtol=0, atol=1e-6)
