import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import draw
from PIL import Image

import antidiffusion.batch
from antidiffusion.batch import Outcome, Settings, run
from antidiffusion.card import card_path, read_card
from antidiffusion.folders import Job
from antidiffusion.folders import plan as planned
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.picture import Picture, linf
from antidiffusion.process import stop_as_by_ctrl_c
from antidiffusion.recipes import AntiDiffusion, RandomSign

WHOLE = AntiDiffusion(steps=1, rounds=1, prompt_steps=1, tuning_steps=1)


def plan(inputs: list[Path], output: Path | None) -> list[Job]:
    return planned(inputs, output).jobs


def outcomes(jobs: list[Job], surrogate: Surrogate, recipe: Any = WHOLE, **options: Any) -> list[Outcome]:
    return list(run(jobs, Settings(recipe, **options), surrogate))


def kinds(found: list[Outcome]) -> list[str]:
    return [outcome.kind for outcome in found]


def test_a_loop_of_links(photos: Path, tiny: Surrogate) -> None:
    (photos / "loop.png").symlink_to("loop.png")
    assert len(plan([photos], None)) == 2
    (outcome,) = outcomes(plan([photos / "loop.png"], None), tiny)
    assert "expected a picture file" in str(outcome.error)


@pytest.mark.parametrize("together", [False, True])
def test_a_broken_picture_stops_no_other(photos: Path, tiny: Surrogate, together: bool) -> None:
    (photos / "0.png").write_bytes(b"no picture")
    draw(photos / "c.png", height=90)
    jobs = plan([photos, Path("missing.png")], Path("out"))
    results = outcomes(jobs, tiny, together=together)
    assert sorted(Path(str(o.job.source)).name for o in results) == ["0.png", "a.jpg", "b.PNG", "c.png", "missing.png"]
    failed = {o.job.source.name: o.error for o in results if o.card is None}
    assert failed.keys() == {"0.png", "missing.png"}
    assert failed["missing.png"] == "missing.png: expected a picture file, got no such file; check the path"
    written = {p.name for p in Path("out").rglob("*") if p.is_file()}
    assert written == {f"{name}.png{card}" for name in "abc" for card in ("", ".json")}
    assert {o.card["picture"]["protected_together"] for o in results if o.card} == {3 if together else 1}


def test_alone_and_in_a_folder(photos: Path, tiny: Surrogate) -> None:
    outcomes(plan([photos], Path("out")), tiny, seed=3)
    outcomes(plan([photos / "trip" / "b.PNG"], Path("alone.png")), tiny, seed=3)
    assert Path("alone.png").read_bytes() == Path("out/trip/b.png").read_bytes()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("taken", ["a.png", "a.png.json"])
def test_existing_outputs_are_kept(photos: Path, tiny: Surrogate, taken: str, together: bool) -> None:
    Path("out").mkdir()
    Path("out", taken).write_text("mine")
    jobs = plan([photos], Path("out"))
    first, second = outcomes(jobs, tiny, RandomSign(), together=together)
    assert first.error == f"out/{taken}: expected a new file, got an existing one; use --overwrite or another name"
    assert second.card
    assert Path("out", taken).read_text() == "mine"
    assert all(o.card for o in outcomes(jobs, tiny, RandomSign(), together=together, overwrite=True))


def refuse(*arguments: object, **options: object) -> None:
    raise AssertionError("the work was begun")


def test_nothing_is_begun_that_cannot_be_saved(photos: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antidiffusion.batch, "protect", refuse)
    Path("file").touch()
    long = draw(photos / f"{'x' * 240}.jpg")
    for job in (*plan([photos / "a.jpg"], Path("file/out")), *plan([long], None), Job(long, Path("/proc/out/a.png"))):
        (outcome,) = outcomes([job], tiny)
        assert outcome.error
        assert "expected a place to write to, got" in outcome.error or "expected a name of at most" in outcome.error
        assert outcome.error.endswith("choose another output")


