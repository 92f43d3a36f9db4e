from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import antidiffusion.attacks.masactrl
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.masactrl import MasaCtrl
from antidiffusion.models.attention import Attend, Watched, sharing
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import denoise, invert, way_down

SOURCE, TARGET = "a portrait of a person", "a portrait of a person wearing a hat"
PROMPTS = Prompts(TARGET, SOURCE)


def plain(x: Tensor, surrogate: Surrogate, prompts: Prompts, steps: int, guidance: float) -> Tensor:
    """Invert with the source and denoise with the target, without any control."""
    times = way_down(surrogate, x.shape[-2], x.shape[-1], steps)
    source, target = surrogate.embed([str(prompts.source)]), surrogate.embed([str(prompts.target)])
    with torch.no_grad():
        z = surrogate.encode(x, Generator().manual_seed(3))
    noise = invert(z, times, source, surrogate)[0]
    return surrogate.decode(denoise(noise, times, target, surrogate, guidance=guidance))


@pytest.mark.parametrize("share", [{"first_step": 1.0}, {"first_layer": 1.0}])
def test_without_controlled_steps_or_layers_it_is_plain(surrogate: Surrogate, x: Tensor, share: dict[str, Any]) -> None:
    expected = plain(x, surrogate, PROMPTS, 3, 4.0)
    ours = MasaCtrl(steps=3, guidance=4.0, **share)(x, PROMPTS, surrogate, 3)
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    controlled = MasaCtrl(steps=3, guidance=4.0)(x, PROMPTS, surrogate, 3)
    assert (controlled - expected).abs().max() > 2e-3


def test_the_source_s_own_text_draws_the_source(surrogate: Surrogate, x: Tensor) -> None:
    prompts = Prompts(SOURCE, SOURCE)
    expected = plain(x, surrogate, prompts, 3, 1.0)
    ours = MasaCtrl(steps=3, guidance=1.0, first_step=0, first_layer=0)(x, prompts, surrogate, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("guidance", "batch"), [(1.0, 4), (4.0, 6)])
def test_the_paper_s_layers_in_the_paper_s_steps(
    tiny: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch, guidance: float, batch: int
) -> None:
    batches, named = list[int](), list[str]()
    watched = antidiffusion.attacks.masactrl.watched

    def counted(count: int) -> Attend:
        def attend(query: Tensor, *rest: Any) -> Tensor:
            batches.append(len(query))
            return sharing(count)(query, *rest)

        return attend

    def spied(surrogate: Surrogate, layers: list[str], attend: Attend) -> Any:
        named.extend(layers)
        return watched(surrogate, layers, attend)

    monkeypatch.setattr(antidiffusion.attacks.masactrl, "sharing", counted)
    monkeypatch.setattr(antidiffusion.attacks.masactrl, "watched", spied)
    MasaCtrl(steps=5, first_step=0.4, guidance=guidance)(x, PROMPTS, tiny, 0)
    assert len(named) == 6 and {name[:12] for name in named} == {"up_blocks.2.", "up_blocks.3."}
    assert batches == [batch] * (6 * 3)


def test_the_seed_decides_and_a_batch_does_not(tiny: Surrogate) -> None:
    x = torch.rand(2, 3, 64, 128, generator=Generator().manual_seed(0))
    edit = MasaCtrl(steps=2)
    prompts = Prompts([TARGET, "a red hat"], [SOURCE, ""])
    first, same, other = (edit(x, prompts, tiny, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.shape == x.shape and first.min() >= 0 and first.max() <= 1
    torch.testing.assert_close(edit(x[:1], PROMPTS, tiny, 1), first[:1], rtol=1e-3, atol=1e-3)


def test_processors_come_back_after_an_error(tiny: Surrogate, x: Tensor) -> None:
    before = tiny.denoiser.attn_processors

    def stop(stage: str, done: int, total: int) -> None:
        if done == 3:
            assert any(isinstance(value, Watched) for value in tiny.denoiser.attn_processors.values())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        MasaCtrl(steps=2, first_step=0)(x, PROMPTS, tiny, 0, progress=stop)
    assert all(value is before[name] for name, value in tiny.denoiser.attn_processors.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "expected at least 1 step, got 0"),
        ({"first_step": 4}, r"expected first_step in \[0, 1\], got 4"),
        ({"first_layer": -0.1}, r"expected first_layer in \[0, 1\], got -0.1"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MasaCtrl(**options)


def test_impossible_calls(tiny: Surrogate, x: Tensor) -> None:
    with pytest.raises(ValueError, match="multiples of 64, got 100 x 64; resize"):
        MasaCtrl()(torch.rand(1, 3, 64, 100), PROMPTS, tiny, 0)
    with pytest.raises(ValueError, match="one for each of 2 pictures, got 3"):
        MasaCtrl()(x, Prompts(TARGET, [SOURCE] * 3), tiny, 0)
