import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import antidiffusion
from antidiffusion.data.defense_edit import Item, asked, read, synthetic
from antidiffusion.metrics.attributes import CLASSES, Attributes
from antidiffusion.pictures.picture import Picture


@pytest.fixture(scope="module")
def network() -> Attributes:
    return Attributes.load()


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [item for item in read(synthetic()) if asked(item)]


def pictures(paths: list[Path | None]) -> Tensor:
    return torch.cat([Picture.read(path).tensor() for path in paths if path])


def success(network: Attributes, items: list[Item], x: Tensor) -> float:
    hits = [
        seen[want[0]] == want[1] for item, seen in zip(items, network.classify(x), strict=True) if (want := asked(item))
    ]
    return sum(hits) / len(items)


def test_it_tells_edited_pictures_from_untouched_ones(network: Attributes, items: list[Item]) -> None:
    clear = [item for item in items if item.category in ("hair", "glasses", "clothing", "background")]
    assert len(clear) == 68
    assert success(network, clear, pictures([item.edited for item in clear])) > 0.9
    assert success(network, clear, pictures([item.picture for item in clear])) < 0.05


def test_it_sees_the_whole_picture_alike_at_twice_the_size(network: Attributes, items: list[Item]) -> None:
    """It judges at the scale that it was trained on."""
    worn = [item for item in items if item.category in ("background", "clothing")]
    x = pictures([item.edited for item in worn])
    larger = torch.nn.functional.interpolate(x, scale_factor=2, mode="bicubic", antialias=True).clamp(0, 1)
    assert success(network, worn, larger) >= success(network, worn, x) - 0.02


def test_a_picture_is_itself_alone_and_at_any_size(network: Attributes) -> None:
    x = torch.rand(3, 3, 72, 200, generator=torch.Generator().manual_seed(0))
    together = network.classify(x)
    assert together == [network.classify(x[i : i + 1])[0] for i in range(3)]
    assert all(seen.keys() == CLASSES.keys() and all(seen[name] in CLASSES[name] for name in seen) for seen in together)
    assert network.features(x).shape == (3, 512)


def test_answers_are_the_heads_of_the_features(network: Attributes, x: Tensor) -> None:
    features, logits = network.features(x), network(x)
    for name, head in network.heads.items():
        torch.testing.assert_close(logits[name], features @ head.weight.T + head.bias)
        assert [seen[name] for seen in network.classify(x)] == [
            CLASSES[name][i] for i in logits[name].argmax(1).tolist()
        ]


def test_the_weights_are_float32_frozen_and_small(network: Attributes) -> None:
    assert not network.training
    assert all(p.dtype == torch.float32 and p.isfinite().all() and not p.requires_grad for p in network.parameters())
    assert (Path(antidiffusion.__file__).parent / "mini" / "attributes.safetensors").stat().st_size < 1e6


def test_wrong_pictures_are_refused(network: Attributes, x: Tensor) -> None:
    for wrong in (x[0], x[:, :1], x[:0], x * 255, x - 1, x * math.nan, (x * 255).byte()):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            network.classify(wrong)
