"""What all tuning attacks have in common."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stock import PORTRAIT, PROMPT
from torch import Generator, Tensor

import antidiffusion
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.custom_diffusion import CustomDiffusion
from antidiffusion.attacks.dreambooth import DreamBooth
from antidiffusion.attacks.lora import LoRA
from antidiffusion.attacks.textual_inversion import TextualInversion
from antidiffusion.attacks.tuned import Tuning
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import sample
from antidiffusion.progress import Progress, silent

SHORT: dict[str, Any] = {"steps": 2, "sampling_steps": 2, "guidance": 3.0, "learning_rate": 1e-2}
ATTACKS = [
    DreamBooth(**SHORT),
    DreamBooth(**SHORT, text_encoder=True, class_prompt="a photo of person", class_pictures=5),
    LoRA(**SHORT),
    TextualInversion(**SHORT),
    CustomDiffusion(**SHORT),
]


def name(attack: Tuning) -> str:
    return type(attack).__name__ + ("-prior" if getattr(attack, "class_prompt", None) else "")


every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=name)


def state(surrogate: Surrogate) -> dict[str, Tensor]:
    parts = enumerate(surrogate.modules)
    return {f"{i}.{key}": value.clone() for i, part in parts for key, value in part.state_dict().items()}


def assert_untouched(surrogate: Surrogate, before: dict[str, Tensor], tokenizers: list[Any]) -> None:
    after = state(surrogate)
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(ours is theirs for ours, theirs in zip(surrogate.tokenizers, tokenizers, strict=True))
    assert len(surrogate.tokenizers[0]) == surrogate.text_encoders[0].get_input_embeddings().num_embeddings
    parameters = [parameter for module in surrogate.modules for parameter in module.parameters()]
    assert not any(p.requires_grad or p.grad is not None or p._post_accumulate_grad_hooks for p in parameters)
    assert not surrogate.denoiser.is_gradient_checkpointing


def interrupt(after: int) -> Progress:
    def report(stage: str, done: int, total: int) -> None:
        if done > after:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize("attack", ATTACKS[1:], ids=name)
@pytest.mark.parametrize("end", ["error", "interrupt"])
def test_the_surrogate_comes_back_unchanged(tiny: Surrogate, x: Tensor, attack: Tuning, end: str) -> None:
    before, tokenizers = state(tiny), list(tiny.tokenizers)
    attack = replace(attack, gradient_checkpointing=True, steps=2 if end == "interrupt" else 1)
    report = interrupt(attack._steps_before(tiny)) if end == "interrupt" else silent
    stop = pytest.raises(KeyboardInterrupt if end == "interrupt" else RuntimeError)
    with stop, attack.tuned(x, PROMPT, tiny, 0, progress=report):
        raise RuntimeError("stop")
    assert_untouched(tiny, before, tokenizers)


@every_attack
def test_the_call_draws_with_the_tuned_model(tiny: Surrogate, x: Tensor, attack: Tuning) -> None:
    before, tokenizers = state(tiny), list(tiny.tokenizers)
    torch.manual_seed(1)
    random, calls = torch.get_rng_state(), list[tuple[int, int]]()
    prompts = Prompts([PORTRAIT, "a red hat"], [PROMPT])
    called = attack(x, prompts, tiny, 3, progress=lambda *call: calls.append(call[1:]))
    assert torch.equal(torch.get_rng_state(), random)
    assert_untouched(tiny, before, tokenizers)
    torch.manual_seed(2)  # has no influence
    with attack.tuned(x, PROMPT, tiny, 3) as tuned:
        drawn = tuned.sample(prompts.target, 3, steps=2, guidance=3.0)
        other = tuned.sample(PORTRAIT, 4, steps=2, guidance=3.0)
    untuned = sample(prompts.target, tiny, Generator().manual_seed(3), steps=2, guidance=3.0, size=(64, 64))
    assert torch.equal(called, drawn)
    assert called.shape == (2, 3, 64, 64)
    assert called.dtype == torch.float32
    assert 0 <= called.min() < called.max() <= 1
    assert not torch.equal(drawn[:1], other)
    assert (drawn - untuned).abs().max() > 1e-3
    assert len(tuned.losses) == 2
    class_steps = 4 if getattr(attack, "class_prompt", None) else 0  # 5 pictures, 4 together, 2 steps each
    assert calls == [(done, class_steps + 4) for done in range(1, class_steps + 5)]


@pytest.mark.parametrize("attack", ATTACKS[2:4], ids=name)
def test_the_seed_decides_the_tuning(tiny: Surrogate, x: Tensor, attack: Tuning) -> None:
    losses = []
    for seed in (1, 1, 2):
        with attack.tuned(x, PROMPT, tiny, seed) as tuned:
            losses.append(tuned.losses)
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


@pytest.mark.parametrize("attack", [ATTACKS[0], ATTACKS[2]], ids=name)
def test_gradient_checkpointing_changes_nothing(tiny: Surrogate, x: Tensor, attack: Tuning) -> None:
    losses, flags = [], []

    def report(stage: str, done: int, total: int) -> None:
        flags.append(tiny.denoiser.is_gradient_checkpointing)

    for checkpointing in (False, True):
        chosen = replace(attack, gradient_checkpointing=checkpointing, learning_rate=1e-4)
        with chosen.tuned(x, PROMPT, tiny, 0, progress=report) as tuned:
            losses.append(tuned.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert flags == [False, False, True, True]


@pytest.mark.parametrize(
    ("attack", "dtype"),
    [(ATTACKS[2], torch.bfloat16), (ATTACKS[2], torch.float16), (ATTACKS[3], torch.bfloat16)],
    ids=["LoRA-bfloat16", "LoRA-float16", "TextualInversion-bfloat16"],
)
def test_small_parameters_are_tuned_in_float32_on_half_precision(sd15, x: Tensor, attack: Tuning, dtype) -> None:
    half = Surrogate.from_pretrained(str(sd15.folder), dtype=dtype)
    before, tokenizers = state(half), list(half.tokenizers)
    z, t = torch.ones(1, 4, 8, 8), torch.tensor([500])
    untuned = half.predict(z, t, half.embed([PROMPT]))
    with replace(attack, gradient_checkpointing=True).tuned(x[:1], PROMPT, half, 0) as tuned:
        moved = half.predict(z, t, half.embed([PROMPT]))
    assert_untouched(half, before, tokenizers)
    assert torch.tensor(tuned.losses).isfinite().all()
    assert (moved - untuned).abs().max() > 0.01


def test_weights_in_half_precision_are_not_tuned(sd15, x: Tensor) -> None:
    half = Surrogate.from_pretrained(str(sd15.folder), dtype=torch.bfloat16)
    for attack in (ATTACKS[0], ATTACKS[-1]):
        with pytest.raises(ValueError, match=r"expected float32 weights for full tuning, got torch\.bfloat16; use"):
            attack(x[:1], Prompts(PORTRAIT, PROMPT), half, 0)


@pytest.mark.parametrize(
    ("attack", "rates"),
    [
        (DreamBooth(), (0.25, 0.5)),
        (LoRA(), (0.5, 0.25)),
        (CustomDiffusion(), (0.5, 0.25)),
    ],
    ids=["DreamBooth", "LoRA", "CustomDiffusion"],
)
def test_the_learning_rate_is_the_surrogates(tiny: Surrogate, x: Tensor, attack: Tuning, rates) -> None:
    """A step of AdamW moves a weight by the learning rate."""
    surrogate = replace(tiny, learning_rate=rates[0], lora_learning_rate=rates[1])
    attack = replace(attack, steps=1)
    with attack.tuned(x, PROMPT, surrogate, 0):
        weight = surrogate.denoiser.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_v
        weight = weight.lora_B["tuning"].weight if isinstance(attack, LoRA) else weight.weight
        moved = weight.detach().clone()
    start = 0 if isinstance(attack, LoRA) else weight
    rate = rates[0] if isinstance(attack, DreamBooth) else rates[1]
    assert (moved - start).abs().median() == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("attack", [ATTACKS[0], *ATTACKS[2:]], ids=name)
def test_tuning_teaches_the_embedded_model_the_pictures(mini: Surrogate, attack: Tuning) -> None:
    folder = Path(antidiffusion.__file__).parent / "mini" / "portraits"
    portrait = Image.open(folder / "1.png").convert("RGB").resize((64, 64))
    x = torch.tensor(np.asarray(portrait)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        z = mini.posterior(x).mean.expand(20, -1, -1, -1)
    n = torch.randn(z.shape, generator=Generator().manual_seed(1))

    @torch.no_grad()
    def evaluate() -> float:
        return mini.denoising_loss(z, n, torch.arange(25, 1000, 50), mini.embed([PROMPT])).mean().item()

    rate = 2e-2 if isinstance(attack, TextualInversion) else None
    before = evaluate()
    with replace(attack, steps=25, batch_size=1, learning_rate=rate).tuned(x, PROMPT, mini, 0):
        after = evaluate()
    assert after < (0.99 if isinstance(attack, TextualInversion) else 0.95) * before
    assert evaluate() == before


def test_nothing_is_drawn_or_saved_after_the_block(tiny: Surrogate, x: Tensor, tmp_path: Path) -> None:
    with ATTACKS[2].tuned(x, PROMPT, tiny, 0) as tuned:
        pass
    for use in (lambda: tuned.sample(PORTRAIT, 0), lambda: tuned.save(tmp_path)):
        with pytest.raises(RuntimeError, match="expected a tuned model, got one whose weights were restored; stay"):
            use()


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("steps", 0, "expected steps of at least 1, got 0"),
        ("batch_size", 0, "expected batch_size of at least 1, got 0"),
        ("sampling_steps", -1, "expected sampling_steps of at least 1, got -1"),
        ("learning_rate", 0.0, "expected a positive learning_rate, got 0.0; None"),
        ("learning_rate", float("nan"), "expected a positive learning_rate, got nan; None"),
    ],
)
@every_attack
def test_impossible_settings(attack: Tuning, setting: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(attack, **{setting: value})


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(0, 3, 64, 64), r"float32 pictures \(B, 3, H, W\), got torch.float32 \(0, 3, 64, 64\); stack"),
        (torch.zeros(3, 64, 64), r"float32 pictures \(B, 3, H, W\), got torch.float32 \(3, 64, 64\); stack"),
        (torch.zeros(1, 4, 64, 64), r"float32 pictures \(B, 3, H, W\), got torch.float32 \(1, 4, 64, 64\); stack"),
        (torch.zeros(1, 3, 64, 100), "multiples of 64, got 100 x 64; resize"),
        (torch.full((1, 3, 64, 64), 255.0), r"pixels in \[0, 1\], got 255 to 255; divide"),
        (torch.full((1, 3, 64, 64), torch.nan), r"pixels in \[0, 1\], got nan to nan"),
    ],
)
def test_impossible_pictures(tiny: Surrogate, x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ATTACKS[2](x, Prompts(PORTRAIT, PROMPT), tiny, 0)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (Prompts(PORTRAIT, [PROMPT, PROMPT]), "expected one source text that all pictures are tuned to, got 2"),
        (Prompts(PORTRAIT, []), "expected one source text that all pictures are tuned to, got 0"),
        (Prompts(PORTRAIT), "expected a text that the pictures are tuned to, got none; try"),
        (Prompts([], PROMPT), "expected at least one text to draw, got none; give"),
    ],
)
def test_impossible_texts(tiny: Surrogate, x: Tensor, prompts: Prompts, message: str) -> None:
    calls: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match=message):
        ATTACKS[2](x, prompts, tiny, 0, progress=lambda *call: calls.append(call[1:]))
    assert not calls  # found out before the long work
