import json
from pathlib import Path

import pytest
from bench_plans import write_plan
from command_line import cli

from antidiffusion.bench.plan import Plan


def test_bench_and_its_report(loaded: Path) -> None:
    plan = write_plan(Path(), "tiny", items=1)
    run = cli("bench", plan, "-o", "run")
    assert (run.code, run.out, run.err) == (0, "run/rows.jsonl\n", "")
    rows = [json.loads(line) for line in Path("run/rows.jsonl").read_text().splitlines()]
    assert len(rows) == len(list(Plan.read(plan).trials()))
    again = cli("bench", plan, "-o", "run")
    assert again.code == 0
    assert len(Path("run/rows.jsonl").read_text().splitlines()) == len(rows)
    page = cli("report", "run/rows.jsonl", "-o", "run/report.html")
    assert page.code == 0
    assert "random-sign" in Path("run/report.html").read_text()


def test_a_note_is_said_once(loaded: Path) -> None:
    plan = write_plan(Path(), "tiny", items=1)
    (Path("pictures") / "item 0" / "prompt.txt").write_text("a person with a hat " * 20)
    run = cli("bench", plan, "-o", "run")
    assert run.code == 0
    (note,) = run.err.splitlines()
    assert note.startswith("note: expected a prompt of at most")


def test_failed_trials(loaded: Path) -> None:
    text = (
        'recipes.theirs = {{ folder = "elsewhere" }}\n[edits]\ndataset = "pictures"\nattacks.sdedit = {{ steps = 2 }}'
    )
    run = cli("bench", write_plan(Path(), "tiny", text, items=1), "-o", "run")
    assert (run.code, run.out) == (1, "run/rows.jsonl\n")
    first, second, last = run.err.splitlines()
    assert first.startswith("error: pictures/item 0, theirs, protection: expected one picture item 0.* in ")
    assert second.startswith("error: pictures/item 0, theirs, sdedit: not run, since it needs a trial that failed")
    assert last == "2 of 5 trials failed and have no row; run the same command again to try them"


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--smoke", "plan.toml"], "expected a plan or --smoke, got both"),
        (["nowhere.toml"], "nowhere.toml"),
        (["plan.toml", "--dataset", "empty"], "expected folders with a picture and prompt.txt, got none in "),
    ],
)
def test_mistakes(unused: Path, arguments: list[str], fragment: str) -> None:
    write_plan(Path(), "tiny", items=1)
    run = cli("bench", *arguments, "-o", "run")
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert fragment in run.err
    assert not Path("run").exists()
