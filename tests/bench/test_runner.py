import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_plans import write_plan
from command_line import PROGRAM, QUIET
from conftest import Checkpoint

import antidiffusion.bench.trials
from antidiffusion.bench.plan import Plan
from antidiffusion.bench.rows import CLEAN, FAILED_ATTACK, ROWS
from antidiffusion.bench.runner import read_rows, run
from antidiffusion.models.base import Surrogate

MEASURED = {"seconds", "peak_memory_mb"}


def results(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [asdict(row) for row in read_rows(folder / ROWS)]
    return {row["key"]: {key: value for key, value in row.items() if key not in MEASURED} for row in rows}


def load_or_die(mark: Path | None, name: str) -> Surrogate:
    """Load a model; the first process that does so dies as if memory ran out, every one without a `mark`."""
    if mark is None:
        os._exit(1)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return Surrogate.from_pretrained(name)
    os._exit(1)


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan.read(write_plan(tmp_path, "tiny"))


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compute on one thread here and in each of two processes: the last bits of sums follow the number of threads."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_all(plan: Plan, folder: Path, tiny: Surrogate) -> dict[str, dict[str, Any]]:
    done = list(run(plan, folder, lambda name: tiny))
    assert [outcome.error for outcome in done if outcome.error] == []
    return results(folder)


def test_every_trial_has_its_row_and_its_pictures(plan: Plan, tmp_path: Path, tiny: Surrogate) -> None:
    rows = run_all(plan, tmp_path / "run", tiny)
    assert set(rows) == {plan.key(trial) for trial in plan.trials()}
    for row in rows.values():
        assert row["model_sha256"] == tiny.sha256
        assert all((tmp_path / "run" / picture).is_file() for picture in row["pictures"]) and row["pictures"]
    assert results(tmp_path / "run") == rows
    again = list(run(plan, tmp_path / "run", lambda name: pytest.fail("a model was loaded")))
    assert len(again) == len(rows)


@pytest.mark.slow
def test_several_processes_give_the_same_rows(
    tmp_path: Path, sd15: Checkpoint, tiny: Surrogate, one_thread: None
) -> None:
    plan = Plan.read(write_plan(tmp_path, sd15.folder))
    rows = run_all(plan, tmp_path / "one", tiny)
    done = list(run(plan, tmp_path / "two", Surrogate.from_pretrained, jobs=2))
    assert [outcome.error for outcome in done if outcome.error] == []
    assert results(tmp_path / "two") == rows


def test_a_killed_run_goes_on(tmp_path: Path, sd15: Checkpoint, tiny: Surrogate, one_thread: None) -> None:
    path, folder = write_plan(tmp_path, sd15.folder), tmp_path / "run"
    process = subprocess.Popen([*PROGRAM, "bench", str(path), "-o", str(folder), "--dtype", "float32"], env=QUIET)
    while not (folder / ROWS).exists() or len((folder / ROWS).read_bytes().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = results(folder)
    plan = Plan.read(path)
    assert 3 <= len(before) < len(list(plan.trials()))
    with (folder / ROWS).open("a") as file:
        file.write('{"key": "half a ro')
    rows = run_all(plan, folder, tiny)
    assert rows == run_all(plan, tmp_path / "whole", tiny)
    assert before.items() <= rows.items()


def test_a_failed_trial_has_no_row_and_stops_only_what_needs_it(
    plan: Plan, tmp_path: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = antidiffusion.bench.trials.protect

    def fail(pictures: Any, recipe: Any, **options: Any) -> Any:
        if type(recipe).__name__ == "AdvDM":
            raise RuntimeError("out of luck")
        return real(pictures, recipe, **options)

    monkeypatch.setattr(antidiffusion.bench.trials, "protect", fail)
    errors = [done for done in run(plan, tmp_path / "run", lambda name: tiny) if done.error]
    assert {done.trial.recipe for done in errors} == {"advdm"}
    assert {done.error for done in errors if done.trial.kind == "protection"} == {"out of luck"}
    assert all("it needs a trial that failed: protection of" in str(d.error) for d in errors if d.trial.attack)
    assert {row["recipe"] for row in results(tmp_path / "run").values()} == {CLEAN, "random-sign"}
    monkeypatch.undo()
    assert len(run_all(plan, tmp_path / "run", tiny)) == len(list(plan.trials()))


def test_other_rows_other_weights_and_a_second_run_are_refused(plan: Plan, tmp_path: Path, tiny: Surrogate) -> None:
    folder = tmp_path / "run"
    going = run(plan, folder, lambda name: tiny)
    next(going)
    with pytest.raises(ValueError, match="expected a folder that no run is using"):
        next(run(plan, folder, lambda name: tiny))
    going.close()
    rows = [asdict(row) for row in read_rows(folder / ROWS)]
    assert rows[0]["settings"]["precision"] == "float32"
    (folder / ROWS).write_text(
        json.dumps(rows[0] | {"settings": rows[0]["settings"] | {"precision": "bfloat16"}}) + "\n"
    )
    with pytest.raises(ValueError, match=r"got \w{12} in float32, where earlier rows have \w{12} in bfloat16"):
        list(run(plan, folder, lambda name: tiny))
    (folder / ROWS).write_text(json.dumps(rows[0] | {"model_sha256": "0" * 64}) + "\n")
    with pytest.raises(ValueError, match=r"expected the same weights and precision of tiny, .* rows have 0{12} in"):
        list(run(plan, folder, lambda name: tiny))
    (folder / ROWS).write_text(json.dumps(rows[0] | {"key": "another"}) + "\n")
    with pytest.raises(ValueError, match=r"expected rows of this plan .*, got 1 of another"):
        list(run(plan, folder, lambda name: tiny))
    (folder / ROWS).write_text("[]\n")
    with pytest.raises(ValueError, match="line 1: expected a JSON object, got list"):
        list(run(plan, folder, lambda name: tiny))


def test_an_attack_that_fails_on_the_clean_picture_flags_its_rows(
    plan: Plan, tmp_path: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(antidiffusion.bench.trials, "UNCHANGED", -1)  # whatever an edit does, it is not enough
    rows = run_all(plan, tmp_path / "run", tiny).values()
    assert {tuple(row["flags"]) for row in rows if row["kind"] == "edit"} == {(FAILED_ATTACK,)}
    assert {tuple(row["flags"]) for row in rows if row["kind"] == "protection"} == {()}


@pytest.mark.slow
def test_a_process_that_dies_is_a_sentence_and_the_others_go_on(tmp_path: Path, sd15: Checkpoint) -> None:
    plan, mark = Plan.read(write_plan(tmp_path, sd15.folder, items=1)), tmp_path / "died"
    done = list(run(plan, tmp_path / "run", partial(load_or_die, mark), jobs=2))
    errors = [outcome for outcome in done if outcome.error]
    assert mark.exists() and errors
    assert any("got a worker process that died" in str(outcome.error) for outcome in errors)
    assert len(done) == len(list(plan.trials())) and any(outcome.row for outcome in done)


@pytest.mark.slow
def test_processes_that_always_die_end_the_run(tmp_path: Path, sd15: Checkpoint) -> None:
    plan = Plan.read(write_plan(tmp_path, sd15.folder))
    with pytest.raises(ValueError, match=r"got a worker process that died, .* it was tried 3 times"):
        list(run(plan, tmp_path / "run", partial(load_or_die, None), jobs=2))


def test_missing_face_models_are_said_before_anything_runs(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"expected the packages dlib-bin and .*pip install 'antidiffusion\[eval\]'"):
        next(run(plan, tmp_path / "run", lambda name: pytest.fail("a model was loaded")))
    assert not (tmp_path / "run").exists()
