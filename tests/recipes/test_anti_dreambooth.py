from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ascents import canvas, run
from torch import Tensor

from antidiffusion.models.base import Surrogate
from antidiffusion.recipes import ASPL, FSMG
from antidiffusion.recipes.anti_dreambooth import learner


def test_one_round_of_aspl_is_fsmg(tiny: Surrogate, pixels: np.ndarray) -> None:
    fsmg, aspl, untuned = (canvas(pixels) for _ in range(3))
    run(FSMG(steps=1, tuning_steps=1), tiny, fsmg)
    run(ASPL(rounds=1, steps=1, tuning_steps=1), tiny, aspl)
    run(FSMG(steps=1, tuning_steps=0), tiny, untuned)
    assert torch.equal(fsmg.delta, aspl.delta) and not torch.equal(fsmg.delta, untuned.delta)


def test_aspl_drops_the_copy_tuned_on_clean_pictures(tiny: Surrogate, pixels: np.ndarray) -> None:
    """AdamW's first step moves every weight by the learning rate: after a round it is one such step, not two."""
    before = [weight.clone() for weight in tiny.denoiser.parameters()]
    moved: list[float] = []

    def look(stage: str, done: int, total: int) -> None:
        pairs = zip(before, tiny.denoiser.parameters(), strict=True)
        moved.append(max((new - old).abs().max().item() for old, new in pairs) / 1e-4)

    run(
        ASPL(rounds=2, steps=1, tuning_steps=1, tuning="full"),
        replace(tiny, learning_rate=1e-4),
        canvas(pixels),
        progress=look,
    )
    # tuned copy, perturbation, tuned itself, second round's copy on top, perturbation, tuned itself
    assert [round(value) for value in moved] == [1, 1, 1, 2, 2, 2]
    assert moved[2] < 1.1


@pytest.mark.parametrize("method", ["full", "lora"])
def test_full_tuning_includes_the_text_encoder(tiny: Surrogate, method: str) -> None:
    text = list(tiny.text_encoders[0].parameters())
    before = [weight.clone() for weight in text]
    with learner(tiny, method) as (tuned, _):
        found = {id(weight) for weight in tuned}
        assert all(id(weight) in found for weight in text) == (method == "full")
        if method == "full":
            text[0].data += 1
    assert all(torch.equal(a, b) for a, b in zip(before, text, strict=True))


def test_the_tuned_text_encoder_embeds_the_prompt_of_the_ascent(
    tiny: Surrogate, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    fast = replace(tiny, learning_rate=1e-2)
    seen: list[Tensor] = []
    loss = Surrogate.denoising_loss

    def watched(self: Surrogate, z: Tensor, n: Tensor, t: Tensor, embedding: Any) -> Tensor:
        if not embedding.tokens.requires_grad:
            seen.append(embedding.tokens)
        return loss(self, z, n, t, embedding)

    monkeypatch.setattr(Surrogate, "denoising_loss", watched)
    run(ASPL(rounds=2, steps=1, tuning_steps=1), fast, canvas(pixels))
    untuned = tiny.embed(["a photo of sks person"]).tokens
    assert len(seen) == 2 and not any(torch.equal(tokens, untuned) for tokens in seen)
    assert not torch.equal(*seen)
