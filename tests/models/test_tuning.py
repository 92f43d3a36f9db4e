import weakref
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Posterior, Surrogate
from antidiffusion.models.memory import low_memory
from antidiffusion.models.tuning import BUCKET, bucketed, constant, denoising, drawn, fit, tunable

OPTIONS = {"learning_rate": 0.1, "steps": 7}


def leaves() -> list[Tensor]:
    return [torch.tensor([3.0, -2.0, 0.5]), torch.tensor([[1.0, 4.0]])]


def quadratic(parameters: list[Tensor], generator: Generator) -> Tensor:
    """A loss with noise, so that the order of the draws matters too."""
    noise = torch.randn(3, generator=generator)
    return (parameters[0] - 1 + 0.1 * noise).square().sum() + (parameters[0].sum() * parameters[1]).square().mean()


def plain_adamw(parameters: list[Tensor], loss, seed: int, steps: int, learning_rate: float) -> list[float]:
    generator, optimizer = Generator().manual_seed(seed), torch.optim.AdamW(parameters, lr=learning_rate)
    values = []
    for parameter in parameters:
        parameter.requires_grad_()
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(generator)
        value.backward()
        optimizer.step()
        values.append(value.item())
    for parameter in parameters:
        parameter.requires_grad_(False).grad = None
    return values


def random_latents(count: int = 2) -> Tensor:
    return torch.randn(count, 4, 8, 8, generator=Generator().manual_seed(3))


def weights(surrogate: Surrogate) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in surrogate.denoiser.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def clean(parameters: list[Tensor]) -> bool:
    return not any(p.requires_grad or p.grad is not None or p._post_accumulate_grad_hooks for p in parameters)


def test_fit_is_adamw() -> None:
    ours, theirs = leaves(), leaves()
    values = list(fit(ours, lambda g: quadratic(ours, g), generator=Generator().manual_seed(0), **OPTIONS))
    assert values == pytest.approx(plain_adamw(theirs, lambda g: quadratic(theirs, g), 0, **OPTIONS), rel=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    assert values[-1] < values[0]
    assert clean(ours)


@pytest.mark.parametrize("lean", [False, True])
def test_full_tuning_is_adamw_on_every_weight(tiny: Surrogate, lean: bool) -> None:
    z = random_latents()  # two samplers: every weight is used twice in a step
    loss = denoising(tiny, [constant(z[:1]), constant(z[1:])], tiny.embed([""]))
    options: dict = {"steps": 2, "learning_rate": 1e-4}
    with tunable(tiny, "full") as (parameters, _):
        theirs, expected = plain_adamw(parameters, loss, 0, **options), weights(tiny)
    with low_memory(tiny) if lean else nullcontext(), tunable(tiny, "full") as (parameters, _):
        ours, got = list(fit(parameters, loss, generator=Generator().manual_seed(0), **options)), weights(tiny)
    assert ours == pytest.approx(theirs, rel=1e-5)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=5e-6)


@pytest.mark.parametrize("end", ["close", "error"])
def test_fit_cleans_up_when_it_ends_early(end: str) -> None:
    parameters = leaves()

    def loss(generator: Generator) -> Tensor:
        if end == "error" and values:
            raise RuntimeError("stop")
        return quadratic(parameters, generator)

    values: list[float] = []
    steps: Iterator[float] = fit(parameters, loss, generator=Generator(), **OPTIONS)
    values.append(next(steps))
    if end == "close":
        steps.close()
    else:
        with pytest.raises(RuntimeError, match="stop"):
            next(steps)
    assert clean(parameters)


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_weights_come_back(tiny: Surrogate, method: str, fails: bool) -> None:
    before, embedding = weights(tiny), tiny.embed([""])
    loss = denoising(tiny, [constant(random_latents())], embedding)
    arguments = (random_latents(), torch.tensor([5, 700]), embedding)
    answer = tiny.predict(*arguments)
    try:
        with tunable(tiny, method) as (parameters, learning_rate):
            options = {"steps": 3, "learning_rate": 100 * learning_rate, "generator": Generator().manual_seed(0)}
            list(fit(parameters, loss, **options))
            assert not torch.allclose(tiny.predict(*arguments), answer, rtol=0, atol=1e-6)
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert same(before, weights(tiny)) and torch.equal(tiny.predict(*arguments), answer)
    assert clean(list(tiny.denoiser.parameters()))


def test_adapters_start_at_zero_in_float32_and_depend_on_no_global_seed(sd15) -> None:
    surrogate = Surrogate.from_pretrained(str(sd15.folder), dtype=torch.bfloat16)
    before = weights(surrogate)
    arguments = (random_latents(), torch.tensor([5, 700]), surrogate.embed([""]))
    answer, starts = surrogate.predict(*arguments), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with tunable(surrogate, "auto") as (parameters, learning_rate):
            starts.append([parameter.clone() for parameter in parameters])
            assert learning_rate == pytest.approx(1e-4)
            assert {p.dtype for p in parameters} == {torch.float32} and {p.ndim for p in parameters} == {2}
            assert torch.equal(surrogate.predict(*arguments), answer)
        assert torch.equal(torch.get_rng_state(), state)
    assert len(starts[0]) == 2 * 4 * 32  # A and B of q, k, v and out in 2 attentions of 16 transformer blocks
    assert all(torch.equal(a, b) for a, b in zip(*starts, strict=True))
    assert same(before, weights(surrogate))


