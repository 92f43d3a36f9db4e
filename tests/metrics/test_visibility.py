import math
from pathlib import Path

import pytest
import skimage.color
import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from antidiffusion.metrics import visibility as module
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.metrics.visibility import JUST_NOTICEABLE, difference, seen, visibility
from antidiffusion.pictures.picture import Picture

EPSILON = 8 / 255


def signs(shape: tuple[int, ...], period: int, seed: int = 0) -> Tensor:
    """Random signs in squares of `period` pixels, their edges softened: grain at 1 px, blotches at 20 to 60."""
    height, width = shape[-2:]
    coarse = torch.randn(1, 3, -(-height // period), -(-width // period), generator=Generator().manual_seed(seed))
    if period == 1:
        return coarse.sign()
    smooth = F.interpolate(coarse, (height, width), mode="bicubic")
    return (4 * smooth).clamp(-1, 1)


@pytest.fixture(scope="module")
def photo() -> Tensor:
    picture = Picture.read(Path(__file__).parents[1] / "data" / "portrait.png").tensor()
    return F.interpolate(picture, (384, 384), mode="bicubic", antialias=True).clamp(0.1, 0.9)


@pytest.mark.parametrize("period", [20, 40, 60])
def test_blotches_are_seen_before_grain_of_one_budget(photo: Tensor, period: int) -> None:
    """A person tells the order at a glance; PSNR and SSIM say the opposite."""
    grain, blotches = (photo + EPSILON * signs(photo.shape, size) for size in (1, period))
    seen_grain, seen_blotches = visibility(photo, grain)[0], visibility(photo, blotches)[0]
    assert (seen_blotches > 1.5 * seen_grain).all()
    assert psnr(photo, blotches) > psnr(photo, grain) and ssim(photo, blotches) > ssim(photo, grain)
    assert seen(photo, blotches)["visible"] and seen_blotches[1] > JUST_NOTICEABLE


def test_orders_that_a_person_can_tell(photo: Tensor) -> None:
    def of(delta: Tensor, **options: float) -> float:
        return float(visibility(photo, photo + delta, **options)[0, 1])

    grain, blotch = EPSILON * signs(photo.shape, 1), EPSILON * signs(photo.shape, 30)
    steps = [of(scale * blotch) for scale in (0.125, 0.5, 1)]
    assert steps == sorted(steps)
    assert of(grain, pixels_per_degree=20) > of(grain) > of(grain, pixels_per_degree=120)  # farther away it blurs
    grey = grain.mean(1, keepdim=True).sign().expand_as(grain) * EPSILON
    colour = grain - grain.mean(1, keepdim=True)
    assert of(colour) < of(grey)  # fine patterns of colour are seen less than of light
    local = blotch.clone()
    local[..., 64:] = 0
    assert 0 < visibility(photo, photo + local)[0, 0] < visibility(photo, photo + blotch)[0, 0]


def test_flat_colours_are_as_far_apart_as_cielab_says() -> None:
    a, b = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.55, 0.35, 0.3])
    flat = [z.view(1, 3, 1, 1).expand(1, 3, 40, 50).double() for z in (a, b)]
    lab = [skimage.color.rgb2lab(z[0].permute(1, 2, 0).numpy()) for z in flat]
    expected = float(((lab[0] - lab[1]) ** 2).sum(-1).mean() ** 0.5)
    torch.testing.assert_close(difference(*flat), torch.full((1, 40, 50), expected).double(), atol=0.02, rtol=0)
    assert visibility(*flat)[0].tolist() == pytest.approx([expected] * 3, abs=0.02)


def test_identity_symmetry_batch_and_strips(photo: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    other = photo + EPSILON * signs(photo.shape, 3)
    assert visibility(photo, photo).tolist() == [[0, 0, 0]] and not seen(photo, photo)["visible"]
    torch.testing.assert_close(visibility(photo, other), visibility(other, photo))
    pair = torch.cat([photo, photo.flip(3)]), torch.cat([other, other.flip(3)])
    whole = visibility(*pair)
    torch.testing.assert_close(whole[:1], visibility(photo, other))
    torch.testing.assert_close(whole[1], whole[0], atol=0.02, rtol=0)
    monkeypatch.setattr(module, "STRIP", 100 * photo.shape[-1])
    torch.testing.assert_close(visibility(photo, other), whole[:1], atol=0.02, rtol=0.02)


def test_wrong_input_is_refused(photo: Tensor) -> None:
    for a, b in (
        (photo, photo[..., 1:]),
        (photo * 255, photo),
        (photo[:, :1], photo[:, :1]),
        (photo, photo * math.nan),
    ):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            visibility(a, b)
    with pytest.raises(ValueError, match="pixels per degree, got 0"):
        visibility(photo, photo, pixels_per_degree=0)
