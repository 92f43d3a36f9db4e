import base64
import csv
import json
import random
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from command_line import draw
from PIL import Image
from report_rows import edit, row, run, tuned, write_rows

from antidiffusion.bench import figures
from antidiffusion.bench.report import render, to_csv, to_html, to_markdown
from antidiffusion.bench.rows import Row, read_rows


def reread(rows: list[Row], folder: Path) -> list[Row]:
    return read_rows(write_rows(rows, folder / "rows.jsonl"))


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    rows = run()
    back = reread(rows, tmp_path)
    assert sorted(map(repr, back)) == sorted(map(repr, rows))


@pytest.mark.parametrize("suffix", [".html", ".md", ".csv"])
def test_the_order_of_rows_does_not_matter(tmp_path: Path, suffix: str) -> None:
    rows = run()
    first = render(reread(rows, tmp_path), tmp_path, Path("x").with_suffix(suffix))
    random.Random(0).shuffle(rows)
    assert render(reread(rows, tmp_path), tmp_path, Path("x").with_suffix(suffix)) == first


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"item": None}, "expected 'item' as str, got None"),
        ({"kind": "edits"}, "expected a kind of protection, floor, edit, tuning, got 'edits'"),
        ({"metrics": {"psnr": "30"}}, "expected a finite number or null as 'psnr', got '30'"),
        ({"metrics": {"psnr": float("inf")}}, "expected a finite number or null as 'psnr', got inf"),
        ({"seconds": "1"}, "expected 'seconds' as "),
        ({"flags": [1]}, "expected texts in 'flags'"),
    ],
)
def test_fields_of_the_wrong_kind(tmp_path: Path, changes: dict[str, Any], fragment: str) -> None:
    good = asdict(row("advdm"))
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n" + json.dumps(good | {"key": "b"} | changes) + "\n")
    with pytest.raises(ValueError, match=re.escape(f"rows.jsonl, line 2: {fragment}") + ".*; mend or delete the line"):
        read_rows(path)


@pytest.mark.parametrize("field", asdict(row("advdm")))
def test_every_field_is_asked_for(tmp_path: Path, field: str) -> None:
    values = asdict(row("advdm"))
    del values[field]
    (tmp_path / "rows.jsonl").write_text(json.dumps(values) + "\n")
    with pytest.raises(ValueError, match=f"line 1: expected the field '{field}', got none; "):
        read_rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize("line", ["", "[1]", "7", '{"key": ', "\x80"])
def test_lines_that_are_no_objects(tmp_path: Path, line: str) -> None:
    path = write_rows([row("advdm")], tmp_path / "rows.jsonl")
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"line 2: expected a JSON object, got .*; "):
        read_rows(path)


def test_a_killed_run_leaves_half_a_line(tmp_path: Path) -> None:
    path = write_rows([row("advdm"), row("mist")], tmp_path / "rows.jsonl")
    path.write_text(path.read_text()[:-10])
    with pytest.warns(UserWarning, match="the last line has no end, as a killed run leaves it: left out"):
        assert [found.recipe for found in read_rows(path)] == ["advdm"]


def test_one_key_twice(tmp_path: Path) -> None:
    path = write_rows([row("advdm", key="a"), row("mist"), row("mist", key="a")], tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="line 3: expected a key of its own, got key 'a' of line 1 again; "):
        read_rows(path)


def test_plots_point_to_the_better() -> None:
    rows = [replace(row, seconds=100.0) if row.recipe == "mist" else row for row in run()]
    edits, edits_by_time, tunings, _ = figures.plots(rows)
    assert (edits.title, edits.metric, edits.axis, tunings.title) == ("edit", "ssim_to_clean", "PSNR in dB", "tuning")
    assert (edits_by_time.axis, [text for _, text in edits_by_time.x_ticks][::2]) == (
        figures.AXES["seconds"],
        ["2.0", "100.0"],
    )
    assert [point.left for point in edits_by_time.points] == [True, False, False]
    for plot in (edits, tunings):
        places = {point.name: point for point in plot.points}
        assert list(places) == ["mist", "advdm", "random-sign"]
        assert places["mist"].x > places["advdm"].x > places["random-sign"].x
        assert places["mist"].y < places["advdm"].y < places["random-sign"].y
        assert [text for _, text in plot.x_ticks] == ["30.0", "31.0", "32.0"]
    assert sorted(text for _, text in edits.y_ticks) == ["0.700", "0.800", "0.900"]
    assert [point.name for point in figures.plots([*run(), edit("mist", "0", 0.5, attack="sdedit")])[0].points] == [
        "mist"
    ]


