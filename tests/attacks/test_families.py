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
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import denoise, invert, way_down
from antidiffusion.models.sd3 import StableDiffusion3

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
    if three := isinstance(joint, StableDiffusion3):  # whose pipeline forgets the autoencoder's shift at the end
        options["output_type"] = "latent"
    theirs = pipeline(TARGET, **options, generator=Generator().manual_seed(3)).images
    theirs = joint.decode(theirs) if three else theirs
    ours = Inpaint(strength=0.6, steps=5)(x[:1], Prompts(TARGET, mask=mask), joint, 3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sdedit", "inpaint", "diffedit", "masactrl"])
def test_edits_follow_their_text_and_seed(joint: Surrogate, x: Tensor, mask: Tensor, name: str) -> None:
    options: Any = {"mask_threshold": 0.9, "maps": 1} if name == "diffedit" else {}
    edit: Attack = replace(EDITS[name], steps=2, **options)  # type: ignore[type-var]
    edits = [
        edit(x[:1], Prompts(text, SOURCE, mask), joint, seed) for text, seed in ((TARGET, 1), (TARGET, 2), ("", 1))
    ]
    assert edits[0].shape == (1, 3, 64, 64) and edits[0].min() >= 0 and edits[0].max() <= 1
    assert not torch.equal(edits[0], edits[1]) and not torch.equal(edits[0], edits[2])


def test_masactrl_s_own_text_draws_the_source(joint: Surrogate, x: Tensor) -> None:
    times, source = way_down(joint, 64, 64, 2), joint.embed([SOURCE])
    with torch.no_grad():
        z = joint.encode(x[:1], Generator().manual_seed(3))
    plain = joint.decode(denoise(invert(z, times, source, joint)[0], times, source, joint, guidance=1))
    edit = MasaCtrl(steps=2, guidance=1.0, first_step=0, first_layer=0)
    torch.testing.assert_close(edit(x[:1], Prompts(SOURCE, SOURCE), joint, 3), plain, rtol=1e-3, atol=1e-3)
    shared, free = (one(x[:1], Prompts("a red hat", SOURCE), joint, 3) for one in (edit, replace(edit, first_step=1.0)))
    assert (shared - free).abs().max() > 1e-3


def test_a_dreambooth_lowers_the_loss_and_is_saved_and_undone(joint: Surrogate, x: Tensor, tmp_path: Path) -> None:
    before = replace(joint).sha256
    attack = DreamBooth(steps=8, learning_rate=1e-3, text_encoder=True)
    with attack.tuned(x[:1], TUNED, joint, 0) as tuned:
        tuned.save(tmp_path / "model")
        expected = replace(joint).sha256
    assert (tuned.steps, tuned.guidance) == (joint.steps, joint.guidance)
    assert sum(tuned.losses[-4:]) < sum(tuned.losses[:4])
    again = Surrogate.from_pretrained(str(tmp_path / "model"))
    assert again.sha256 == expected != before and type(again) is type(joint)
    assert replace(joint).sha256 == before


def test_a_lora_lowers_the_loss_and_is_loaded_by_diffusers(joint: Surrogate, x: Tensor, tmp_path: Path) -> None:
    before = replace(joint).sha256
    with LoRA(steps=8, learning_rate=1e-2).tuned(x[:1], TUNED, joint, 0) as tuned:
        ours = tuned.sample(TUNED, 0, steps=2)
        tuned.save(tmp_path / "lora")
    assert sum(tuned.losses[-4:]) < sum(tuned.losses[:4]) and replace(joint).sha256 == before
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
    x = x[:1]
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
