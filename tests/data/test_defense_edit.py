import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from antidiffusion.data.defense_edit import DatasetError, Item, asked, read, synthetic
from antidiffusion.metrics.attributes import CLASSES
from antidiffusion.pictures.picture import Picture


def put(folder: Path, *files: str, prompt: str = "an old man\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in files:
        Image.new("RGB", (64, 64)).save(folder / name)
    (folder / "prompt.txt").write_text(prompt)
    return folder


def test_the_papers_layout(tmp_path: Path) -> None:
    put(tmp_path / "generated" / "anna", "example.png", prompt="\ufeffa woman\n with a hat \n")
    put(tmp_path / "collected" / "anna", "example.png")
    put(tmp_path / "collected" / "bob", "photo.JPEG")
    items = read(tmp_path)
    assert [item.name for item in items] == ["collected/anna", "collected/bob", "generated/anna"]
    assert [item.target_prompt for item in items] == ["an old man", "an old man", "a woman with a hat"]
    assert items[1].picture == tmp_path / "collected" / "bob" / "photo.JPEG"


@pytest.mark.parametrize(
    ("files", "prompt", "message"),
    [
        ([], "a hat", "expected one picture in .*x, got 0"),
        (["a.png", "b.jpg"], "a hat", "expected one picture in .*x, got 2"),
        (["a.png"], " \n", "expected a sentence in .*prompt.txt, got an empty file"),
    ],
)
def test_broken_items(tmp_path: Path, files: list[str], prompt: str, message: str) -> None:
    put(tmp_path / "x", *files, prompt=prompt)
    with pytest.raises(DatasetError, match=message):
        read(tmp_path)


def test_an_empty_set(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"expected folders with a picture and prompt\.txt, got none in"):
        read(tmp_path)


def test_ours_is_complete_and_small() -> None:
    items = read(synthetic())
    assert len(items) >= 100
    assert len({item.name for item in items}) == len(items)
    counts = Counter(item.category for item in items)
    assert set(counts) == {"expression", "hair", "glasses", "clothing", "background", "age"}
    assert min(counts.values()) >= 15
    assert sum(path.stat().st_size for path in synthetic().iterdir()) < 5e6
    assert json.loads((synthetic() / "manifest.json").read_text())["licence"] == "CC0-1.0"


def test_ours_changes_what_it_says_and_nothing_else() -> None:
    for item in read(synthetic()):
        assert item.source_prompt != item.target_prompt
        assert item.edited is not None
        assert item.mask is not None
        before, after = (Picture.read(path).pixels.astype(int) for path in (item.picture, item.edited))
        mask = Picture.read(item.mask).pixels[..., 0]
        assert set(np.unique(mask)) == {0, 255}
        change = np.abs(before - after).max(-1)
        assert change[mask == 255].mean() > 5 * change[mask == 0].mean(), item.name


def test_a_changed_or_missing_file_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(synthetic(), tmp_path / "set"))
    first, second = read(copy)[:2]
    first.picture.write_bytes(second.picture.read_bytes())
    with pytest.raises(DatasetError, match=r"with SHA-256 .*, got another file"):
        read(copy)
    first.picture.unlink()
    with pytest.raises(DatasetError, match=r"expected 000\.webp as .* says, got no such file"):
        read(copy)


@pytest.mark.parametrize(
    ("category", "value", "wanted"),
    [
        ("hair", "blond", ("hair", "blond")),
        ("glasses", "sunglasses", ("glasses", "sunglasses")),
        ("clothing", "orange", ("clothing", "orange")),
        ("background", "grey", ("background", "grey")),
        ("age", "old", ("age", "old")),
        ("age", "young", ("age", "other")),
        ("expression", "smiling", ("mouth", "smile")),
        ("expression", "laughing", ("mouth", "smile")),
        ("expression", "winking", None),
        ("clothing", "tartan", None),
        ("", "", None),
    ],
)
def test_what_an_edit_asks_of_the_classifier(category: str, value: str, wanted: tuple[str, str] | None) -> None:
    assert asked(Item("x", Path("x.png"), "a hat", category=category, value=value)) == wanted


def test_the_classifier_can_judge_all_of_ours_but_expressions() -> None:
    items = read(synthetic())
    wanted = {item.name: want for item in items if (want := asked(item))}
    assert all(value in CLASSES[name] for name, value in wanted.values())
    assert {item.category for item in items if item.name not in wanted} == {"expression"}
    assert len(wanted) == 102 - 13
