import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Generator, Tensor

from antidiffusion.attacks import purify
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.purify import (
    PURIFIERS,
    bit_depth,
    blur,
    crop_resize,
    denoise,
    diffpure,
    gridpure,
    jpeg,
    jpeg_lanczos,
    lanczos,
    median,
    noise,
    noisy_upscale,
    rescale,
)
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.metrics.fidelity import psnr
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.picture import Picture
from antidiffusion.pictures.tensors import to_bytes

WITH_A_MODEL = ("vae", "diffpure", "gridpure", "denoise-05", "denoise-15", "noisy-upscale")
PIXELS = [name for name in PURIFIERS if name not in WITH_A_MODEL]
RANDOM = ("noise", *WITH_A_MODEL[1:])


@pytest.fixture(scope="module")
def photo() -> Tensor:
    return Picture.read(Path(__file__).parents[1] / "data" / "portrait.png").tensor()


@pytest.mark.parametrize("name", PURIFIERS)
def test_shape_dtype_range_and_seed(name: str, tiny: Surrogate, x: Tensor) -> None:
    wide = torch.cat([x, x.flip(2)], 3)  # 64 x 128
    first = PURIFIERS[name](wide, tiny, 3)
    assert first.shape == wide.shape and first.dtype == wide.dtype and not first.requires_grad
    assert first.min() >= 0 and first.max() <= 1 and not torch.equal(first, wide)
    assert torch.equal(PURIFIERS[name](wide, tiny, 3), first)
    assert torch.equal(PURIFIERS[name](wide, tiny, 4), first) == (name not in RANDOM)


@pytest.mark.parametrize("name", PIXELS)
def test_filters_of_pixels_take_odd_sides_and_each_picture_alone(name: str, tiny: Surrogate, x: Tensor) -> None:
    odd = x[..., :61, :37]
    whole = PURIFIERS[name](odd, tiny, 0)
    assert whole.shape == odd.shape
    if name not in RANDOM:
        torch.testing.assert_close(PURIFIERS[name](odd[:1], tiny, 0), whole[:1])
    precise = PURIFIERS[name](odd.double(), tiny, 0)
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise.float(), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in PIXELS if name not in ("noise", "bit-depth")])
def test_a_flat_picture_stays(name: str, tiny: Surrogate) -> None:
    flat = torch.full((1, 3, 48, 64), 51 / 255)
    torch.testing.assert_close(
        PURIFIERS[name](flat, tiny, 0), flat, atol=1e-5 if "jpeg" not in name else 1.01 / 255, rtol=0
    )


def test_settings_that_keep_the_picture(tiny: Surrogate, photo: Tensor) -> None:
    keeping = [
        partial(rescale, factor=1),
        partial(lanczos, factor=1),
        partial(crop_resize, share=1),
        partial(blur, sigma=0.1),
        partial(median, size=1),
        partial(noise, sigma=0),
        partial(bit_depth, bits=8),
    ]
    for purifier in keeping:
        torch.testing.assert_close(purifier(photo, tiny, 0), photo, atol=1e-6, rtol=0)
    assert float(psnr(jpeg(photo, tiny, 0, quality=100), photo)) > 35


def test_a_stronger_setting_changes_more(tiny: Surrogate, photo: Tensor) -> None:
    series = [
        [partial(jpeg, quality=quality) for quality in (95, 75, 50, 10)],
        [partial(rescale, factor=factor) for factor in (0.9, 0.5, 0.2)],
        [partial(lanczos, factor=factor) for factor in (0.9, 0.5, 0.2)],
        [partial(jpeg_lanczos, quality=75, factor=factor) for factor in (0.9, 0.5, 0.2)],
        [partial(blur, sigma=sigma) for sigma in (0.5, 1, 3)],
        [partial(median, size=size) for size in (3, 5, 9)],
        [partial(noise, sigma=sigma) for sigma in (0.01, 0.05, 0.2)],
        [partial(bit_depth, bits=bits) for bits in (6, 4, 2)],
    ]
    for purifiers in series:
        values = [float(psnr(purifier(photo, tiny, 0), photo)) for purifier in purifiers]
        assert values == sorted(values, reverse=True)


def test_filters_equal_independent_references(tiny: Surrogate, x: Tensor, tmp_path: Path) -> None:
    x = x[..., :40, :56]
    height, width = x.shape[-2:]
    interpolate = partial(F.interpolate, mode="bilinear", antialias=True)
    expected = interpolate(interpolate(x, size=(20, 28)), size=(height, width))
    torch.testing.assert_close(rescale(x, tiny, 0, factor=0.5), expected, atol=1e-5, rtol=0)
    expected = interpolate(x[..., 5:35, 7:49], size=(height, width))
    torch.testing.assert_close(crop_resize(x, tiny, 0, share=0.75), expected, atol=1e-5, rtol=0)
    for index, picture in enumerate(x):
        for channel, plane in enumerate(picture.numpy()):
            reference = scipy.ndimage.gaussian_filter(plane, 1.5, mode="nearest", truncate=4)
            assert abs(blur(x, tiny, 0, sigma=1.5)[index, channel].numpy() - reference).max() < 1e-5
            reference = scipy.ndimage.median_filter(plane, 5, mode="nearest")
            assert (median(x, tiny, 0, size=5)[index, channel].numpy() == reference).all()
        pixels = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=75)
        with Image.open(tmp_path / "x.jpg") as reread:
            expected = torch.tensor(list(reread.tobytes())).view(height, width, 3).permute(2, 0, 1) / 255
        assert torch.equal(jpeg(x, tiny, 0, quality=75)[index], expected)