def test_adapters_of_a_joint_transformer_lower_the_loss_and_come_off(joint: Surrogate) -> None:
    z, before, embedding = (
        torch.randn(1, 16, 8, 8, generator=Generator().manual_seed(3)),
        weights(joint),
        joint.embed([""]),
    )
    n, t = joint.draw(z, Generator().manual_seed(1))
    with tunable(joint, "lora") as (parameters, _):
        options = {"steps": 8, "learning_rate": 1e-2, "generator": Generator().manual_seed(0)}
        losses = list(fit(parameters, lambda generator: joint.denoising_loss(z, n, t, embedding).mean(), **options))
    assert losses[-1] < losses[0]
    assert same(before, weights(joint)) and clean(list(joint.denoiser.parameters()))


def test_methods(tiny: Surrogate, sd15) -> None:
    with tunable(tiny, "auto") as (parameters, learning_rate):
        assert len(parameters) == len(list(tiny.denoiser.parameters())) and learning_rate == tiny.learning_rate
    unknown = pytest.raises(ValueError, match=r"expected full, lora or auto tuning, got 'dreambooth'")
    with unknown, tunable(tiny, "dreambooth"):
        pass
    half = Surrogate.from_pretrained(str(sd15.folder), dtype=torch.bfloat16)
    vanishing = pytest.raises(ValueError, match=r"expected float32 weights for full tuning, got torch.bfloat16; use")
    with vanishing, tunable(half, "full"):
        pass


def test_denoising_means_over_pictures_not_groups(tiny: Surrogate) -> None:
    z, embedding = random_latents(3), tiny.embed([""])
    value = denoising(tiny, [constant(z[:1]), constant(z[1:])], embedding)(Generator().manual_seed(0))
    generator, parts = Generator().manual_seed(0), []
    for group in (z[:1], z[1:]):
        parts.append(tiny.denoising_loss(group, *tiny.draw(group, generator), embedding))
    torch.testing.assert_close(value, torch.cat(parts).mean())


@pytest.mark.parametrize("batches", [1, 3])
def test_denoising_keeps_the_activations_of_one_batch_only(tiny: Surrogate, batches: int) -> None:
    embedding = tiny.embed([""])
    embedding.tokens.requires_grad_()
    loss = denoising(tiny, [constant(random_latents()) for _ in range(batches)], embedding)
    kept: list[weakref.ref[Tensor]] = []
    norm = tiny.denoiser.conv_norm_out  # whose backward pass needs its input
    with norm.register_forward_pre_hook(lambda module, inputs: kept.append(weakref.ref(inputs[0]))):
        value = loss(Generator().manual_seed(0))
        alive = [tensor() is not None for tensor in kept]
        value.backward()
    assert alive == ([True] if batches == 1 else [False] * batches)
    assert embedding.tokens.grad.abs().sum() > 0


def test_prompt_tuning_lowers_the_denoising_loss(mini: Surrogate, pixels) -> None:
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        posterior = mini.posterior(torch.nn.functional.interpolate(x, (96, 128)))
    embedding = mini.embed([""])

    @torch.no_grad()
    def evaluate() -> float:
        generator = Generator().manual_seed(1)
        z = posterior.sample(generator).expand(20, -1, -1, -1)
        n, _ = mini.draw(z, generator)
        return mini.denoising_loss(z, n, torch.arange(25, 1000, 50), embedding).mean().item()

    before = evaluate()
    loss = denoising(mini, [posterior.sample], embedding)
    list(fit([embedding.tokens], loss, steps=50, learning_rate=1e-2, generator=Generator().manual_seed(0)))
    assert evaluate() < 0.98 * before
    assert isinstance(embedding, Embedding) and clean([embedding.tokens])


def test_drawn_pictures_differ_within_a_step_and_between_steps() -> None:
    mean = torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 8, 8)
    sampler, generator = drawn(Posterior(mean, torch.zeros_like(mean)), 3), Generator().manual_seed(0)
    steps = [{int(row[0, 0, 0]) for row in sampler(generator)} for _ in range(40)]
    assert {len(step) for step in steps} == {3}
    assert set.union(*steps) == set(range(5))
    assert len(set(map(frozenset, steps))) > 5
    assert len(drawn(Posterior(mean, mean), 9)(generator)) == 5
    assert drawn(Posterior(mean, torch.ones_like(mean)), 9)(generator).std() > 1


def test_weights_that_a_loss_does_not_reach_stay_and_do_not_hold_the_others_back() -> None:
    parameters = leaves()
    kept, moved = parameters[1].clone(), parameters[0].clone()
    list(fit(parameters, lambda g: parameters[0].square().sum(), generator=Generator().manual_seed(0), **OPTIONS))
    assert torch.equal(parameters[1], kept) and (parameters[0] - moved).abs().min() > 0.5
    assert clean(parameters)


def test_buckets_are_runs_of_a_bounded_size() -> None:
    sizes = [BUCKET // 2, BUCKET // 2, 1, 2 * BUCKET, 3]
    buckets = list(bucketed([torch.empty(size, device="meta") for size in sizes]))
    assert [[parameter.numel() for parameter in bucket] for bucket in buckets] == [sizes[:2], [1], [2 * BUCKET], [3]]
    assert list(bucketed([])) == []
