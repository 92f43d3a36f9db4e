"""Seeds and weighted choice: the only two places where the order of random draws is decided for everyone."""

from collections.abc import Mapping

import numpy as np
from numpy.random import Generator

TRAIN_SEED = 1_000_000
HELD_OUT_SEED = 9_000_000
MAX_TRAIN = HELD_OUT_SEED - TRAIN_SEED  # one more training picture would repeat held-out identity 0


def training_generator(index: int) -> Generator:
    """Return the generator of training picture `index`, which draws its identity and then its scene."""
    if not 0 <= index < MAX_TRAIN:
        raise ValueError(f"expected a training index in [0, {MAX_TRAIN}), got {index}; later seeds are held out")
    return np.random.default_rng(TRAIN_SEED + index)


def held_out_generator(index: int) -> Generator:
    """Return the generator of held-out identity `index`, which draws the identity and then all its scenes."""
    if index < 0:
        raise ValueError(f"expected a held-out index of at least 0, got {index}; earlier seeds are for training")
    return np.random.default_rng(HELD_OUT_SEED + index)


def pick(rng: Generator, weights: Mapping[str, float]) -> str:
    """Draw a key with probability proportional to its weight."""
    names = list(weights)
    p = np.array([weights[name] for name in names], float)
    return names[rng.choice(len(names), p=p / p.sum())]
