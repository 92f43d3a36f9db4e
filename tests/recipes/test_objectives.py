from dataclasses import replace

import pytest
import torch
from antidiffusion.objectives.denoising import Denoising, Mean, predicted_noise, with_slope
from antidiffusion.objectives.distillation import Distillation
from antidiffusion.objectives.editing import EditTarget
from antidiffusion.objectives.feature import DenoisingFeature, record_features
from antidiffusion.objectives.first_step import FirstStepNoise, RandomlyMasked, shrink
from antidiffusion.objectives.latent import Fused, LatentTarget
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.models.base import SUPPORTED, Embedding, NoiseSchedule, Surrogate


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def slope(objective, x: Tensor, seed: int = 0) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf, seeded(seed)).sum(), leaf)[0]


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


@pytest.fixture
def target() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=seeded(9))


def draws(surrogate: Surrogate, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return a sampled latent and noise, by diffusers' own calls."""
    posterior = surrogate.vae.encode(2 * x - 1).latent_dist
    z = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator)
    return surrogate.vae.config.scaling_factor * z, torch.randn(z.shape, generator=generator)


def ask(surrogate: Surrogate, z: Tensor, n: Tensor, t: Tensor, embedding: Embedding) -> Tensor:
    z_t = surrogate.scheduler.add_noise(z, n, t)
    return surrogate.unet(z_t, t, encoder_hidden_states=embedding.tokens.expand(len(z), -1, -1)).sample


