import math

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from antidiffusion.pictures.picture import Picture
from antidiffusion.pictures.tensors import check_pictures, check_range, to_bytes, to_picture


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=Generator().manual_seed(0))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_picture_comes_back_from_its_tensor(channels: int) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, 2)
    assert np.array_equal(to_picture(Picture(levels).tensor()).pixels, levels)


def test_several_pictures_stand_side_by_side() -> None:
    x = drawn(3, 3, 20, 30)
    strip = to_picture(x).pixels
    assert strip.shape == (20, 90, 3) and np.array_equal(np.stack(np.split(strip, 3, 1)), to_bytes(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_rounded_to_the_nearest_level(dtype: torch.dtype) -> None:
    x = drawn(2, 3, 8, 8).to(dtype).requires_grad_()
    levels = torch.from_numpy(to_bytes(x)).permute(0, 3, 1, 2)
    assert (levels - x.detach().float() * 255).abs().max() <= 0.5001


def test_what_is_no_picture_is_refused() -> None:
    x = drawn(2, 3, 8, 8)
    for wrong in (x[0], x[:, :2], x[:0], x * 2, x - 1, x * math.nan, (x * 255).byte(), x.half()):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            check_pictures(wrong)
    check_pictures(x[:, :1], (1, 3))
    for wrong in (x[0], x[:, :2], x * 2, x * math.nan):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            to_picture(wrong)
    with pytest.raises(ValueError, match=r"expected a mask in \[0, 1\], got 0 to 2; "):
        check_range(torch.tensor([0.0, 2.0]), "a mask")
