"""Defense-Edit: portraits, each with an edit in words, to measure protections against editing.

The paper's set is a folder `ROOT/{collected,generated}/NAME/` of one picture and `prompt.txt` each. Ours,
Defense-Edit-Synth, has synthetic portraits of people that the embedded model never saw, also with a prompt of what the
picture shows, the edit's category, its true result and a mask of what it touches; the package ships it.

References:
    Anti-Diffusion: Preventing Abuse of Modifications of Diffusion-Based Models, Li et al., 2025, arXiv 2503.05595
"""

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from antidiffusion.metrics.attributes import CLASSES

PICTURES = frozenset({".jpg", ".jpeg", ".png"})  # of the paper's layout
PROMPT, MANIFEST = "prompt.txt", "manifest.json"


class DatasetError(ValueError):
    """A data set that cannot be read, in one sentence: expected, got, remedy."""


@dataclass(frozen=True)
class Item:
    """One picture and one edit.

    Arguments:
        name: Unique in its set; with "/" where the set has folders, so that an output named after it overwrites none.
        picture: File of the picture.
        target_prompt: What the edited picture should show.
        source_prompt: What the picture shows, or "".
        category: What is edited: expression, hair, glasses, clothing, background or age; or "".
        value: The new value in a word, or "".
        edited: File of the edit's true result, or None.
        mask: File that is white where the edit changes the picture, or None.
    """

    name: str
    picture: Path
    target_prompt: str
    source_prompt: str = ""
    category: str = ""
    value: str = ""
    edited: Path | None = None
    mask: Path | None = None


def synthetic() -> Path:
    """Return the folder of Defense-Edit-Synth in this package."""
    return Path(str(resources.files("antidiffusion"))) / "mini" / "defense_edit_synth"


def read(root: Path) -> list[Item]:
    """Read a set of the paper's layout, or one with a manifest as Defense-Edit-Synth has, sorted by name.

    Arguments:
        root: Folder; below it, at any depth, one folder for each item of the paper's layout.

    Raises:
        DatasetError: If there is no item, a folder does not have one picture and one prompt, or a file is not what the
            manifest says.
    """
    if (root / MANIFEST).is_file():
        return _read_manifest(root)
    prompts = sorted(path for path in root.rglob(PROMPT) if path.is_file())
    if not prompts:
        raise DatasetError(f"expected folders with a picture and {PROMPT}, got none in {root}; check the folder")
    items = []
    for prompt in prompts:
        folder = prompt.parent
        found = sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)
        if len(found) != 1:
            raise DatasetError(f"expected one picture in {folder}, got {len(found)}; keep the one to be edited")
        text = " ".join(prompt.read_text(encoding="utf-8-sig").split())
        if not text:
            raise DatasetError(f"expected a sentence in {prompt}, got an empty file; say what the edit should show")
        items.append(Item(folder.relative_to(root).as_posix(), found[0], text))
    return items


def asked(item: Item) -> tuple[str, str] | None:
    """Return the attribute and class of `metrics.attributes` that a successful edit shows.

    "young" asks for an age that is not "old", the classifier's only other one, and some sources show that already:
    compare with what the classifier says of the untouched picture.

    Returns:
        None where the classifier cannot judge: expressions without a smile, values it has no class for, and items of
        the paper's layout, which have no category.
    """
    if item.category == "expression":
        return ("mouth", "smile") if item.value in ("smiling", "laughing") else None
    if item.category == "age":
        return "age", "old" if item.value == "old" else "other"
    return (item.category, item.value) if item.value in CLASSES.get(item.category, ()) else None


def _read_manifest(root: Path) -> list[Item]:
    items = []
    for entry in json.loads((root / MANIFEST).read_text(encoding="utf-8"))["items"]:
        files: dict[str, Any] = {"picture": None, "edited": None, "mask": None}
        for file, digest in entry["sha256"].items():
            path = root / file
            if not path.is_file():
                raise DatasetError(f"expected {file} as {root / MANIFEST} says, got no such file; fetch the set again")
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise DatasetError(f"expected {path} with SHA-256 {digest}, got another file; fetch the set again")
            kind = path.stem.removeprefix(entry["name"]).removeprefix("-") or "picture"
            files[kind] = path
        texts = {key: entry[key] for key in ("name", "target_prompt", "source_prompt", "category", "value")}
        items.append(Item(**texts, **files))
    return items
