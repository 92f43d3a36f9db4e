"""What a data set says about its pictures, and the merge of shards into one data set."""

import json
from pathlib import Path

import numpy as np

from portraits.files import write_json
from portraits.identity import Identity
from portraits.sampling import TRAIN_SEED
from portraits.scene import Scene

# key in attributes.json -> field; the keys are those that earlier data sets have
IDENTITY_KEYS = {
    "sex": "sex",
    "age": "age",
    "tone": "tone",
    "hair_col": "hair_colour",
    "hair_style": "hair_style",
    "fringe": "fringe",
    "beard": "beard",
    "eye": "eye_colour",
    "freckles": "freckles",
    "lipstick": "lipstick",
    "mel": "melanin",
}
SCENE_KEYS = {
    "expr": "expression",
    "cloth_col": "cloth_colour",
    "cloth_col2": "stripe_colour",
    "cloth_kind": "cloth",
    "striped": "striped",
    "bg": "background",
    "bgkind": "background_kind",
    "glasses": "glasses",
    "glasses_style": "glasses_style",
    "hat": "hat",
    "hat_col": "hat_colour",
    "yaw": "yaw",
    "pitch": "pitch",
    "roll": "roll",
}

Attributes = dict[str, str | float | bool]


def identity_attributes(identity: Identity) -> Attributes:
    """Return the identity's entries of attributes.json."""
    return {key: getattr(identity, field) for key, field in IDENTITY_KEYS.items()}


def scene_attributes(scene: Scene) -> Attributes:
    """Return the scene's entries of attributes.json."""
    return {key: getattr(scene, field) for key, field in SCENE_KEYS.items()}


def training_attributes(index: int, identity: Identity, scene: Scene) -> Attributes:
    """Return a training picture's entry of attributes.json."""
    origin: Attributes = {"index": index, "seed": TRAIN_SEED + index}
    return {**origin, **identity_attributes(identity), **scene_attributes(scene)}


def merge(shards: list[Path], out: Path) -> int:
    """Merge shards into train.npy, captions.json and attributes.json.

    Arguments:
        shards: Files of pictures (n, H, W, 3) uint8 in the order of their indices; beside NAME.npy lies NAME.json with
            the captions and attributes.
        out: Folder of the data set.

    Returns:
        The number of pictures.

    Raises:
        ValueError: If there are no shards, or one's pictures and captions differ in number.
    """
    if not shards:
        raise ValueError("expected at least one shard, got none; render some pictures first")
    captions: list[str] = []
    attributes: list[Attributes] = []
    for path in shards:
        texts = path.with_suffix(".json")
        entries = json.loads(texts.read_text())
        count = len(np.load(path, mmap_mode="r"))
        if not count == len(entries["captions"]) == len(entries["attributes"]):
            raise ValueError(
                f"expected {count} captions and attributes in {texts}, got {len(entries['captions'])} and "
                f"{len(entries['attributes'])}; delete the shard and render it again"
            )
        captions += entries["captions"]
        attributes += entries["attributes"]

    out.mkdir(parents=True, exist_ok=True)
    shape = np.load(shards[0], mmap_mode="r").shape[1:]
    partial = out / "train.npy.partial"  # filled shard by shard, as 12,000 pictures take 590 MB
    pictures = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=(len(captions), *shape))
    start = 0
    for path in shards:
        shard = np.load(path)
        pictures[start : start + len(shard)] = shard
        start += len(shard)
    pictures.flush()
    partial.replace(out / "train.npy")
    write_json(out / "captions.json", captions, indent=0)
    write_json(out / "attributes.json", attributes)
    return len(captions)