def test_denoising_is_the_mean_squared_error_of_the_noise(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    generator = seeded()
    z, n = draws(tiny, x, generator)
    t = torch.randint(1000, (2,), generator=generator)
    expected = (ask(tiny, z, n, t, embedding) - n).square().mean((1, 2, 3))
    torch.testing.assert_close(Denoising(tiny, embedding)(x, seeded()), expected)


def test_mean_averages_values_and_gradients_over_consecutive_draws(
    tiny: Surrogate, x: Tensor, embedding: Embedding
) -> None:
    objective, generator, leaf = Denoising(tiny, embedding), seeded(), x.clone().requires_grad_()
    losses = torch.stack([objective(leaf, generator) for _ in range(3)]).mean(0)
    torch.testing.assert_close(Mean(objective, 3)(x, seeded()), losses)
    torch.testing.assert_close(Mean(objective, 3)(leaf, seeded()), losses)
    expected = torch.autograd.grad(losses.sum(), leaf)[0]
    torch.testing.assert_close(slope(Mean(objective, 3), x), expected, rtol=1e-3, atol=1e-7)


def test_with_slope() -> None:
    x, gradient = torch.rand(2, 3, requires_grad=True), torch.rand(2, 3)
    value = with_slope(torch.tensor([1.0, 2.0]), x, gradient)
    assert value.tolist() == [1, 2]
    assert torch.equal(torch.autograd.grad(value.sum(), x)[0], gradient)


@pytest.mark.parametrize("prediction", SUPPORTED)
def test_the_predicted_noise_of_a_perfect_model_is_the_noise(tiny: Surrogate, prediction: str) -> None:
    z, n = torch.randn(2, 2, 4, 8, 8, generator=seeded())
    t = torch.tensor([100, 700])
    if prediction == "flow_prediction":  # straight paths
        noise = torch.linspace(0.001, 0.999, 1000)
        schedule = NoiseSchedule(1 - noise, noise, prediction)
    else:
        schedule = replace(tiny.schedule, prediction=prediction)
    perfect = replace(tiny)
    perfect.schedule = schedule
    perfect.predict = lambda z_t, t, embedding: schedule.target(z, n, t)
    found = predicted_noise(perfect, schedule.add_noise(z, n, t), t, tiny.embed([""]))
    torch.testing.assert_close(found, n, rtol=1e-3, atol=1e-4)


def test_latent_target_is_the_distance_of_the_means(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    mean, goal = (tiny.vae.encode(2 * y - 1).latent_dist.mean for y in (x, target))
    expected = -(tiny.vae.config.scaling_factor * (mean - goal)).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(LatentTarget(tiny, target)(x, seeded()), expected)
    torch.testing.assert_close(LatentTarget(tiny, x)(x, seeded()), torch.zeros(2))


def test_fused_is_the_denoising_loss_less_the_weighted_distance(
    tiny: Surrogate, x: Tensor, target: Tensor, embedding: Embedding
) -> None:
    plain = Denoising(tiny, embedding)(x, seeded())
    z, _ = draws(tiny, x, seeded())
    goal = tiny.vae.config.scaling_factor * tiny.vae.encode(2 * target - 1).latent_dist.mean
    expected = plain - 3 * (z - goal).square().mean((1, 2, 3))
    torch.testing.assert_close(Fused(tiny, embedding, target, 3.0)(x, seeded()), expected)
    torch.testing.assert_close(Fused(tiny, embedding, target, 0.0)(x, seeded()), plain)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_distillation_pulls_the_error_back_through_the_encoder_only(
    tiny: Surrogate, x: Tensor, embedding: Embedding, sign: float
) -> None:
    leaf, generator = x.clone().requires_grad_(), seeded()
    z, n = draws(tiny, leaf, generator)
    t = torch.randint(1000, (2,), generator=generator)
    with torch.no_grad():
        error = ask(tiny, z, n, t, embedding) - n
    (expected,) = torch.autograd.grad(z, leaf, sign * error)
    watched: list[bool] = []
    hook = tiny.unet.register_forward_hook(lambda *_: watched.append(torch.is_grad_enabled()))
    objective = Distillation(tiny, embedding, sign)
    found = slope(objective, x)
    hook.remove()
    assert watched == [False]
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9999
    torch.testing.assert_close(objective(x, seeded()), sign * Denoising(tiny, embedding)(x, seeded()))


def test_features_are_the_last_block_s_residuals_and_the_hooks_go(tiny: Surrogate, embedding: Embedding) -> None:
    z, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([5])
    with record_features(tiny.unet) as features:
        tiny.predict(z, t, embedding)
    assert [tuple(feature.shape) for feature in features] == [(1, 32, 8, 8)] * 3
    tiny.predict(z, t, embedding)
    assert len(features) == 3


def test_denoising_feature_adds_the_weighted_shift(tiny: Surrogate, x: Tensor, embedding: Embedding) -> None:
    clean, steps = x.flip(0), [torch.tensor([7]), torch.tensor([400])]
    z, n = draws(tiny, x, seeded())
    t = torch.tensor([7, 400])
    expected = (ask(tiny, z, n, t, embedding) - n).square().mean((1, 2, 3))
    torch.testing.assert_close(DenoisingFeature(tiny, embedding, clean, steps, 0)(x, seeded()), expected)
    recorded: list[list[Tensor]] = []
    before = tiny.vae.config.scaling_factor * tiny.vae.encode(2 * clean - 1).latent_dist.mean
    for latent in (z, before):
        with record_features(tiny.unet) as features:
            ask(tiny, latent, n, t, embedding)
        recorded.append(list(features))
    shift = sum((a - b).square().mean((1, 2, 3)) for a, b in zip(*recorded, strict=True)) / 3
    assert (shift > 1e-6).all()
    found = DenoisingFeature(tiny, embedding, clean, steps, 10.0)(x, seeded())
    torch.testing.assert_close(found, expected + 10 * shift)


def test_denoising_feature_draws_from_the_steps_of_each_picture(
    tiny: Surrogate, x: Tensor, embedding: Embedding, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(
        type(tiny), "denoising_loss", lambda self, z, n, t, embedding: seen.append(t.tolist()) or torch.zeros(len(z))
    )
    objective = DenoisingFeature(tiny, embedding, x, [torch.arange(5), torch.arange(500, 503)], weight=0)
    generator = seeded()
    for _ in range(40):
        objective(x, generator)
    assert {first for first, _ in seen} == set(range(5))
    assert {second for _, second in seen} == {500, 501, 502}


def test_an_edit_without_noise_is_sdedit(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    embedding = tiny.embed(["a photo"])
    objective = EditTarget(tiny, embedding, target, strength=0.7, denoising_steps=4, eta=0.0)
    expected = SDEdit(strength=0.7, guidance=1.0, steps=6)(x, Prompts("a photo"), tiny, seed=3)
    with torch.no_grad():
        edited = objective.edit(x, seeded(3))
    torch.testing.assert_close(edited.clamp(0, 1), expected, rtol=1e-3, atol=1e-4)
    distance = 2 * (edited - target).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(objective(x, seeded(3)), -distance)


def test_the_gradient_passes_through_every_step_of_the_edit(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    objective = EditTarget(tiny, tiny.embed([""]), target, denoising_steps=3, eta=0.0)
    outputs: list[Tensor] = []
    hook = tiny.unet.register_forward_hook(lambda module, arguments, output: outputs.append(output.sample))
    leaf = x.clone().requires_grad_()
    loss = objective(leaf, seeded()).sum()
    hook.remove()
    gradients = torch.autograd.grad(loss, [leaf, *outputs])
    assert len(outputs) == 3 and all(gradient.abs().sum() > 0 for gradient in gradients)
    # a step along the gradient raises the objective by what the gradient says
    direction = gradients[0] / gradients[0].norm()
    with torch.no_grad():
        risen = (objective(x + 0.1 * direction, seeded()) - objective(x - 0.1 * direction, seeded())).sum() / 0.2
    assert risen == pytest.approx(gradients[0].norm().item(), rel=0.1)


def test_ddpm_noise_makes_edits_random(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    noisy, calm = (EditTarget(tiny, tiny.embed([""]), target, eta=eta) for eta in (1.0, 0.0))
    with torch.no_grad():
        assert not torch.allclose(noisy.edit(x, seeded()), calm.edit(x, seeded()))
        assert torch.equal(noisy.edit(x, seeded()), noisy.edit(x, seeded()))


def test_first_step_noise_is_the_norm_at_the_first_of_four_steps(
    tiny: Surrogate, x: Tensor, embedding: Embedding
) -> None:
    z, n = draws(tiny, x, seeded())
    expected = ask(tiny, z, n, torch.tensor([751, 751]), embedding).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(FirstStepNoise(tiny, embedding)(x, seeded()), expected)


def disc(side: int = 64, radius: float = 20) -> Tensor:
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return ((x - side / 2) ** 2 + (y - side / 2) ** 2 < radius**2).float()[None, None]


def test_random_masks_lie_inside_and_vary() -> None:
    mask = disc()
    areas = []
    for seed in range(30):
        smaller = shrink(mask, seeded(seed))
        assert set(smaller.unique().tolist()) == {0, 1} and (smaller <= mask).all()
        assert torch.equal(shrink(mask, seeded(seed)), smaller)
        areas.append((smaller.sum() / mask.sum()).item())
    assert 0.1 < min(areas) < 0.5 < max(areas) < 1  # 0.22 to 0.95 on the author's machine
    assert len(set(areas)) > 20


@pytest.mark.parametrize("radius", [1.0, 3.0])
def test_a_small_mask_is_never_emptied(radius: float) -> None:
    assert all(shrink(disc(radius=radius), seeded(seed)).any() for seed in range(20))
    assert not shrink(torch.zeros(1, 1, 8, 8), seeded()).any()


def test_a_masked_objective_does_not_see_the_rest(x: Tensor) -> None:
    seen: list[Tensor] = []

    def total(y: Tensor, generator: Generator) -> Tensor:
        seen.append(y.detach())
        return y.sum((1, 2, 3))

    gradient = slope(RandomlyMasked(total, disc()), x, seed=4)
    mask = shrink(disc(), seeded(4)).expand_as(x)
    assert torch.equal(gradient, mask)
    torch.testing.assert_close(seen[0], torch.where(mask > 0, x, torch.full_like(x, 0.5)))
