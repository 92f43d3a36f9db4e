"""Pictures and captions in memory maps that processes fill side by side, while a training reads what is there.

KIND.npy is (N, 128, 128, 3) uint8, KIND-captions.npy (N,) bytes, KIND-done.npy one byte for each chunk of pictures.
"""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from portraits.sampling import held_out_generator, training_generator
from train_mini.pictures import dead_leaves, letters
from train_mini.settings import CAPTION_BYTES, SIZE, DataSettings

CHUNK = 8  # pictures that a process draws and then says to be there

Drawn = tuple[NDArray[np.uint8], str]


def render(assets: Path, rng: Generator, words: int) -> Drawn:
    """Render the first picture of a generator's person, described by the seed `words`."""
    from portraits.caption import caption
    from portraits.dataset import renderer  # numba, which whoever only reads pictures need not have
    from portraits.identity import sample_identity
    from portraits.scene import sample_scene

    identity = sample_identity(rng)
    scene = sample_scene(rng, identity)
    return renderer(assets)(identity, scene), caption(identity, scene, words)


def portrait(assets: Path, index: int) -> Drawn:
    """Render training picture `index`, as `python -m portraits train` does."""
    return render(assets, training_generator(index), index)


def held(assets: Path, index: int) -> Drawn:
    """Render the first picture of held-out identity `index`, as `python -m portraits identities` does."""
    return render(assets, held_out_generator(index), index * 100)


KINDS: dict[str, Callable[[Path, int], Drawn]] = {
    "held": held,
    "portraits": portrait,
    "textures": lambda assets, index: (dead_leaves(index), ""),
    "text": lambda assets, index: (letters(index), ""),
}


class Store:
    """One kind of pictures on disk.

    Arguments:
        folder: Of all kinds.
        kind: A key of `KINDS`.
        mode: "r" to read, "r+" to fill.

    Raises:
        FileNotFoundError: If `create` has not made it.
    """

    def __init__(self, folder: Path, kind: str, mode: str = "r") -> None:
        paths = [folder / f"{kind}{suffix}.npy" for suffix in ("", "-captions", "-done")]
        if not paths[-1].exists():
            raise FileNotFoundError(f"expected {paths[-1]}, found nothing; run stage data first")
        self.kind = kind
        self.pictures, self.captions, self.done = (np.lib.format.open_memmap(path, mode) for path in paths)

    def rows(self) -> NDArray[np.int64]:
        """Return the indices of all pictures that are there, in order."""
        return np.flatnonzero(np.repeat(self.done[:], CHUNK)[: len(self.pictures)])

    def texts(self, rows: NDArray[np.int64]) -> list[str]:
        return [text.decode() for text in self.captions[rows].tolist()]


def create(folder: Path, settings: DataSettings) -> None:
    """Make empty memory maps of all kinds, unless they are there.

    Raises:
        ValueError: If they are there for another number of pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for kind, count in settings.counts().items():
        shapes = {"": ((count, SIZE, SIZE, 3), "u1"), "-captions": ((count,), f"S{CAPTION_BYTES}")}
        shapes["-done"] = ((-(-count // CHUNK),), "u1")  # last: it says that the others are there
        for suffix, (shape, dtype) in shapes.items():
            path = folder / f"{kind}{suffix}.npy"
            if not path.exists():
                np.lib.format.open_memmap(path.with_suffix(".partial"), "w+", dtype, shape).flush()
                path.with_suffix(".partial").replace(path)
            elif (found := np.load(path, mmap_mode="r").shape) != shape:
                raise ValueError(f"expected {shape} in {path}, got {found}; take another folder or the old number")


def draw(assets: Path, folder: Path, kind: str, chunk: int) -> None:
    """Draw one chunk, unless it is there."""
    store = Store(folder, kind, "r+")
    if store.done[chunk]:
        return
    for index in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(store.pictures))):
        store.pictures[index], text = KINDS[kind](assets, index)
        store.captions[index] = text.encode()
    store.done[chunk] = 1


def missing(folder: Path, settings: DataSettings) -> list[tuple[str, int]]:
    """Return the chunks that are not there, as kind and index: held-out people first, then all kinds side by side."""
    chunks = {kind: np.flatnonzero(Store(folder, kind).done == 0) for kind in settings.counts()}
    places = [
        ((i + 0.5) / len(indices) * (kind != "held"), kind, int(chunk))
        for kind, indices in chunks.items()
        for i, chunk in enumerate(indices)
    ]
    return [(kind, chunk) for _, kind, chunk in sorted(places)]


def draw_all(assets: Path, folder: Path, settings: DataSettings, workers: int, report: Callable[[int], object]) -> None:
    """Draw what is missing.

    Arguments:
        assets: Folder with model.npz and hair.npz.
        folder: Of the memory maps.
        settings: Numbers of pictures.
        workers: Number of processes.
        report: Called with the number of chunks that are done.

    Raises:
        FileNotFoundError: If the assets are not there.
    """
    for name in ("model.npz", "hair.npz"):
        if not (assets / name).exists():
            remedy = f"run `python -m portraits assets {assets}`"
            raise FileNotFoundError(f"expected {assets / name}, found nothing; {remedy}")
    from portraits.dataset import run

    create(folder, settings)
    run(draw, [(assets, folder, *chunk) for chunk in missing(folder, settings)], workers, report)


def wait(folder: Path, least: dict[str, int], alive: Callable[[], bool], seconds: float = 300.0) -> None:
    """Wait until so many pictures of each kind are there.

    Raises:
        RuntimeError: If whoever draws them is dead, or the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        there = {k: len(Store(folder, k).rows()) if (folder / f"{k}-done.npy").exists() else 0 for k in least}
        if all(there[kind] >= count for kind, count in least.items()):
            return
        if not alive() or time.monotonic() > end:
            raise RuntimeError(f"expected {least} pictures in {folder}, got {there}; look at the output of stage data")
        time.sleep(0.5)