def test_nothing_is_made_for_a_picture_that_cannot_be_read(photos: Path, tiny: Surrogate) -> None:
    outcomes(plan([Path("missing.png")], Path("out")), tiny)
    assert not Path("out").exists()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("can't allocate memory: you tried"),
    ],
    ids=repr,
)
def test_memory(
    photos: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch, error: Exception, together: bool
) -> None:
    def exhausted(pictures: Any, *arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(antidiffusion.batch, "protect", exhausted)
    found = [str(o.error) for o in outcomes(plan([photos], Path("out")), tiny, together=together)]
    assert [text.split(": ")[0] for text in found] == ["photos/a.jpg", "photos/trip/b.PNG"]
    assert all("expected enough memory, got none left; try --low-memory, --dtype bfloat16" in text for text in found)


def test_outcomes_come_one_by_one(photos: Path, tiny: Surrogate) -> None:
    results = run(plan([photos], Path("out")), Settings(RandomSign()), tiny)
    assert next(results).card
    assert Path("out/a.png").exists()
    assert not Path("out/trip").exists()


def test_inputs_are_never_touched(photos: Path, tiny: Surrogate) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    outcomes(plan([photos], None), tiny, RandomSign(), overwrite=True)
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before


def test_a_folder_is_gone_on_with(photos: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = plan([photos], Path("out"))
    first = outcomes(jobs, tiny, RandomSign())
    draw(photos / "c.png", 5)
    again = outcomes(plan([photos], Path("out")), tiny, RandomSign())
    assert (kinds(first), kinds(again)) == (["done", "done"], ["finished", "done", "finished"])
    assert [o.card for o in again if o.kind == "finished"] == [o.card for o in first]
    monkeypatch.setattr(antidiffusion.batch, "protect", refuse)
    assert kinds(outcomes(plan([photos], Path("out")), tiny, RandomSign())) == ["finished"] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"recipe": RandomSign(7)},
        {"seed": 1},
        {"side": 128},
        {"resize": 4000},
        {"together": True},
    ],
    ids=str,
)
def test_other_options_are_another_result(photos: Path, tiny: Surrogate, options: dict[str, Any]) -> None:
    jobs = plan([photos], Path("out"))
    before = outcomes(jobs, tiny, RandomSign())
    found = outcomes(jobs, tiny, **({"recipe": RandomSign()} | options))
    assert kinds(found) == ["failed", "failed"]
    assert all("got one of another picture or of other options; use --overwrite" in str(o.error) for o in found)
    assert [read_card(job.target) for job in jobs] == [o.card for o in before]
    assert kinds(outcomes(jobs, tiny, overwrite=True, **({"recipe": RandomSign()} | options))) == ["done", "done"]


def test_another_picture_or_model_is_another_result(photos: Path, tiny: Surrogate, mini: Surrogate) -> None:
    jobs = plan([photos / "a.jpg"], Path("out"))
    outcomes(jobs, tiny, RandomSign())
    assert kinds(outcomes(jobs, mini, RandomSign())) == ["failed"]
    draw(photos / "a.jpg", 9)
    assert kinds(outcomes(jobs, tiny, RandomSign())) == ["failed"]


def test_a_picture_or_a_card_alone_is_not_finished(photos: Path, tiny: Surrogate) -> None:
    (job,) = plan([photos / "a.jpg"], Path("out"))
    outcomes([job], tiny, RandomSign())
    content = job.target.read_bytes()
    job.target.unlink()
    assert kinds(outcomes([job], tiny, RandomSign())) == ["failed"]
    assert kinds(outcomes([job], tiny, RandomSign(), overwrite=True)) == ["done"]
    assert job.target.read_bytes() == content
    card_path(job.target).unlink()
    assert kinds(outcomes([job], tiny, RandomSign())) == ["failed"]


@pytest.mark.parametrize("with_card", [True, False])
def test_our_own_pictures_are_known(photos: Path, tiny: Surrogate, with_card: bool) -> None:
    (job,) = plan([photos / "a.jpg"], None)
    outcomes([job], tiny, RandomSign())
    assert job.target.parent == photos
    if not with_card:  # then by the mark in its metadata, in every format that has any
        card_path(job.target).unlink()
        for suffix in (".webp", ".tiff"):
            Picture.read(job.target).write(job.target.with_suffix(suffix))
            assert kinds(outcomes(plan([job.target.with_suffix(suffix)], Path("other")), tiny, RandomSign())) == ["own"]
            job.target.with_suffix(suffix).unlink()
    found = {o.job.source.name: o for o in outcomes(plan([photos], Path("out")), tiny, RandomSign())}
    assert {name: o.kind for name, o in found.items()} == {"a-protected.png": "own", "a.jpg": "done", "b.PNG": "done"}
    assert "--again" in str(found["a-protected.png"].error)
    assert not Path("out/a-protected.png").exists()


@pytest.mark.parametrize("there", [True, False])
def test_our_own_picture_again(photos: Path, tiny: Surrogate, there: bool) -> None:
    outcomes(plan([photos / "a.jpg"], None), tiny, RandomSign())
    clean = Picture.read(photos / "a.jpg")
    if not there:
        (photos / "a.jpg").unlink()
    jobs = plan([photos / "a-protected.png"], Path("out"))
    assert kinds(outcomes(jobs, tiny, RandomSign(3), seed=1, again=True)) == ["done"]
    distance = linf(Picture.read(jobs[0].target), clean)
    assert distance == 3 if there else distance > 8


def test_a_smaller_picture(photos: Path, tiny: Surrogate) -> None:
    Image.open(photos / "a.jpg").resize((200, 100)).convert("RGBA").save(photos / "a.png")
    (photos / "a.jpg").unlink()
    first, second = outcomes(plan([photos], Path("out")), tiny, RandomSign(), resize=128)
    assert first.card and second.card
    assert (first.card["picture"]["width"], first.card["picture"]["height"]) == (128, 64)
    assert first.card["picture"]["notes"][-1] == "resized from 200 x 100 to 128 x 64"
    assert first.card["budget"]["measured_against"] == "the resized original"
    assert first.card["budget"]["measured"] == 8
    assert Image.open("out/a.png").size == (128, 64)
    assert second.card["picture"]["notes"] == []  # small enough
    (found,) = outcomes(plan([photos / "a.png"], Path("other")), tiny, RandomSign(), resize=100)
    assert "expected at least 64 px on each side, got 100 x 50 after resizing" in str(found.error)


