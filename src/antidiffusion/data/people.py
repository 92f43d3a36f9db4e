"""People: several photos of each, to measure protections against tuning.

The layout is Anti-DreamBooth's, `ROOT/NAME/{set_A,set_B,set_C}/`: clean photos to recognise the person by, photos
that are published and protected, and further photos that an attacker may have. The package ships synthetic people whom
the embedded model never saw.

References:
    Anti-DreamBooth: Protecting Users from Personalized Text-to-Image Synthesis, Van Le et al., 2023, arXiv 2303.15433
"""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from antidiffusion.pictures.picture import READABLE

SETS = {"set_A": "reference", "set_B": "published", "set_C": "others"}


@dataclass(frozen=True)
class Person:
    """One person's photos.

    Arguments:
        name: Of the folder.
        reference: Clean photos that tell whether drawn pictures show the person.
        published: Photos that a protection perturbs and an attacker tunes to.
        others: Clean photos that an attacker may mix in.
    """

    name: str
    reference: tuple[Path, ...]
    published: tuple[Path, ...]
    others: tuple[Path, ...]


def synthetic() -> Path:
    """Return the folder of the synthetic people in this package."""
    return Path(str(resources.files("antidiffusion"))) / "mini" / "people_synth"


def read(root: Path) -> list[Person]:
    """Read all people below a folder, sorted by name.

    Raises:
        ValueError: If there is none, or a person lacks one of the three sets.
    """
    folders = sorted({path.parent for path in root.glob("*/set_*") if path.is_dir()}) if root.is_dir() else []
    if not folders:
        raise ValueError(f"expected folders NAME/set_A, set_B and set_C, got none in {root}; check the folder")
    return [Person(folder.name, **{role: _photos(folder / name) for name, role in SETS.items()}) for folder in folders]


def _photos(folder: Path) -> tuple[Path, ...]:
    found = sorted(file for file in folder.glob("*") if file.suffix.lower() in READABLE and file.name[0] != ".")
    if not found:
        raise ValueError(f"expected photos in {folder}, got none; each person needs {', '.join(SETS)}")
    return tuple(found)
