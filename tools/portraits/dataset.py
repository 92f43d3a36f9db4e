"""Rendering whole data sets in parallel processes. Every picture depends on its own seed only, never on the workers."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from portraits.attributes import identity_attributes, merge, scene_attributes, training_attributes
from portraits.caption import caption
from portraits.files import write_array, write_json, write_whole
from portraits.identity import sample_identity
from portraits.model import shape_head
from portraits.render import SIDE, Renderer
from portraits.sampling import held_out_generator, training_generator
from portraits.scene import sample_scene

SHARD = 250  # pictures
PERSONALISE = 8  # of an identity's pictures; the others are for evaluation
MAX_PICTURES = 100  # an identity's caption seeds are 100 j, 100 j + 1, ...


@cache
def renderer(assets: Path, side: int = SIDE) -> Renderer:
    """Return this process's renderer of pictures of `side` x `side` pixels."""
    return Renderer(assets, side)


def render_shard(assets: Path, shards: Path, first: int, count: int) -> None:
    """Render training pictures first, first + 1, ... into one shard, unless it is there."""
    path = shards / f"{first:07d}.npy"
    texts = path.with_suffix(".json")
    if path.exists() and texts.exists() and len(json.loads(texts.read_text())["captions"]) == count:
        return
    pictures, captions, attributes = [], [], []
    for index in range(first, first + count):
        rng = training_generator(index)
        identity = sample_identity(rng)
        scene = sample_scene(rng, identity)
        pictures.append(renderer(assets)(identity, scene))
        captions.append(caption(identity, scene, index))
        attributes.append(training_attributes(index, identity, scene))
    write_array(path, np.stack(pictures))
    write_json(texts, {"captions": captions, "attributes": attributes})


def render_identity(assets: Path, out: Path, index: int, pictures: int, side: int) -> None:
    """Render a held-out identity into out/idNN with meta.json, which is written last, unless it is there."""
    folder = out / f"id{index:02d}"
    meta = folder / "meta.json"
    if meta.exists() and len(json.loads(meta.read_text())["images"]) == pictures:
        return
    rng = held_out_generator(index)
    identity = sample_identity(rng)
    draw = renderer(assets, side)
    rest = shape_head(draw.model, identity)
    images = []
    for k in range(pictures):
        scene = sample_scene(rng, identity)
        name = f"{k:02d}.png"
        picture = Image.fromarray(draw(identity, scene, rest))
        write_whole(folder / name, partial(picture.save, format="PNG"))
        images.append(
            {
                "file": name,
                "split": "personalise" if k < PERSONALISE else "heldout",
                "caption": caption(identity, scene, index * MAX_PICTURES + k),
                "image": scene_attributes(scene),
            }
        )
    write_json(meta, {"identity": identity_attributes(identity), "images": images})


def run(task: Callable[..., None], arguments: Iterable[tuple], workers: int, report: Callable[[int], object]) -> None:
    """Run a task over arguments in processes of one thread, and report how many are done after each."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a worker imports numpy; more threads only fight for the cores
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        futures = [pool.submit(task, *values) for values in arguments]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            report(done)


def render_training(assets: Path, out: Path, count: int, workers: int, report: Callable[[int], object]) -> None:
    """Render training pictures 0 ... count - 1 into out, going on where an earlier run stopped.

    Arguments:
        assets: Folder with model.npz and hair.npz.
        out: Folder for shards/ and then train.npy, captions.json and attributes.json.
        count: Number of pictures.
        workers: Number of processes.
        report: Called with the number of shards that are done.
    """
    training_generator(count - 1)  # refuse a count that runs into the held-out seeds before any work is done
    shards = out / "shards"
    firsts = range(0, count, SHARD)
    run(render_shard, ((assets, shards, first, min(SHARD, count - first)) for first in firsts), workers, report)
    merge([shards / f"{first:07d}.npy" for first in firsts], out)


def render_identities(
    assets: Path, out: Path, count: int, pictures: int, workers: int, report: Callable[[int], object], side: int = SIDE
) -> None:
    """Render held-out identities 0 ... count - 1 into out/idNN, going on where an earlier run stopped.

    Arguments:
        assets: Folder with model.npz and hair.npz.
        out: Folder for the identities' folders.
        count: Number of identities.
        pictures: Number of pictures of each.
        workers: Number of processes.
        report: Called with the number of identities that are done.
        side: Pixels of a picture.

    Raises:
        ValueError: If there are so many pictures that two identities would share a caption seed.
    """
    if not 1 <= pictures <= MAX_PICTURES:
        raise ValueError(f"expected 1 to {MAX_PICTURES} pictures an identity, got {pictures}")
    run(render_identity, ((assets, out, index, pictures, side) for index in range(count)), workers, report)
