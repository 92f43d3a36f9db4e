"""Whether pictures betray that they were protected: a small detector of what lies above a picture's own frequencies.

It is told of pictures in pairs, clean and perturbed, and judged on pictures that it never saw. What it finds an
adversary finds too, and better ones exist: its figure is a lower limit.
"""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from antidiffusion.pictures.tensors import check_pictures

CROP = 64  # pixels of the random squares that it is trained on
WIDTH = 16
EDGE = ((-1.0, 2.0, -2.0, 2.0, -1.0), (2.0, -6.0, 8.0, -6.0, 2.0), (-2.0, 8.0, -12.0, 8.0, -2.0))
RESIDUAL = torch.tensor([*EDGE, EDGE[1], EDGE[0]]) / 12
"""The 5 x 5 filter of steganalysis' spatial rich models that leaves what a pixel's neighbours do not predict.

References:
    Rich Models for Steganalysis of Digital Images, Fridrich and Kodovsky, 2012
"""


class Detector(nn.Module):
    """Three convolutions on residuals, averaged over the picture: 5,000 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, WIDTH, 3, padding=1), nn.GroupNorm(4, WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.GroupNorm(4, WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.ReLU()),
        )
        self.head = nn.Linear(2 * WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return a score `(B,)`, more where a picture `(B, 3, H, W)` in [0, 1] looks perturbed."""
        kernel = RESIDUAL.to(x).expand(3, 1, 5, 5)
        found = F.conv2d(255 * x, kernel, groups=3)
        features = self.body(found.clamp(-32, 32) / 8)
        spread, mean = torch.std_mean(features, (2, 3))
        return self.head(torch.cat([mean, spread], 1))[:, 0]


def auroc(positive: Tensor, negative: Tensor) -> float:
    """Return how often a positive score lies above a negative one, ties counted half: 0.5 is chance.

    Raises:
        ValueError: If there is no score of either kind.
    """
    if not positive.numel() or not negative.numel():
        got = f"{positive.numel()} and {negative.numel()}"
        raise ValueError(f"expected scores of both kinds, got {got}; judge some pictures of each")
    above = (positive[:, None] > negative).double() + (positive[:, None] == negative).double() / 2
    return float(above.mean())


def train(clean: Tensor, perturbed: Tensor, *, seed: int, steps: int = 300, batch: int = 8) -> Detector:
    """Fit a detector to pairs, on squares that are cut at random, mirrored, and shown in both versions.

    Arguments:
        clean, perturbed: The same pictures `(N, 3, H, W)` in [0, 1], sides of at least 64 px.
        seed: Decides weights and draws.
        steps, batch: Of AdamW, and pairs in each.

    Raises:
        ValueError: If these are no pairs of pictures.
    """
    check_pictures(clean)
    check_pictures(perturbed)
    if clean.shape != perturbed.shape or min(clean.shape[-2:]) < CROP:
        got = f"{tuple(clean.shape)} and {tuple(perturbed.shape)}"
        raise ValueError(f"expected pairs of pictures of at least {CROP} px, got {got}; match them")
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        detector = Detector()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    height, width = clean.shape[-2:]
    labels = torch.cat([torch.zeros(batch), torch.ones(batch)])
    for _ in range(steps):
        chosen = torch.randint(len(clean), (batch,), generator=generator)
        top, left = (int(torch.randint(side - CROP + 1, (), generator=generator)) for side in (height, width))
        pairs = torch.cat([clean[chosen], perturbed[chosen]])[..., top : top + CROP, left : left + CROP]
        if torch.rand((), generator=generator) < 0.5:
            pairs = pairs.flip(-1)
        loss = F.binary_cross_entropy_with_logits(detector(pairs.float()), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return detector.eval().requires_grad_(False)


def detectability(clean: Tensor, perturbed: Tensor, *, seed: int, steps: int = 300) -> float:
    """Return the area under the curve of a detector trained on the first half of the pairs, on the second half.

    Arguments, and errors, are `train`'s.
    """
    half = len(clean) // 2
    detector = train(clean[:half], perturbed[:half], seed=seed, steps=steps)
    scores = [torch.cat([detector(x.float()) for x in some[half:].split(8)]) for some in (perturbed, clean)]
    return auroc(*scores)
