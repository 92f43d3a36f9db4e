import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from antidiffusion.metrics import fidelity
from antidiffusion.metrics.fidelity import linf, psnr, ssim

SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 3]), st.integers(11, 40), st.integers(11, 40))


def pair(shape: tuple[int, ...], seed: int, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=generator)
    return x, (x + noise * torch.randn(shape, generator=generator)).clamp(0, 1)


@settings(max_examples=50, deadline=None)
@given(SHAPES, st.integers(0, 99), st.sampled_from([0.01, 0.1, 1.0]))
def test_each_equals_an_independent_reference(shape: tuple[int, ...], seed: int, noise: float) -> None:
    x, y = pair(shape, seed, noise)
    for index, (a, b) in enumerate(zip(x.numpy(), y.numpy(), strict=True)):
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1}
        expected = structural_similarity(a, b, channel_axis=0, **options)
        assert float(ssim(x, y)[index]) == pytest.approx(expected, abs=1e-4)
        assert float(psnr(x, y)[index]) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-3)
        assert float(linf(x, y)[index]) == abs(a - b).max()


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 99), st.integers(1, 5000))
def test_strips_change_nothing(shape: tuple[int, ...], seed: int, strip: int) -> None:
    x, y = pair(shape, seed)
    with pytest.MonkeyPatch.context() as patch:
        whole = ssim(x, y)
        patch.setattr(fidelity, "STRIP", strip)
        torch.testing.assert_close(ssim(x, y), whole, atol=1e-6, rtol=0)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 99))
def test_identity_symmetry_bounds_and_batch(shape: tuple[int, ...], seed: int) -> None:
    x, y = pair(shape, seed)
    assert torch.equal(psnr(x, x), torch.full(shape[:1], math.inf))
    assert torch.equal(linf(x, x), torch.zeros(shape[:1]))
    torch.testing.assert_close(ssim(x, x), torch.ones(shape[:1]), atol=1e-6, rtol=0)
    for metric in (psnr, ssim, linf):
        values = metric(x, y)
        assert values.shape == shape[:1] and values.dtype == x.dtype
        torch.testing.assert_close(metric(y, x), values)
        torch.testing.assert_close(torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(shape[0])]), values)
    assert (ssim(x, y) < 1).all() and (ssim(x, 1 - x) >= -1).all()


def test_more_noise_is_worse() -> None:
    for metric, sign in ((psnr, -1), (ssim, -1), (linf, 1)):
        values = [float(metric(*pair((1, 3, 32, 32), 0, noise))) * sign for noise in (0.01, 0.05, 0.2)]
        assert values == sorted(values)


def test_ssim_has_a_gradient_that_double_precision_confirms() -> None:
    x, y = (z.double() for z in pair((1, 1, 12, 13), 0))
    assert torch.autograd.gradcheck(lambda z: ssim(z, y), x.requires_grad_())


def test_ssim_of_a_large_picture_stays_within_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    original = fidelity._blur

    def spy(z: torch.Tensor) -> torch.Tensor:
        sizes.append(z[0].numel())
        return original(z)

    monkeypatch.setattr(fidelity, "_blur", spy)
    x, y = pair((1, 3, 1500, 1500), 0)
    assert 0.5 < float(ssim(x, y)) < 1
    assert len(sizes) > 1 and max(sizes) <= fidelity.STRIP + 10 * 3 * 1500


@pytest.mark.parametrize("metric", [psnr, ssim, linf])
def test_wrong_input_is_refused(metric: object) -> None:
    assert callable(metric)
    x = torch.rand(1, 3, 16, 16)
    for a, b in ((x, x[..., :15]), (x[0], x[0]), (x * 255, x), (x, x - 1), (x, x.half()), (x * math.nan, x)):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            metric(a, b)


def test_ssim_needs_a_full_window() -> None:
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(torch.rand(1, 3, 10, 40), torch.rand(1, 3, 10, 40))