def test_pillows_filter_is_another_than_ours(tiny: Surrogate, photo: Tensor) -> None:
    height, width = photo.shape[-2:]
    picture = Image.fromarray(to_bytes(photo)[0])
    for size in ((width // 2, height // 2), (width, height)):
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    found = lanczos(photo, tiny, 0, factor=0.5)
    assert (to_bytes(found)[0] == np.asarray(picture)).all()
    assert not torch.allclose(found, rescale(photo, tiny, 0, factor=0.5), atol=4 / 255)


def test_denoising_is_the_attackers_own_image_to_image(tiny: Surrogate, photo: Tensor) -> None:
    x = photo[..., :64, :64]
    expected = SDEdit(strength=0.15, guidance=1.0)(x, Prompts(""), tiny, 3)
    assert torch.equal(PURIFIERS["denoise-15"](x, tiny, 3), expected)
    sizes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(purify, "denoise", lambda x, *arguments, **options: sizes.append(x.shape) or x)
        noisy_upscale(x, tiny, 0)
    assert sizes == [(1, 3, 128, 128)]


def test_noise_has_its_spread_and_bits_their_levels(tiny: Surrogate, x: Tensor) -> None:
    grey = torch.full((1, 3, 128, 128), 0.5)
    noisy = noise(grey, tiny, 0, sigma=0.05)
    assert float(noisy.std()) == pytest.approx(0.05, rel=0.02) and float(noisy.mean()) == pytest.approx(0.5, abs=1e-3)
    for bits in (1, 3):
        levels = bit_depth(x, tiny, 0, bits=bits)
        assert len(levels.unique()) == 2**bits and (levels - x).abs().max() <= 0.5 / (2**bits - 1) + 1e-6


def test_noise_to_be_washed_out_gets_less(tiny: Surrogate, photo: Tensor) -> None:
    signs = torch.randn(photo.shape, generator=Generator().manual_seed(0)).sign()
    protected = (photo + 8 / 255 * signs).clamp(0, 1)
    for name in ("jpeg-50", "rescale", "lanczos", "jpeg-75-half", "blur", "median"):
        left = PURIFIERS[name](protected, tiny, 0) - PURIFIERS[name](photo, tiny, 0)
        assert left.square().mean() < 0.8 * (protected - photo).square().mean()


def test_a_model_that_knows_the_answer_gives_the_picture_back(
    tiny: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A perfect denoiser undoes any noise, at every step and on every patch."""
    wide = torch.cat([x, x.flip(2)], 3)
    z = tiny.posterior(wide).mean
    expected = purify.vae_round_trip(wide, tiny, 0)
    torch.testing.assert_close(expected, tiny.decode(z))
    size, origins = purify._grid(z, tiny)

    def oracle(z_t: Tensor, t: Tensor, condition: object) -> Tensor:
        clean = torch.cat([purify._cut(z, size, origin) for origin in origins]) if z_t.shape != z.shape else z
        signal, noise = (factor.view(-1, 1, 1, 1) for factor in tiny.schedule(t))
        return (z_t - signal * clean) / noise

    monkeypatch.setattr(tiny, "predict", oracle)
    torch.testing.assert_close(diffpure(wide, tiny, 0), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(diffpure(wide, tiny, 1, t=900, steps=9), expected, atol=1e-2, rtol=0)
    torch.testing.assert_close(gridpure(wide, tiny, 0, gamma=0, rounds=2), expected, atol=1e-3, rtol=0)


def test_the_reverse_process_has_the_marginals_and_the_memory_of_ddpm(
    tiny: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the answer known, z_t is signal z + noise n, and n forgets as q(z_s | z_t, z) says; DDIM's n would stay."""
    z = torch.full((4, 4, 64, 64), 0.7)
    seen: dict[int, Tensor] = {}

    def oracle(z_t: Tensor, t: Tensor, condition: object) -> Tensor:
        signal, noise = (factor.view(-1, 1, 1, 1) for factor in tiny.schedule(t))
        seen[int(t[0])] = (z_t - signal * z) / noise
        return seen[int(t[0])]

    monkeypatch.setattr(tiny, "predict", oracle)
    result = purify._renoise(z, 600, 6, tiny.unconditional(), tiny, Generator().manual_seed(0))
    torch.testing.assert_close(result, z, atol=1e-4, rtol=0)
    assert list(seen) == [600, 500, 400, 300, 200, 100]
    for n in seen.values():
        assert float(n.mean()) == pytest.approx(0, abs=0.02) and float(n.std()) == pytest.approx(1, rel=0.02)
    signal, noise = (factor.square() for factor in tiny.schedule(torch.arange(1000)))
    for t, s in pairwise(seen):
        expected = math.sqrt(1 - float((1 - signal[t] / signal[s]) / noise[t]))
        assert float((seen[t] * seen[s]).mean()) == pytest.approx(expected, abs=0.02) and expected < 0.98


def test_a_grid_covers_every_latent_and_merges_to_what_was_cut(mini: Surrogate) -> None:
    for shape in ((16, 16), (16, 28), (8, 24), (20, 12), (8, 8), (4, 16)):
        z = torch.randn(2, 4, *shape, generator=Generator().manual_seed(0))
        size, origins = purify._grid(z, mini)
        assert max(size) <= 8 and len(set(origins)) == len(origins)
        assert (len(origins) > 1) == (shape != size)
        patches = [purify._cut(z, size, origin) for origin in origins]
        assert all(patch.shape == (2, 4, *size) for patch in patches)
        torch.testing.assert_close(purify._merge(patches, origins, z), z)
    square = torch.arange(256.0).view(1, 1, 16, 16)
    size, origins = purify._grid(square, mini)
    assert len(origins) == 10  # 3 x 3 that overlap by half, and the corners
    corners = {0.0, 15.0, 240.0, 255.0}
    assert corners <= set(purify._cut(square, size, origins[-1]).flatten().tolist())
    size, origins = purify._grid(square, replace(mini, size=192))
    assert size == (12, 12) and origins[:4] == [(0, 0), (0, 4), (4, 0), (4, 4)]  # no whole stride


def test_gamma_is_the_share_of_the_picture_in_every_round(
    tiny: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = gridpure(x, tiny, 0, gamma=1, rounds=2)
    torch.testing.assert_close(kept, purify.vae_round_trip(x, tiny, 0))
    monkeypatch.setattr(purify, "_renoise", lambda z, *rest: torch.zeros_like(z))  # wipes everything out
    expected = tiny.decode(0.3 * tiny.posterior(x).mean)
    torch.testing.assert_close(gridpure(x, tiny, 0, gamma=0.3, rounds=3), expected)


def test_the_embedded_model_keeps_a_portrait_recognisable(mini: Surrogate, photo: Tensor) -> None:
    """Purified pictures are near what the VAE makes of the picture, and farther the more noise they went through."""
    reference = purify.vae_round_trip(photo, mini, 0)
    near, far = diffpure(photo, mini, 0, t=10, steps=1), diffpure(photo, mini, 0, t=600, steps=6)
    assert float(psnr(near, reference)) > float(psnr(far, reference)) + 3
    assert float(psnr(gridpure(photo, mini, 0, rounds=3), reference)) > 20
    assert not torch.equal(near, diffpure(photo, mini, 0, t=10, steps=1, prompt="a photo of a man"))


def test_the_other_architectures_purify(surrogate: Surrogate, x: Tensor) -> None:
    """v-prediction and SDXL's second embedding too."""
    for purified in (diffpure(x, surrogate, 0, t=20, steps=2), gridpure(x, surrogate, 0, rounds=1)):
        assert purified.shape == x.shape and purified.isfinite().all()


@pytest.mark.parametrize("name", PURIFIERS)
def test_wrong_pictures_are_refused(name: str, tiny: Surrogate, x: Tensor) -> None:
    for wrong in (x[0], x[:, :1], x[:0], x * 255, x - 1, x * math.nan, (x * 255).byte(), x.half()):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            PURIFIERS[name](wrong, tiny, 0)
    if name in WITH_A_MODEL:
        with pytest.raises(ValueError, match=r"expected sides that are multiples of 64, got 60 x 64; "):
            PURIFIERS[name](x[..., :60], tiny, 0)


@pytest.mark.parametrize(
    "purifier",
    [
        *(partial(jpeg, quality=quality) for quality in (0, 101)),
        *(partial(rescale, factor=factor) for factor in (0, 1.1, math.nan)),
        *(partial(lanczos, factor=factor) for factor in (0, 1.1, math.nan)),
        *(partial(denoise, strength=strength) for strength in (0, 0.01, 1.1)),
        partial(noisy_upscale, factor=0),
        *(partial(crop_resize, share=share) for share in (0, 1.1)),
        *(partial(blur, sigma=sigma) for sigma in (0, -1, math.nan)),
        *(partial(median, size=size) for size in (0, 2, -1)),
        *(partial(noise, sigma=sigma) for sigma in (-0.1, 8)),
        *(partial(bit_depth, bits=bits) for bits in (0, 9)),
        *(partial(diffpure, t=t, steps=steps) for t, steps in ((0, 1), (1000, 10), (150, 0), (150, 14), (150, 151))),
        *(partial(gridpure, **options) for options in ({"rounds": 0}, {"gamma": 1.1}, {"gamma": -0.1}, {"t": 1000})),
    ],
    ids=lambda purifier: f"{purifier.func.__name__}{purifier.keywords}",
)
def test_settings_out_of_range_are_refused(purifier: partial, tiny: Surrogate, x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected .*, got .*; "):
        purifier(x, tiny, 0)
