"""A small classifier of what a portrait of the synthetic kind shows: it judges samples and edits of `mini`.

How it was trained, and its accuracy on held-out people, is in tools/train_mini/train_attributes.py and its result.
"""

from importlib import resources
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from antidiffusion.pictures.tensors import check_pictures

WEIGHTS = Path(str(resources.files("antidiffusion"))) / "mini" / "attributes.safetensors"
SIDE = 128  # pixels of the portraits that it was trained on
COLOURS = ("black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow")
CLASSES: dict[str, tuple[str, ...]] = {
    "hair": ("none", "black", "blond", "brown", "grey", "red", "white"),
    "background": COLOURS,
    "clothing": COLOURS,
    "glasses": ("none", "glasses", "sunglasses"),
    "beard": ("none", "moustache", "beard"),
    "hat": ("none", "beanie"),
    "mouth": ("other", "smile"),
    "age": ("other", "old"),
    "sex": ("man", "woman"),
}


class Attributes(nn.Module):
    """Say of every attribute in `CLASSES` which class pictures show.

    Trained on synthetic portraits of 128 x 128 pixels, flipped, blurred and grained, and on nothing else: of a photo it
    says something too, which means nothing. Pictures of any size are judged at that scale: the shorter side at 128.
    """

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Conv2d(3, 24, 5, 2, 2)
        self.body = nn.Sequential(stem, nn.SiLU(), _Block(24, 32, 2), _Block(32, 64, 2), _Block(64, 96, 2))
        # The average over all positions would lose where a colour is.
        self.top = nn.Sequential(nn.Conv2d(96, 32, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(512, len(classes)) for name, classes in CLASSES.items()})

    def features(self, x: Tensor) -> Tensor:
        """Return the features `(B, 512)` under the heads, for distances between sets; x as `classify` takes it."""
        factor = SIDE / min(x.shape[-2:])
        if factor != 1:
            size = [round(factor * side) for side in x.shape[-2:]]
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        return self.top(self.body(2 * x - 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Return the logits of every attribute's classes, `(B, number of classes)`; x as `classify` takes it."""
        features = self.features(x)
        return {name: head(features) for name, head in self.heads.items()}

    @torch.no_grad()
    def classify(self, x: Tensor) -> list[dict[str, str]]:
        """Return the most likely class of every attribute, for each picture.

        Arguments:
            x: Pictures `(B, 3, H, W)` float32 in [0, 1] of any size.

        Raises:
            ValueError: If these are no pictures in [0, 1].
        """
        check_pictures(x)
        best = {name: logits.argmax(1).tolist() for name, logits in self(x).items()}
        return [{name: CLASSES[name][best[name][i]] for name in CLASSES} for i in range(len(x))]

    @classmethod
    def load(cls) -> "Attributes":
        """Load the weights that ship with the package."""
        network = cls()
        network.load_state_dict({key: value.float() for key, value in load_file(WEIGHTS).items()})
        return network.eval().requires_grad_(False)


class _Block(nn.Module):
    """Two convolutions around a residual connection."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1), nn.GroupNorm(8, outputs))
        self.skip = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.second(self.first(x)) + self.skip(x))
