import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from antidiffusion.metrics import perceptual
from antidiffusion.metrics.perceptual import LPIPS, Network

NETWORKS: tuple[Network, ...] = ("alex", "vgg")
torchmetrics = pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="needs torchmetrics")
pytestmark = torchmetrics


@pytest.fixture(scope="module", params=NETWORKS)
def network(request: pytest.FixtureRequest) -> Network:
    return request.param


@pytest.fixture(scope="module")
def weights(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with torchvision's names, the classifier's too, and random weights that keep the signal."""
    path = tmp_path_factory.mktemp("weights") / f"{network}.safetensors"
    generator = torch.Generator().manual_seed(0)
    state = {"classifier.1.weight": torch.ones(2, 2)}
    for key, value in perceptual.BUILDERS[network]().state_dict().items():
        scale = (2 / value[0].numel()) ** 0.5 if value.ndim == 4 else 0.1
        state[f"features.{key}"] = torch.randn(value.shape, generator=generator) * scale
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def lpips(weights: Path, network: Network) -> LPIPS:
    return LPIPS(weights, network)


def reference(network: Network, weights: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Load torchmetrics' own module alone: the package would import Lightning, and torchvision for the network."""
    spec = importlib.util.find_spec("torchmetrics")
    assert spec is not None and spec.submodule_search_locations
    for name in ("torchmetrics", "torchmetrics.utilities", "torchmetrics.utilities.imports"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchmetrics.utilities.imports"]._TORCHVISION_AVAILABLE = True  # type: ignore[attr-defined]
    folder = Path(spec.submodule_search_locations[0])
    file = importlib.util.spec_from_file_location("lpips_alone", folder / "functional" / "image" / "lpips.py")
    assert file is not None and file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    features = perceptual.BUILDERS[network]()
    features.load_state_dict({k[9:]: v for k, v in load_file(weights).items() if k.startswith("features.")})
    monkeypatch.setattr(module, "_get_tv_model_features", lambda *arguments: features)
    return module._NoTrainLpips(net=network)


def test_equals_torchmetrics(lpips: LPIPS, network: Network, weights: Path, x: Tensor, monkeypatch) -> None:
    y = (x + 0.2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    x, y = x[..., :40, :], y[..., :40, :]
    theirs = reference(network, weights, monkeypatch)(x, y, normalize=True).flatten()
    assert theirs.shape == (2,) and theirs.min() > 0.005
    torch.testing.assert_close(lpips(x, y), theirs, rtol=1e-5, atol=1e-7)


def test_the_stacks_have_torchvisions_numbers(network: Network) -> None:
    """Indices and output channels of the convolutions, from the tables of torchvision's weights."""
    convolutions = {
        "alex": [(0, 64), (3, 192), (6, 384), (8, 256), (10, 256)],
        "vgg": [
            *[(0, 64), (2, 64), (5, 128), (7, 128), (10, 256), (12, 256), (14, 256)],
            *[(17, 512), (19, 512), (21, 512), (24, 512), (26, 512), (28, 512)],
        ],
    }
    layers = dict(perceptual.BUILDERS[network]().named_children())
    found = [(int(k), layer.out_channels) for k, layer in layers.items() if isinstance(layer, torch.nn.Conv2d)]
    assert found == convolutions[network]
    assert all(isinstance(layers[str(index)], torch.nn.ReLU) for index in perceptual.READ[network])


def test_a_distance_is_symmetric_grows_with_noise_and_has_a_gradient(lpips: LPIPS, x: Tensor) -> None:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    near, far = ((x + scale * noise).clamp(0, 1) for scale in (0.05, 0.5))
    assert lpips(x, x).tolist() == [0, 0]
    torch.testing.assert_close(lpips(x, near), lpips(near, x))
    assert (lpips(x, near) < lpips(x, far)).all()
    assert lpips(x[:1], far[:1]).item() == pytest.approx(lpips(x, far)[0].item(), rel=1e-5)
    leaf = near.clone().requires_grad_()
    lpips(x, leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all() and leaf.grad.abs().max() > 0


def test_the_heads_are_nonnegative_and_fit(network: Network) -> None:
    heads = perceptual.load_heads(network)
    widths = {"alex": [64, 192, 384, 256, 256], "vgg": [64, 128, 256, 512, 512]}[network]
    assert [tuple(head.shape) for head in heads] == [(width, 1, 1) for width in widths]
    assert all(head.min() >= 0 and head.max() > 0 for head in heads)


def test_torchmetrics_is_not_imported(lpips: LPIPS) -> None:
    assert "torchmetrics" not in sys.modules


@pytest.mark.parametrize("spec", [None, SimpleNamespace(submodule_search_locations=["/nowhere"])])
def test_a_missing_package_is_named(weights: Path, network: Network, spec: object, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ModuleNotFoundError, match=r"expected the package torchmetrics .*, got none; pip install torch"):
        LPIPS(weights, network)


def test_wrong_files_are_refused(weights: Path, network: Network, tmp_path: Path) -> None:
    state, broken = load_file(weights), tmp_path / "broken.safetensors"
    refused = pytest.raises(ValueError, match=rf"expected the features of torchvision's {network} .*, got .*; ")
    with refused:
        LPIPS(tmp_path / "none.safetensors", network)
    broken.write_bytes(b"no safetensors")
    with refused:
        LPIPS(broken, network)
    save_file({key: value for key, value in state.items() if key != "features.0.bias"}, broken)
    with refused:
        LPIPS(broken, network)
    save_file(state | {"features.0.weight": state["features.0.weight"][:1].clone()}, broken)
    with refused:
        LPIPS(broken, network)
    with pytest.raises(ValueError, match="expected a network of alex, vgg, got 'squeeze'; "):
        LPIPS(weights, "squeeze")  # type: ignore[arg-type]


def test_wrong_pictures_are_refused(lpips: LPIPS, x: Tensor) -> None:
    small = x[..., :31]
    wrong = [(x[0], x[0]), (x * 255, x), (x, x * math.nan), (x, x[:1]), (x, x[..., :40]), (small, small)]
    for pair in wrong:
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            lpips(*pair)
    assert lpips(x[..., :32], x[..., :32]).tolist() == [0, 0]