def test_labels_keep_apart_and_inside() -> None:
    rows = [row(str(i), kind="protection", metrics={"psnr": 30.0}) for i in range(12)]
    plot, _ = figures.plots([*rows, *(edit(str(i), "000", 0.5 if i else 0.1) for i in range(12))])
    labels = [point.label_y for point in plot.points]
    assert all(b - a >= figures.LABEL for a, b in pairwise(labels))
    assert labels[0] > 0 and labels[-1] < figures.BOTTOM


def test_grids_show_published_pictures_and_attacks(tmp_path: Path) -> None:
    draw(tmp_path / "small.png"), draw(tmp_path / "edit.png", 1), draw(tmp_path / "large.png", 2, 300, 600)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    draw(tmp_path.parent / "outside.png")
    rows = [row("advdm", kind="protection", pictures=["small.png"])]
    rows += [
        edit("advdm", "000", 0.5, seed=1, pictures=["large.png"]),
        edit("advdm", "000", 0.5, pictures=["edit.png"]),
    ]
    rows += [edit("advdm", "000", 0.5, attack="sdedit", pictures=["large.png"])]
    rows += [edit("advdm", "000", 0.5, attack="diffedit", pictures=["../outside.png"])]
    rows += [edit("mist", "000", 0.5, pictures=["gone.png"]), edit("aspl", "000", 0.5, pictures=["broken.png"])]
    rows += [edit("clean", "000", 0.5, purifier="blur", pictures=["small.png"])]
    (grid,) = figures.grids(rows, tmp_path)
    assert (grid.title, grid.columns) == ("synth/000", ("published", "diffedit", "masactrl", "sdedit"))
    ((recipe, line),) = grid.lines
    assert (recipe, line[1]) == ("advdm", "")
    assert [decode(picture) for picture in (line[0], line[2])] == [
        (tmp_path / name).read_bytes() for name in ("small.png", "edit.png")
    ]
    (tmp_path / "thumbnail.png").write_bytes(decode(line[3]))
    assert Image.open(tmp_path / "thumbnail.png").size == (160, 80)


def test_pages_stay_small_and_every_data_set_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path / "x.png", 0, 160, 160)
    rows = [edit("advdm", str(i), 0.5, dataset=name, pictures=["x.png"]) for name in "ab" for i in range(5)]
    found = figures.grids(rows, tmp_path)
    assert [grid.title for grid in found] == ["a/0", "b/0", "a/1", "b/1"]
    size = sum(len(grid.lines[0][1][1]) for grid in found)
    monkeypatch.setattr(figures, "MAX_BYTES", size - 1)
    assert all(grid.lines[0][1][1].startswith("data:image/webp") for grid in figures.grids(rows, tmp_path))
    monkeypatch.setattr(figures, "MAX_BYTES", 100)
    assert figures.grids(rows, tmp_path) == []


def decode(uri: str) -> bytes:
    assert uri.startswith("data:image/png;base64,")
    return base64.b64decode(uri.split(",")[1])


class Page(HTMLParser):
    """Links and balance of a page's tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_no_other_file(tmp_path: Path) -> None:
    draw(tmp_path / "x.png")
    rows = [*run(), edit("<script>alert(1)</script>", "000", 0.5, pictures=["x.png"])]
    text = to_html(rows, tmp_path)
    page = Page(text)
    assert page.open == [] and page.links
    assert all(link.startswith("data:image/") for link in page.links)
    assert not re.search(r"https?:|//\w|url\(|@import|<script|<link", re.sub('base64,[^"]+', "", text))
    for heading in (
        "Protection",
        "Attacks",
        "Ranking",
        "Purifiers",
        "Transfer",
        "Protection against invisibility and time",
        "Pictures",
    ):
        assert f"<h2>{heading}</h2>" in text
    assert "it is no guarantee" in text and "hsl(" in text and text.count("<svg") == 4


def test_what_is_not_there_has_no_section(tmp_path: Path) -> None:
    text = to_html([row("advdm", kind="protection", metrics={"psnr": 30.0})], tmp_path)
    assert re.findall("<h2>(.*)</h2>", text) == ["Protection"]


def test_markdown() -> None:
    text = to_markdown([*run(), edit("a|b\n<c>", "000", 0.5)])
    assert re.findall("^## (.*)", text, re.M) == ["Protection", "Attacks", "Ranking", "Purifiers", "Transfer"]
    assert "| a\\|b &lt;c> |" in text and "it is no guarantee" in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_csv_has_every_row() -> None:
    rows = [
        edit("advdm", "0", 0.1 + 0.2),
        tuned("mist", "0", None, flags=["zero gradient", "lossy file"], settings={"a": 1}),
    ]
    first, second = csv.DictReader(StringIO(to_csv(rows)))
    assert float(first["ssim_to_clean"]) == 0.1 + 0.2
    assert (first["distance"], second["distance"], second["ssim_to_clean"]) == ("", "", "")
    assert (second["key"], second["flags"]) == (rows[1].key, "zero gradient; lossy file")
    assert json.loads(second["settings"]) == {"a": 1}
