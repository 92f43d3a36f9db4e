"""The attacks on transformers: those that have a meaning there work, the others say so in a sentence."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Generator, Tensor

from antidiffusion.attacks import EDITS, TUNINGS
from antidiffusion.attacks.base import Attack, Prompts
from antidiffusion.attacks.dreambooth import DreamBooth
from antidiffusion.attacks.inpaint import Inpaint
from antidiffusion.attacks.lora import LoRA
from antidiffusion.attacks.masactrl import MasaCtrl
from antidiffusion.attacks.purify import diffpure, gridpure, vae_round_trip
from antidiffusion.attacks.tuned import Tuning
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import denoise, invert, sample, way_down

SOURCE, TARGET = "a photo of a person", "a photo of a person wearing a hat"
TUNED = "a photo of sks person"


@pytest.fixture
def mask() -> Tensor:
    found = torch.zeros(1, 1, 64, 64)
    found[..., 16:48, 8:40] = 1
    return found


def test_inpainting_is_diffusers(joint: Surrogate, x: Tensor, mask: Tensor) -> None:
    stock = joint.pipeline()
    pipeline = getattr(diffusers, type(stock).__name__.replace("Pipeline", "InpaintPipeline"))(**stock.components)
    pipeline.set_progress_bar_config(disable=True)
    options: Any = {"strength": 0.6, "num_inference_steps": 5, "guidance_scale": joint.guidance, "output_type": "pt"}
    options |= {"image": x[:1], "mask_image": mask, "height": 64, "width": 64}
    theirs = pipeline(TARGET, **options, generator=Generator().manual_seed(3)).images
    ours = Inpaint(strength=0.6, steps=5)(x[:1], Prompts(TARGET, mask=mask), joint, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sdedit", "inpaint", "diffedit", "masactrl"])
def test_edits_follow_their_text_and_seed(joint: Surrogate, x: Tensor, mask: Tensor, name: str) -> None:
    edit: Attack = replace(EDITS[name], steps=3)  # type: ignore[type-var]
    first, again, other, hat = (
        edit(x, Prompts(text, SOURCE, mask), joint, seed)
        for text, seed in ((SOURCE, 1), (SOURCE, 1), (SOURCE, 2), ("a red hat", 1))
    )
    assert first.shape == x.shape and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other) and not torch.equal(first, hat)


def test_masactrl_s_own_text_draws_the_source_and_another_stays_nearer_to_it(joint: Surrogate, x: Tensor) -> None:
    times, source = way_down(joint, 64, 64, 3), joint.embed([SOURCE])
    with torch.no_grad():
        z = joint.encode(x, Generator().manual_seed(3))
    plain = joint.decode(denoise(invert(z, times, source, joint)[0], times, source, joint, guidance=1))
    edit = MasaCtrl(steps=3, guidance=1.0, first_step=0, first_layer=0)
    torch.testing.assert_close(edit(x, Prompts(SOURCE, SOURCE), joint, 3), plain, rtol=1e-3, atol=1e-3)
    free = replace(edit, first_step=1.0)
    moved = [(one(x, Prompts("a red hat", SOURCE), joint, 3) - plain).abs().mean() for one in (edit, free)]
    assert 0 < moved[0] < moved[1]


@pytest.mark.parametrize("name", ["lora", "dreambooth"])
def test_tuning_lowers_the_loss_and_gives_the_model_back(joint: Surrogate, x: Tensor, name: str) -> None:
    before, rate = replace(joint).sha256, {"lora": 3e-3, "dreambooth": 1e-3}[name]
    attack: Tuning = replace(TUNINGS[name], steps=12, batch_size=2, learning_rate=rate, text_encoder=True)
    with attack.tuned(x, TUNED, joint, 0) as tuned:
        early, late = (sum(part) / 4 for part in (tuned.losses[:4], tuned.losses[-4:]))
        drawn = tuned.sample(TUNED, 0, steps=2)
    assert (tuned.steps, tuned.guidance) == (joint.steps, joint.guidance)
    assert late < early and drawn.shape == (1, 3, 64, 64) and drawn.isfinite().all()
    assert not torch.equal(drawn, sample([TUNED], joint, Generator().manual_seed(0), steps=2, size=(64, 64)))
    assert replace(joint).sha256 == before


def test_a_saved_dreambooth_is_the_model_that_was_tuned(joint: Surrogate, x: Tensor, tmp_path: Path) -> None:
    with DreamBooth(steps=1, learning_rate=1e-3).tuned(x, TUNED, joint, 0) as tuned:
        tuned.save(tmp_path / "model")
        expected = replace(joint).sha256
    again = Surrogate.from_pretrained(str(tmp_path / "model"))
    assert again.sha256 == expected != joint.sha256 and type(again) is type(joint)


def test_a_saved_lora_loads_in_diffusers_pipeline(joint: Surrogate, x: Tensor, tmp_path: Path) -> None:
    with LoRA(steps=2, learning_rate=1e-1).tuned(x, TUNED, joint, 0) as tuned:
        ours = tuned.sample(TUNED, 0, steps=2)
        tuned.save(tmp_path / "lora")
    pipeline = joint.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(tmp_path / "lora"))
    options: Any = {"num_inference_steps": 2, "guidance_scale": joint.guidance, "height": 64, "width": 64}
    theirs = pipeline(TUNED, **options, generator=Generator().manual_seed(0), output_type="pt").images
    pipeline.unload_lora_weights()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_model_that_knows_the_answer_gives_the_picture_back(
    joint: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = joint.posterior(x).mean

    def oracle(z_t: Tensor, t: Tensor, condition: object) -> Tensor:
        return (z_t - z) / t.view(-1, 1, 1, 1)

    monkeypatch.setattr(joint, "size", 128)  # one patch for the grid
    monkeypatch.setattr(joint, "predict", oracle)
    expected = vae_round_trip(x, joint, 0)
    torch.testing.assert_close(diffpure(x, joint, 0), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(gridpure(x, joint, 0), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (EDITS["prompt-to-prompt"], "expected a model of Stable Diffusion 1, 2 or XL to edit by words, got"),
        (TUNINGS["textual-inversion"], r"expected a model with one text encoder, got \d; use LoRA or DreamBooth"),
        (TUNINGS["custom-diffusion"], "expected a UNet, .*; use LoRA or DreamBooth"),
    ],
    ids=["prompt-to-prompt", "textual-inversion", "custom-diffusion"],
)
def test_what_has_no_meaning_there_is_refused(joint: Surrogate, x: Tensor, attack: Attack, message: str) -> None:
    before = replace(joint).sha256
    with pytest.raises(ValueError, match=message):
        attack(x, Prompts(TUNED, TUNED), joint, 0)
    assert replace(joint).sha256 == before
