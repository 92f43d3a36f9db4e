import numpy as np
import pytest
import torch
from PIL import Image

from antidiffusion.attacks.pictures import fitted, fitted_mask, squared
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.picture import Picture


def test_fitted_keeps_the_aspect_and_squared_cuts(tiny: Surrogate) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 1200, 3)).astype(np.uint8)
    pixels[:, :450] = pixels[:, 750:] = 0
    whole, centre = fitted(Picture(pixels), tiny), squared(Picture(pixels), tiny)
    assert whole.shape == (1, 3, 64, 128)
    assert centre.shape == (1, 3, 64, 64)
    image = Image.fromarray(pixels[:, 450:750]).resize((64, 64), Image.Resampling.BILINEAR)
    assert (centre[0].permute(1, 2, 0) * 255 - torch.from_numpy(np.array(image)).float()).abs().max() < 2
    assert (whole[..., :40] == 0).all()


def test_a_mask_is_black_and_white_and_scales_with_its_picture(tiny: Surrogate) -> None:
    picture = Picture(np.zeros((128, 128, 3), np.uint8))
    grey = np.full((128, 128, 1), 100, np.uint8)
    grey[:64] = 200
    mask = fitted_mask(Picture(grey), picture, tiny)
    assert mask.shape == (1, 1, 64, 64)
    assert mask[..., :32, :].eq(1).all()
    assert mask[..., 32:, :].eq(0).all()


def test_a_mask_of_another_size_is_refused(tiny: Surrogate) -> None:
    picture, mask = (Picture(np.zeros((64, side, 3), np.uint8)) for side in (64, 80))
    with pytest.raises(ValueError, match="expected a mask of 64 x 64 pixels, got 80 x 64; make it the picture's"):
        fitted_mask(mask, picture, tiny)