def test_a_jpeg_has_a_bound_of_its_own(photos: Path, tiny: Surrogate) -> None:
    jobs = planned([photos / "trip"], Path("out"), suffix=".jpg").jobs
    (found,) = outcomes(jobs, tiny, RandomSign(), quality=95)
    assert found.card, found.error
    budget = found.card["budget"]
    clean, written = Picture.read(photos / "trip/b.PNG"), Picture.read("out/b.jpg")
    assert 8 < budget["measured"] == linf(written, clean) <= budget["allowed_as_jpeg"] < 60
    assert (budget["requested"], budget["jpeg_quality"]) == (8, 95)
    Image.open(photos / "trip/b.PNG").convert("RGBA").rotate(45).save(photos / "trip/b.PNG")
    (found,) = outcomes(jobs, tiny, RandomSign(), quality=95, overwrite=True)
    assert "expected an opaque picture for JPEG, got one with alpha" in str(found.error)


def test_a_full_disk_is_known_before_the_work(photos: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antidiffusion.batch, "protect", refuse)
    usage = antidiffusion.batch.shutil.disk_usage(".")
    monkeypatch.setattr(antidiffusion.batch.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    (found,) = outcomes(plan([photos / "a.jpg"], Path("out")), tiny)
    assert "expected a place to write to, got 'room for 0.0 MB, and the picture may take 0.0 MB'" in str(found.error)
    assert not Path("out").exists()


def test_a_format_that_cannot_hold_a_picture_is_known_before_the_work(
    photos: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(antidiffusion.batch, "protect", refuse)
    draw(photos / "long.png", width=16_400)
    (found,) = outcomes(planned([photos / "long.png"], Path("out"), suffix=".webp").jobs, tiny)
    assert "expected at most 16383 px a side for WebP, got 16400 x 64" in str(found.error)


def test_what_a_killed_run_left_is_cleared(photos: Path, tiny: Surrogate) -> None:
    stage = Path("out/.antidiffusion-0.part")
    stage.mkdir(parents=True)
    (stage / "a.png").write_text("half")
    outcomes(plan([photos], Path("out")), tiny, RandomSign())
    assert not stage.exists()


def test_numbers_that_are_none(photos: Path, sd15: Any) -> None:
    for part in ("denoiser", "vae"):
        broken = Surrogate.from_pretrained(str(sd15.folder))
        with torch.no_grad():
            next(getattr(broken, part).parameters())[0] = float("nan")
        for recipe in (WHOLE, RandomSign(), AntiDiffusion(steps=1, rounds=0, prompt_steps=0)):
            (found,) = outcomes(plan([photos / "a.jpg"], Path("out")), broken, recipe)
            assert found.kind == "failed", (part, recipe)
            assert "expected finite numbers in the" in str(found.error)
            assert "try --dtype float32" in str(found.error)
            assert not list(Path("out").iterdir())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that is killed while it works")
@pytest.mark.parametrize("stop", ["SIGKILL", "SIGTERM", "SIGHUP", "full disk"])
def test_whatever_ends_a_run_the_next_one_completes_it(photos: Path, tiny: Surrogate, stop: str) -> None:
    """benchmarks/kills.py does this a hundred times with the whole command."""
    for number in range(4):
        draw(photos / f"c{number}.png", 5 + number)
    jobs = plan([photos], Path("whole"))
    whole = {o.job.target.relative_to("whole"): o.job.target.read_bytes() for o in outcomes(jobs, tiny, RandomSign())}
    jobs = plan([photos], Path("out"))
    draws = random.Random(stop)
    child = os.fork()
    if not child:
        try:
            for name in ("SIGTERM", "SIGHUP"):
                signal.signal(getattr(signal, name), signal.SIG_DFL)
            stop_as_by_ctrl_c()
            if stop == "full disk":
                limit = draws.randrange(max(map(len, whole.values())))
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            outcomes(jobs, tiny, RandomSign())
        finally:
            os._exit(0)
    if stop != "full disk":
        while not any(job.target.exists() for job in jobs):  # then somewhere in the next pictures
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.2))
        os.kill(child, getattr(signal, stop))
    os.waitpid(child, 0)
    for job in jobs:
        if job.target.exists():
            assert job.target.read_bytes() == whole[job.target.relative_to("out")]
            assert read_card(job.target)
    assert {o.kind for o in outcomes(jobs, tiny, RandomSign())} <= {"done", "finished"}
    assert {job.target.relative_to("out"): job.target.read_bytes() for job in jobs} == whole
    assert all(read_card(job.target) for job in jobs)
    assert not [path for path in Path("out").rglob("*") if path.name.startswith(".")]
