import json
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import cli
from report_rows import edit, row, write_rows


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start where a run's `rows.jsonl` is."""
    monkeypatch.chdir(tmp_path)
    return write_rows([edit("advdm", "000", 0.5), edit("mist", "000", 0.6)], "rows.jsonl")


def test_one_file_for_each_output(rows: Path) -> None:
    before = rows.read_bytes()
    run = cli("report", "rows.jsonl", "-o", "new/report.html", "-o", "report.csv", "--output", "report.MD")
    assert (run.code, run.out, run.err) == (0, "new/report.html\nreport.csv\nreport.MD\n", "")
    assert Path("new/report.html").read_text().startswith("<!doctype html>")
    assert len(Path("report.csv").read_text().splitlines()) == 3
    assert Path("report.MD").read_text().startswith("# ")
    assert sorted(path.name for path in Path().iterdir()) == ["new", "report.MD", "report.csv", "rows.jsonl"]
    assert rows.read_bytes() == before


def test_nothing_is_replaced_unasked() -> None:
    Path("report.md").write_text("mine")
    run = cli("report", "rows.jsonl", "-o", "report.csv", "-o", "report.md")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ") and "expected a new file, got an existing one; use --overwrite" in run.err
    assert Path("report.md").read_text() == "mine"
    assert not Path("report.csv").exists()
    assert cli("report", "rows.jsonl", "-o", "report.md", "--overwrite").code == 0
    assert Path("report.md").read_text() != "mine"


@pytest.mark.filterwarnings("default::UserWarning:antidiffusion")
def test_a_last_line_without_end_is_noted(rows: Path) -> None:
    with rows.open("a") as file:
        file.write('{"key": "a')
    run = cli("report", "rows.jsonl", "-o", "report.csv")
    assert (run.code, run.out) == (0, "report.csv\n")
    assert run.err == "note: rows.jsonl: the last line has no end, as a killed run leaves it: left out\n"
    assert len(Path("report.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("", "rows.jsonl: expected rows, got none; "),
        ("[]\n", "rows.jsonl, line 1: expected a JSON object, got list; "),
        (json.dumps(asdict(row("advdm")) | {"seed": None}) + "\n", "line 1: expected 'seed' as int, got None; "),
        ('{"key": "a"}\n', "line 1: expected the field 'kind', got none; "),
        ((json.dumps(asdict(row("advdm", key="a"))) + "\n") * 2, "line 2: expected a key of its own, got key 'a' "),
    ],
)
def test_rows_that_are_none(rows: Path, content: str, fragment: str) -> None:
    rows.write_text(content)
    run = cli("report", "rows.jsonl", "-o", "report.html")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ") and fragment in run.err
    assert not Path("report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["none.jsonl", "-o", "x.md"], "none.jsonl: expected the rows of a run, got 'No such file or directory'; "),
        ([".", "-o", "x.md"], "expected the rows of a run, got 'Is a directory'; "),
        (["rows.jsonl", "-o", "x.pdf"], "expected an output of .html, .csv, .md, got x.pdf; "),
        (["rows.jsonl", "-o", "x"], "expected an output of .html, .csv, .md, got x; "),
        (["rows.jsonl", "-o", "rows.jsonl/x.md"], "expected a place to write to"),
        (["rows.jsonl"], "--output"),
    ],
)
def test_mistakes(arguments: list[str], fragment: str) -> None:
    run = cli("report", *arguments)
    assert (run.code, run.out) == (2, "")
    assert fragment in run.err
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_the_input_is_never_replaced(rows: Path) -> None:
    content = rows.rename("rows.csv").read_text()
    run = cli("report", "rows.csv", "-o", "./rows.csv", "--overwrite")
    assert (run.code, run.out) == (2, "")
    assert "expected an output that is no input" in run.err
    assert Path("rows.csv").read_text() == content
