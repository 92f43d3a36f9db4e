from typing import Any

import diffusers
import pytest
import torch
from diffusers_pipelines import pipeline
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.diffedit import DiffEdit, difference
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import denoise, invert, way_down

SOURCE, TARGET = "a portrait of a person", "a red hat"
PROMPTS = Prompts(TARGET, SOURCE)


def diffedit_pipeline(surrogate: Surrogate) -> Any:
    inverse = diffusers.DDIMInverseScheduler.from_config(dict(surrogate.schedule.scheduler))
    return pipeline(surrogate, "DiffEdit", inverse_scheduler=inverse)


def compare_masks(x: Tensor, surrogate: Surrogate) -> None:
    options: Any = {"num_inference_steps": 10, "num_maps_per_mask": 4, "guidance_scale": 3.0}
    prompts: Any = {"source_prompt": [SOURCE], "target_prompt": [TARGET]}
    theirs = diffedit_pipeline(surrogate).generate_mask(
        image=x, generator=Generator().manual_seed(5), **prompts, **options
    )
    t = way_down(surrogate, x.shape[-2], x.shape[-1], 10, 0.5)[0]
    texts = [surrogate.embed([text]) for text in (SOURCE, TARGET)]
    with torch.no_grad():
        posterior = surrogate.posterior(x)
    contrast = difference(posterior, t, *texts, surrogate, Generator().manual_seed(5), maps=4)
    ours, wanted = contrast[:, 0] > 1.5 * contrast.mean(), torch.from_numpy(theirs) > 0
    assert 0 < ours.float().mean() < 0.5
    assert (ours & wanted).sum() / (ours | wanted).sum() > 0.9


def test_masks_equal_diffusers(surrogate: Surrogate, x: Tensor) -> None:
    if len(surrogate.text_encoders) == 2:
        pytest.skip("diffusers' DiffEdit knows no SDXL")
    compare_masks(x[:1], surrogate)


def test_masks_equal_diffusers_with_the_embedded_model(mini: Surrogate, x: Tensor) -> None:
    compare_masks(x[:1], mini)


def test_inversion_equals_diffusers(surrogate: Surrogate, x: Tensor) -> None:
    if len(surrogate.text_encoders) == 2:
        pytest.skip("diffusers' DiffEdit knows no SDXL")
    options: Any = {"num_inference_steps": 5, "inpaint_strength": 0.6, "guidance_scale": 1.0}
    theirs = (
        diffedit_pipeline(surrogate).invert([SOURCE] * 2, x, generator=Generator().manual_seed(5), **options).latents
    )
    times = way_down(surrogate, 64, 64, 5, 0.6)
    with torch.no_grad():
        z = surrogate.encode(x, Generator().manual_seed(5))
    ours = invert(z, times, surrogate.embed([SOURCE]), surrogate)
    torch.testing.assert_close(ours[:-1].transpose(0, 1), theirs, rtol=1e-3, atol=1e-3)


def test_the_same_text_keeps_the_latents(surrogate: Surrogate, x: Tensor) -> None:
    generator, options = Generator().manual_seed(3), DiffEdit(steps=4, maps=2)
    with torch.no_grad():
        posterior = surrogate.posterior(x)
    difference(posterior, torch.tensor(9), *[surrogate.embed([SOURCE])] * 2, surrogate, generator, maps=2)  # draws
    expected = surrogate.decode(posterior.sample(generator))
    assert torch.equal(options(x, Prompts(SOURCE, SOURCE), surrogate, 3), expected)
    assert not torch.equal(options(x, PROMPTS, surrogate, 3), expected)


def test_a_mask_of_everything_redraws_the_inversion(tiny: Surrogate, x: Tensor) -> None:
    generator = Generator().manual_seed(3)
    times, texts = way_down(tiny, 64, 64, 4, 0.5), [tiny.embed([text]) for text in (SOURCE, TARGET)]
    with torch.no_grad():
        posterior = tiny.posterior(x)
    contrast = difference(posterior, torch.tensor(9), *texts, tiny, generator, maps=1)
    assert contrast.shape == (2, 1, 8, 8) and contrast.min() > 0
    noise = invert(posterior.sample(generator), times, texts[0], tiny)[0]
    expected = tiny.decode(denoise(noise, times, texts[1], tiny, guidance=3.0))
    edit = DiffEdit(strength=0.5, steps=4, maps=1, guidance=3.0, mask_threshold=1e-9)
    assert torch.equal(edit(x, PROMPTS, tiny, 3), expected)


def test_outside_the_mask_the_latents_come_back(tiny: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    final: list[Tensor] = []

    def decode(z: Tensor) -> Tensor:
        final.append(z)
        return x

    monkeypatch.setattr(tiny, "decode", decode)
    DiffEdit(steps=4, maps=2)(x, PROMPTS, tiny, 3)
    DiffEdit(steps=4, maps=2, mask_threshold=1e9)(x, PROMPTS, tiny, 3)
    kept = (final[0] == final[1]).all(1)
    assert all(0.3 < share < 1 for share in kept.float().mean((1, 2)))


def test_each_picture_has_its_own_threshold(tiny: Surrogate) -> None:
    x = torch.rand(2, 3, 64, 128, generator=Generator().manual_seed(0))
    edit = DiffEdit(steps=2, maps=1)
    first, same, other = (edit(x, Prompts([TARGET, SOURCE], [SOURCE, ""]), tiny, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.shape == x.shape and first.min() >= 0 and first.max() <= 1
    second = edit(x, Prompts([TARGET, ""], [SOURCE, ""]), tiny, 1)  # whose texts do not differ
    torch.testing.assert_close(first[0], second[0], rtol=1e-3, atol=1e-3)
    assert (first[1] - second[1]).abs().max() > 1e-3


def test_each_picture_has_its_own_draws(tiny: Surrogate, x: Tensor) -> None:
    texts, other = [tiny.embed([text]) for text in (SOURCE, TARGET)], torch.cat([x[:1], 1 - x[1:]])
    contrasts = []
    for pictures in (x, other):
        with torch.no_grad():
            posterior = tiny.posterior(pictures)
        contrasts.append(difference(posterior, torch.tensor(99), *texts, tiny, Generator().manual_seed(0), maps=2))
    torch.testing.assert_close(contrasts[0][0], contrasts[1][0], rtol=1e-3, atol=1e-6)
    assert (contrasts[0][1] / contrasts[1][1] - 1).abs().max() > 0.01


def test_progress_counts_maps_and_steps(tiny: Surrogate, x: Tensor) -> None:
    calls: list[tuple[str, int, int]] = []
    edit = DiffEdit(steps=5, strength=0.6, maps=2)
    edit(x, PROMPTS, tiny, 0, progress=lambda *call: calls.append(call))
    stages = ["comparing"] * 2 + ["inverting"] * 3 + ["drawing"] * 3
    assert calls == [(stage, done, 8) for done, stage in enumerate(stages, 1)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "expected at least 1 step, got 0"),
        ({"strength": 1.5}, r"expected a strength in \(0, 1\], got 1.5"),
        ({"mask_strength": 0}, r"expected a mask_strength in \(0, 1\], got 0"),
        ({"mask_threshold": 0}, "expected a positive mask_threshold, got 0"),
        ({"maps": 0}, "expected at least 1 map, got 0"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiffEdit(**options)


def test_impossible_sizes(tiny: Surrogate) -> None:
    with pytest.raises(ValueError, match="multiples of 64, got 100 x 64; resize"):
        DiffEdit()(torch.rand(1, 3, 64, 100), PROMPTS, tiny, 0)
