import base64
import html
import json
import re
from html.parser import HTMLParser
from importlib import resources
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import antidiffusion.card
import antidiffusion.demo
from antidiffusion.attacks.base import Attack
from antidiffusion.attacks.masactrl import MasaCtrl
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.demo import MAGNIFY, PROMPTS, VERSIONS, run_demo
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.picture import Picture
from antidiffusion.recipes import AntiDiffusion

PORTRAITS = sorted(p.name for p in resources.files("antidiffusion").joinpath("mini", "portraits").iterdir())
ATTACKS: dict[str, Attack] = {"SDEdit": SDEdit(strength=0.04), "MasaCtrl": MasaCtrl(steps=2)}
RECIPE = AntiDiffusion(budget=6, steps=1, rounds=0, prompt_steps=1, step_size=10)


class Page(HTMLParser):
    """The tags, their attributes, and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def images(self) -> list[tuple[str, np.ndarray]]:
        found = []
        for tag, attributes in self.tags:
            if tag == "img":
                data = str(attributes["src"]).removeprefix("data:image/png;base64,")
                found.append(
                    (str(attributes["alt"]), np.asarray(Image.open(BytesIO(base64.b64decode(data)))).astype(int))
                )
        return found


@pytest.fixture(scope="module")
def shown(mini: Surrogate, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[str, int, int]]]:
    """The demo's folder and what its progress hook heard; two steps of editing instead of 25 and 50."""
    calls: list[tuple[str, int, int]] = []
    folder = tmp_path_factory.mktemp("demo") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(antidiffusion.demo, "ATTACKS", ATTACKS)
        patch.setattr(antidiffusion.card, "HELD_OUT_STEPS", 1)
        page = run_demo(folder, mini, RECIPE, seed=1, progress=lambda *call: calls.append(call))
    assert page == folder / "index.html"
    return folder, calls


@pytest.fixture(scope="module")
def page(shown: tuple[Path, object]) -> Page:
    return Page((shown[0] / "index.html").read_text(encoding="utf-8"))


def test_the_page_stands_alone(page: Page) -> None:
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe"}
        for name in attributes.keys() & {"src", "href", "srcset", "data"}:
            assert str(attributes[name]).startswith("data:image/png;base64,")
    assert "http" not in page.text


def test_the_style_fetches_nothing(shown: tuple[Path, object]) -> None:
    assert not re.search(r"url\(|@import|https?:", (shown[0] / "index.html").read_text(encoding="utf-8"))


def test_every_portrait_in_three_versions(page: Page) -> None:
    starts = ("", "perturbation of ", *(f"{attack} of " for attack in ATTACKS))
    rows = [f"{start}{version}" for start in starts for version in VERSIONS]
    assert [alt for alt, _ in page.images()] == rows * len(PORTRAITS)
    assert str(PROMPTS.target) in page.text
    assert "no protection is" in page.text.replace("\n", " ")


def test_the_page_shows_what_was_written(shown: tuple[Path, object], page: Page) -> None:
    images = iter(page.images())
    for name in PORTRAITS:
        stem = Path(name).stem
        group = dict(next(images) for _ in range(12))
        original = np.asarray(Image.open(str(resources.files("antidiffusion") / "mini" / "portraits" / name)))
        assert (group["clean"] == original).all()
        assert (group["protected"] == np.asarray(Image.open(shown[0] / f"{stem}-protected.png"))).all()
        for version in VERSIONS:
            change = group[version] - group["clean"]
            assert np.abs(change).max() == (0 if version == "clean" else RECIPE.budget)
            assert (group[f"perturbation of {version}"] == np.clip(128 + MAGNIFY * change, 0, 255)).all()
            for attack in ATTACKS:
                edit = Image.open(shown[0] / f"{stem}-{version.replace(' ', '-')}-{attack.lower()}.png")
                assert (group[f"{attack} of {version}"] == np.asarray(edit)).all()
        for attack in ATTACKS:
            assert (group[f"{attack} of clean"] != group[f"{attack} of protected"]).any()


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("version", ["clean", "protected"])
def test_every_version_is_edited_with_the_seeds_noise(
    shown: tuple[Path, object], mini: Surrogate, version: str, attack: str
) -> None:
    stem = Path(PORTRAITS[-1]).stem
    folder = Path(str(resources.files("antidiffusion") / "mini" / "portraits"))
    source = folder / PORTRAITS[-1] if version == "clean" else shown[0] / f"{stem}-protected.png"
    edit = ATTACKS[attack](Picture.read(source).tensor(), PROMPTS, mini, seed=1)
    written = Picture.read(shown[0] / f"{stem}-{version}-{attack.lower()}.png").tensor()
    assert (edit - written).abs().max() < 0.6 / 255


def test_the_cards_are_on_the_page(shown: tuple[Path, object]) -> None:
    text = (shown[0] / "index.html").read_text(encoding="utf-8")
    cards = [json.loads(html.unescape(card)) for card in re.findall(r"<pre>(.*?)</pre>", text, re.DOTALL)]
    files = [json.loads((shown[0] / f"{Path(name).stem}-protected.png.json").read_text()) for name in PORTRAITS]
    assert cards == files
    assert [card["budget"]["measured"] for card in cards] == [6] * len(PORTRAITS)


def test_the_curves_are_on_the_page(page: Page) -> None:
    stages = [attributes["aria-label"] for tag, attributes in page.tags if tag == "svg"]
    assert stages == ["prompt tuning", "perturbation"] * len(PORTRAITS)
    points = [str(attributes["points"]) for tag, attributes in page.tags if tag == "polyline"]
    assert points == ["0.0,40.0"] * len(stages)  # one step each


def test_curves_fit_their_box() -> None:
    (curve,) = antidiffusion.demo._curves({"stage": [3.0, 1.0, 2.0]})
    assert curve == {"stage": "stage", "points": "0.0,2.0 50.0,40.0 100.0,21.0", "low": 1, "high": 3, "steps": 3}


def test_progress_names_the_portrait(shown: tuple[object, list[tuple[str, int, int]]]) -> None:
    stages = [stage for stage, _, _ in shown[1]]
    assert stages[0] == f"portrait 1 of {len(PORTRAITS)}: prompt tuning"
    assert stages[-1].startswith(f"portrait {len(PORTRAITS)} of {len(PORTRAITS)}: ")


def test_nothing_else_is_left(shown: tuple[Path, object]) -> None:
    edits = [f"{version.replace(' ', '-')}-{attack.lower()}.png" for version in VERSIONS for attack in ATTACKS]
    per_portrait = [*edits, "protected.png", "protected.png.json"]
    wanted = [f"{Path(name).stem}-{end}" for name in PORTRAITS for end in per_portrait]
    assert sorted(p.name for p in shown[0].iterdir()) == sorted([*wanted, "index.html"])
