import pytest
import torch
from torch import Generator, Tensor

from antidiffusion.data.defense_edit import read, synthetic
from antidiffusion.metrics.detectability import RESIDUAL, Detector, auroc, detectability, train
from antidiffusion.pictures.picture import Picture


@pytest.fixture(scope="module")
def portraits() -> Tensor:
    return torch.cat([Picture.read(item.picture).tensor() for item in read(synthetic())[:16]])


def signs(x: Tensor, levels: int) -> Tensor:
    noise = torch.randn(x.shape, generator=Generator().manual_seed(0)).sign()
    return ((x * 255).round() + levels * noise).clamp(0, 255) / 255


def test_noise_is_found_in_pictures_that_were_never_seen_and_nothing_in_clean_ones(portraits: Tensor) -> None:
    assert detectability(portraits, signs(portraits, 8), seed=0, steps=25) > 0.8
    assert detectability(portraits, portraits, seed=0, steps=2) == 0.5


def test_the_same_seed_gives_the_same_detector(portraits: Tensor) -> None:
    some, noisy = portraits[:4], signs(portraits[:4], 4)
    first, again, other = (train(some, noisy, seed=seed, steps=3) for seed in (0, 0, 1))
    assert torch.equal(first(some), again(some)) and not torch.equal(first(some), other(some))
    assert not any(parameter.requires_grad for parameter in first.parameters())


def test_flat_and_sloping_pictures_leave_no_residual() -> None:
    slope = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    torch.testing.assert_close(
        torch.nn.functional.conv2d(slope[:, :1], RESIDUAL[None, None]).abs().max().item(), 0.0, atol=1e-5, rtol=0
    )
    assert sum(parameter.numel() for parameter in Detector().parameters()) < 6000


def test_auroc_of_known_scores() -> None:
    low, high = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 3.0])
    assert (auroc(high, low), auroc(low, high), auroc(low, low)) == (1, 0, 0.5)
    assert auroc(torch.tensor([1.0, 3.0]), torch.tensor([2.0])) == 0.5
    with pytest.raises(ValueError, match="expected scores of both kinds, got 0 and 2; "):
        auroc(low[:0], low)


def test_what_is_no_pair_is_refused(portraits: Tensor) -> None:
    for other in (portraits[:4, :, 1:], portraits[:3], 255 * portraits[:4]):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            train(portraits[:4], other, seed=0)
    with pytest.raises(ValueError, match="at least 64 px"):
        train(portraits[:2, :, :60], portraits[:2, :, :60], seed=0)
