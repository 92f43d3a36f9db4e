from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ascents import ask, canvas, draws, run, seeded
from torch import Generator, Tensor

import antidiffusion.recipes.simac
from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.recipes import PERTURBATION, SimAC
from antidiffusion.recipes.objectives import Denoising
from antidiffusion.recipes.simac import SELECTION, DenoisingFeature, record_features

SHORT = SimAC(rounds=1, steps=1, tuning_steps=0, selection_steps=1, candidates=2)


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


def test_features_are_the_last_block_s_residuals_and_the_hooks_go(tiny: Surrogate, embedding: Embedding) -> None:
    z, t = torch.randn(1, 4, 8, 8, generator=seeded()), torch.tensor([5])
    with record_features(tiny.features()) as features:
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
        with record_features(tiny.features()) as features:
            ask(tiny, latent, n, t, embedding)
        recorded.append(list(features))
    shift = sum((a - b).square().mean((1, 2, 3)) for a, b in zip(*recorded, strict=True)) / 3
    assert (shift > 1e-6).all()
    found = DenoisingFeature(tiny, embedding, clean, steps, 10.0)(x, seeded())
    torch.testing.assert_close(found, expected + 10 * shift)


def test_simac_keeps_the_steps_with_large_gradients(
    tiny: Surrogate, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def falling(objective: Denoising, x: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        asked.append(int(objective.draw.times[0]))
        return torch.full_like(x, 1000 - asked[-1]), torch.tensor([1000.0 - asked[-1]])

    monkeypatch.setattr(antidiffusion.recipes.simac, "gradient", falling)
    recipe, left, one = SimAC(), torch.ones(1000, dtype=torch.bool), canvas(pixels)
    losses = list(recipe._search(left, one, tiny, tiny.embed([""]), Generator().manual_seed(0)))
    kept = left.nonzero()[:, 0]
    assert 60 <= len(kept) <= 100 and kept.float().mean() < 200
    assert (900 / 40) <= len(losses) < 50
    assert losses[0] == 1000 - min(asked[:5]) and asked[5] == min(asked[:5])
    assert one.delta.abs().max() == 0  # the trial copy moves, the picture does not


def test_simac_perturbs_at_the_chosen_steps_only(
    tiny: Surrogate, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Sequence[Tensor]] = []

    def watched(*arguments: Any, **options: Any) -> DenoisingFeature:
        objective = DenoisingFeature(*arguments, **options)
        if objective.weight:
            built.append(objective.times)
        return objective

    monkeypatch.setattr(antidiffusion.recipes.simac, "DenoisingFeature", watched)
    recipe = SHORT
    trace = run(recipe, tiny, canvas(pixels), canvas(pixels))
    ((first, second),) = built
    assert 940 <= len(first) <= 980 and 940 <= len(second) <= 980 and not torch.equal(first, second)
    assert {stage: len(values) for stage, values in trace.losses.items()} == {SELECTION: 2, PERTURBATION: 1}


def test_the_total_follows_a_search_that_ends_early(tiny: Surrogate, pixels: np.ndarray) -> None:
    totals: list[int] = []
    run(
        replace(SHORT, selection_steps=30, neighbourhood=480),
        tiny,
        canvas(pixels),
        progress=lambda stage, done, total: totals.append(total),
    )
    assert totals[0] > totals[-1] == len(totals)
