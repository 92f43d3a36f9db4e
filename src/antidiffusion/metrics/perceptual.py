"""How different two pictures look to a network: LPIPS, with weights that the user has.

References:
    The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, Zhang et al., 2018, arXiv 1801.03924
    One Weird Trick for Parallelizing Convolutional Neural Networks, Krizhevsky, 2014, arXiv 1404.5997 (AlexNet)
    Very Deep Convolutional Networks, Simonyan and Zisserman, 2015, arXiv 1409.1556 (VGG16)
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from antidiffusion.pictures.tensors import check_pictures

Network = Literal["alex", "vgg"]
SMALLEST = 32  # pixels; a smaller side leaves nothing after the last pooling
# Mean and deviation of ImageNet's pixels, brought from [0, 1] to [-1, 1]: `ScalingLayer` of the authors' code.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def alexnet() -> nn.Sequential:
    """Build AlexNet's features with torchvision's numbering, so that its weights fit."""
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
    )


def vgg16() -> nn.Sequential:
    """Build VGG16's features with torchvision's numbering, so that its weights fit."""
    layers, channels = list[nn.Module](), 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [nn.Conv2d(channels, width, 3, 1, 1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers[:-1])


BUILDERS = {"alex": alexnet, "vgg": vgg16}
READ = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Layers whose outputs are compared."""


class LPIPS(nn.Module):
    """Compare pictures by calibrated differences of a network's features, version 0.1 of the authors' heads.

    The heads are those in the package torchmetrics, which is not imported. The network's weights are torchvision's,
    `alexnet` or `vgg16` of ImageNet, saved as safetensors; timm's `vgg16.tv_in1k` has them so. A `.pth` file becomes
    one by `save_file(torch.load(file, weights_only=True), "alexnet.safetensors")`.

    Arguments:
        weights: `.safetensors` file with `features.0.weight` and so on; what else it holds is ignored.
        network: "alex", which agrees best with people, or "vgg".

    Raises:
        ModuleNotFoundError: If torchmetrics is not installed.
        ValueError: If the network is unknown or the file does not hold its weights.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, weights: Path, network: Network = "alex") -> None:
        super().__init__()
        if network not in BUILDERS:
            raise ValueError(f"expected a network of {', '.join(BUILDERS)}, got {network!r}; take alex")
        self.features, self.read = BUILDERS[network](), READ[network]
        self.heads = nn.ParameterList(load_heads(network))
        _load_features(self.features, weights, network)
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distance of each pair, differentiable in both.

        Arguments:
            x, y: Pictures `(B, 3, H, W)` float32 in [0, 1], H and W at least 32.

        Returns:
            `(B,)`, 0 for identical pictures and seldom above 1.

        Raises:
            ValueError: If these are no pictures in [0, 1] of one shape.
        """
        for z in (x, y):
            check_pictures(z)
        if x.shape != y.shape or min(x.shape[-2:]) < SMALLEST:
            got = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(f"expected pictures of one shape, sides of at least {SMALLEST} px, got {got}; match them")
        pairs = zip(self._units(x), self._units(y), self.heads, strict=True)
        return torch.stack([((a - b).square() * head).sum(1).mean((1, 2)) for a, b, head in pairs]).sum(0)

    def _units(self, x: Tensor) -> list[Tensor]:
        """Return the features of every layer that is read, at each position of length 1."""
        z, units = (2 * x - 1 - self.shift) / self.scale, []
        for index, layer in enumerate(self.features):
            z = layer(z)
            if index in self.read:
                units.append(z / (z.square().sum(1, keepdim=True) + 1e-8).sqrt())  # as torchmetrics: finite gradient
        return units


def load_heads(network: Network) -> Sequence[Tensor]:
    """Read the weights of every channel, `(C, 1, 1)` for each layer, from torchmetrics' files.

    Raises:
        ModuleNotFoundError: If torchmetrics is not installed, or has no such files.
    """
    spec = importlib.util.find_spec("torchmetrics")
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0] if folders else "") / "functional" / "image" / "lpips_models" / f"{network}.pth"
    if not folders or not path.is_file():
        raise ModuleNotFoundError(
            "expected the package torchmetrics with LPIPS' heads, got none; pip install torchmetrics"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    return [state[f"lin{index}.model.1.weight"][0] for index in range(len(READ[network]))]


def _load_features(features: nn.Sequential, weights: Path, network: Network) -> None:
    wanted = f"the features of torchvision's {network} network in a .safetensors file"
    if not weights.is_file():
        raise ValueError(f"expected {wanted}, got no file {weights}; see LPIPS' documentation for where to get them")
    try:
        state = {key: value.float() for key, value in load_file(weights).items() if key.startswith("features.")}
        features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"expected {wanted}, got {weights}: {reason}; convert or name another file") from error
