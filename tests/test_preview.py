import base64
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from command_line import draw
from PIL import Image

from antidiffusion.batch import Outcome, Settings, run
from antidiffusion.card import read_card
from antidiffusion.folders import plan
from antidiffusion.models.base import Surrogate
from antidiffusion.preview import MAGNIFY, SIDE, cut, drawn, page_for, shown, write_preview
from antidiffusion.recipes import RandomSign

VOID = {"meta", "img", "link", "br"}


class Checked(HTMLParser):
    """Counts tags, and refuses what is not closed and what comes from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.counts: dict[str, int] = {}
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.sources += [value or "" for name, value in attributes if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:  # p, dt and dd may stay open
            pass


@pytest.fixture
def outcomes(photos: Path, tiny: Surrogate) -> list[Outcome]:
    draw(photos / "<b>&.png", 3, height=400, width=70)
    return list(run(plan([photos], Path("out")).jobs, Settings(RandomSign()), tiny))


def test_a_page_of_its_own(outcomes: list[Outcome]) -> None:
    page = page_for(o.job.target for o in outcomes)
    assert page == Path("out/preview.html")
    write_preview(page, ((o.job.source, o.job.target, o.card or {}) for o in outcomes), len(outcomes))
    text = page.read_text()
    checked = Checked()
    checked.feed(text)
    assert checked.open == []
    assert (checked.counts["section"], checked.counts["img"], checked.counts["h2"]) == (3, 9, 3)
    assert all(source.startswith("data:image/webp;base64,") for source in checked.sources)
    assert "&lt;b&gt;&amp;.png" in text and "<b>" not in text
    assert "8/255 measured, 8/255 allowed" in text
    assert page.stat().st_size < 400_000
    assert not [path for path in Path("out").iterdir() if path.name.startswith(".")]


def test_the_difference_is_magnified_at_full_size(outcomes: list[Outcome]) -> None:
    job = next(o.job for o in outcomes if o.job.source.name == "<b>&.png")
    row = shown(job.source, job.target, read_card(job.target) or {}, Path("out"))
    assert row.before and row.difference

    def pixels(uri: str) -> np.ndarray:
        return np.asarray(Image.open(BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")).astype(int)

    assert pixels(row.difference).shape == (SIDE, 70, 3)
    assert max(pixels(row.before).shape) == SIDE
    assert abs(pixels(row.difference) - 128).mean() > 4 * MAGNIFY  # grain of 8 either way, through lossy WebP
    assert cut(np.zeros((500, 40, 1), np.uint8)).shape == (SIDE, 40, 1)
    assert drawn(np.zeros((70, 70, 1), np.uint8)).startswith("data:image/webp;base64,")


def test_an_original_that_is_gone(outcomes: list[Outcome]) -> None:
    job = outcomes[0].job
    job.source.unlink()
    row = shown(job.source, job.target, outcomes[0].card or {}, Path("out"))
    assert (row.before, row.difference) == (None, None)
    write_preview(Path("page.html"), [(job.source, job.target, outcomes[0].card or {})], 1)
    assert "The original is not where it was" in Path("page.html").read_text()


def test_where_the_page_goes() -> None:
    assert page_for(iter([Path("a/b.png")])) == Path("a/b.png.html")
    assert page_for(iter([Path("out/x/b.png"), Path("out/y/c.png")])) == Path("out/preview.html")
