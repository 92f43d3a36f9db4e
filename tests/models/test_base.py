import copy
from dataclasses import replace

import pytest
import torch
from conftest import Checkpoint
from torch import Tensor

from antidiffusion.models.base import Embedding, Surrogate, concatenate
from antidiffusion.models.schedule import PREDICTIONS, VP, Straight, noised, target


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_embeddings_are_cut_repeated_and_joined_with_all_their_parts() -> None:
    one = Embedding(normal(1, 5, 8), normal(1, 4), torch.tensor([3.5]))
    two = Embedding(normal(2, 5, 8, seed=1), normal(2, 4, seed=1), torch.tensor([1.0, 2.0]))
    joined = concatenate((one, 3), (two, 2))
    for part in ("tokens", "pooled", "guidance"):
        single, pair = getattr(one, part), getattr(two, part)
        assert torch.equal(getattr(joined, part), torch.cat([single, single, single, pair]))
        assert torch.equal(getattr(joined[3:], part), pair)
        assert torch.equal(getattr(one.expand(2), part), torch.cat([single, single]))
    bare = concatenate((Embedding(one.tokens), 1), (Embedding(two.tokens), 2))
    assert bare.pooled is None and bare.guidance is None and bare[:1].pooled is None


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_loss_of_an_exact_answer_is_zero(tiny: Surrogate, prediction: str, generator: torch.Generator) -> None:
    vp = VP({**tiny.schedule.scheduler, "prediction_type": "epsilon" if prediction == "flow" else prediction})
    exact = replace(tiny, schedule=Straight({}) if prediction == "flow" else vp)
    z = normal(2, 4, 8, 8)
    n, t = exact.draw(z, generator)
    asked, answer = [], target(exact.schedule, z, n, t)
    exact.predict = lambda z_t, t, embedding: asked.append(z_t) or answer
    assert torch.equal(exact.denoising_loss(z, n, t, tiny.embed([""])), torch.zeros(2))
    assert torch.equal(asked[0], noised(exact.schedule, z, n, t))
    exact.predict = lambda z_t, t, embedding: answer + torch.tensor([1, 2]).view(2, 1, 1, 1)
    torch.testing.assert_close(exact.denoising_loss(z, n, t, tiny.embed([""])), torch.tensor([1.0, 4.0]))


def test_draws_follow_the_generator(tiny: Surrogate) -> None:
    z = torch.zeros(4000, 1, 1, 1)
    (n, t), again, other = (tiny.draw(z, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(n, again[0]) and torch.equal(t, again[1]) and not torch.equal(t, other[1])
    assert t.dtype == torch.int64 and 0 <= t.min() < 10 and 990 <= t.max() < 1000
    assert abs(n.mean()) < 0.1 and abs(n.std() - 1) < 0.05


def test_latents_are_scaled_posterior_samples(tiny: Surrogate, x: Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        distribution, posterior = tiny.vae.encode(2 * x - 1).latent_dist, tiny.posterior(x)
        z = torch.stack([tiny.encode(x, generator) for _ in range(50)])
    factor = tiny.vae.config.scaling_factor
    torch.testing.assert_close(posterior.mean, factor * distribution.mean)
    torch.testing.assert_close(posterior.std, factor * distribution.std)
    deviations = (z - posterior.mean) / posterior.std
    assert abs(deviations.mean()) < 0.02 and abs(deviations.std() - 1) < 0.02


def test_latents_with_a_mean_and_a_deviation_of_each_channel_are_normalised(tiny: Surrogate, x: Tensor) -> None:
    plain, model = tiny.posterior(x), replace(tiny, vae=copy.deepcopy(tiny.vae))
    mean, std, factor = [0.5, -1.0, 0.0, 2.0], [2.0, 1.0, 0.5, 4.0], tiny.vae.config.scaling_factor
    model.vae.register_to_config(latents_mean=mean, latents_std=std)
    shift, scale = (torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std))
    found = model.posterior(x)
    torch.testing.assert_close(found.mean, (plain.mean / factor - shift) * factor / scale)
    torch.testing.assert_close(found.std, plain.std / scale)
    torch.testing.assert_close(model.decode(found.mean), tiny.decode(plain.mean))


def test_guidance_of_a_batch_leaves_entries_of_scale_1_unguided(tiny: Surrogate) -> None:
    z, t, embedding = normal(3, 4, 8, 8), torch.tensor(400), tiny.embed(["a hat", "a cat", "a car"])
    told, empty = (tiny.predict(z, t.expand(3), e) for e in (embedding, tiny.unconditional()))
    scale = torch.tensor([1.0, 5.0, 0.0])
    expected = empty + scale.view(3, 1, 1, 1) * (told - empty)
    torch.testing.assert_close(tiny.guided(embedding, scale, 3)(z, t), expected, rtol=1e-4, atol=1e-4)


def test_the_hash_tells_models_and_precisions_apart(mini: Surrogate, tiny: Surrogate, sd15: Checkpoint) -> None:
    changed = replace(tiny, denoiser=copy.deepcopy(tiny.denoiser))
    assert changed.sha256 == tiny.sha256
    nudged = replace(tiny, denoiser=copy.deepcopy(tiny.denoiser))
    nudged.denoiser.conv_in.bias[0] += 1e-3
    half = Surrogate.from_pretrained(str(sd15.folder), dtype=torch.bfloat16)
    assert len({mini.sha256, tiny.sha256, nudged.sha256, half.sha256}) == 4


def test_a_long_prompt_is_cut_with_a_warning_that_names_the_rest(surrogate: Surrogate) -> None:
    room = surrogate.tokenizers[0].model_max_length - 2
    prompt = " ".join(["red"] * room)
    assert len(surrogate.tokenizers[0](prompt).input_ids) == room + 2  # one token a word: as long as fits
    fits = surrogate.embed([prompt])
    with pytest.warns(UserWarning, match=rf"at most {room} tokens, got \d+; cut off: 'green hat'"):
        cut = surrogate.embed([f"{prompt} green hat"])
    assert torch.equal(fits.tokens, cut.tokens)


def test_convolutions_are_channels_last(tiny: Surrogate) -> None:
    for module in (tiny.denoiser, tiny.vae):
        weights = [weight for weight in module.parameters() if weight.ndim == 4]
        assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
