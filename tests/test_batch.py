from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import antidiffusion.batch
import antidiffusion.card
from antidiffusion.batch import Job, Outcome, plan, run
from antidiffusion.models.base import Surrogate
from antidiffusion.recipes import AntiDiffusion, RandomSign

WHOLE = AntiDiffusion(steps=1, rounds=1, prompt_steps=1, tuning_steps=1)


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with `photos/a.jpg`, `photos/trip/b.PNG` and things that are no pictures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(antidiffusion.card, "HELD_OUT_STEPS", 1)
    folder = Path("photos")
    (folder / "trip").mkdir(parents=True)
    for seed, name in enumerate(("a.jpg", "trip/b.PNG")):
        draw(folder / name, seed)
    (folder / "notes.txt").write_text("no picture")
    (folder / "folder.png").mkdir()
    return folder


def draw(path: Path, seed: int = 0, height: int = 64, width: int = 70) -> Path:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
    return path


def pairs(jobs: list[Job]) -> list[tuple[str, str]]:
    return [(str(job.source), str(job.target)) for job in jobs]


def silent(job: Job) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: None


def outcomes(jobs: list[Job], surrogate: Surrogate, recipe: Any = WHOLE, **options: Any) -> list[Outcome]:
    return list(run(jobs, recipe, surrogate, progress=silent, **options))


def test_a_tree_is_mirrored(photos: Path) -> None:
    assert pairs(plan([photos], Path("out"))) == [
        ("photos/a.jpg", "out/a.png"),
        ("photos/trip/b.PNG", "out/trip/b.png"),
    ]


def test_hidden_files_are_left_out(photos: Path) -> None:
    (photos / ".thumbnails").mkdir()
    for name in ("._a.jpg", ".thumbnails/c.png"):
        draw(photos / name)
    assert [job.source.name for job in plan([photos], None)] == ["a.jpg", "b.PNG"]
    Path("photos").rename(".photos")
    assert len(plan([Path(".photos")], None)) == 2
    assert len(plan([Path(".photos/._a.jpg")], None)) == 1


def test_a_loop_of_links(photos: Path, tiny: Surrogate) -> None:
    (photos / "loop.png").symlink_to("loop.png")
    assert len(plan([photos], None)) == 2
    (outcome,) = outcomes(plan([photos / "loop.png"], None), tiny)
    assert "expected a picture file" in str(outcome.error)


def test_defaults_are_beside_the_input(photos: Path) -> None:
    assert pairs(plan([photos / "a.jpg"], None)) == [("photos/a.jpg", "photos/a-protected.png")]
    assert pairs(plan([photos], None))[1] == ("photos/trip/b.PNG", "photos-protected/trip/b.png")


@pytest.mark.parametrize(("inside", "given"), [("photos", "."), ("photos/trip", ".."), ("photos/trip", "../")])
def test_a_folder_without_a_name(photos: Path, monkeypatch: pytest.MonkeyPatch, inside: str, given: str) -> None:
    root = Path.cwd()
    monkeypatch.chdir(inside)
    targets = [job.target.resolve() for job in plan([Path(given)], None)]
    assert targets[0] == root / "photos-protected" / "a.png"


def test_a_linked_folder_keeps_its_name(photos: Path) -> None:
    Path("album").symlink_to("photos")
    assert plan([Path("album")], None)[0].target == Path("album-protected/a.png")


def test_one_picture_to_a_file_or_a_folder(photos: Path) -> None:
    source = photos / "a.jpg"
    Path("v1.0").mkdir()
    for given, wanted in (("b.webp", "b.webp"), ("out", "out/a.png"), ("v1.0", "v1.0/a.png")):
        assert plan([source], Path(given))[0].target == Path(wanted)


@pytest.mark.parametrize("name", ["b.jpg", "b.gif", "b.xyz"])
def test_lossy_output(photos: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"expected an output of \.png, .* got {name}; use \.png"):
        plan([photos / "a.jpg"], Path(name))


def test_several_pictures_to_one_file(photos: Path) -> None:
    Path("file").touch()
    for inputs in ([photos], [photos / "a.jpg", photos / "trip" / "b.PNG"]):
        for output in ("out.png", "out.jpg", "file"):
            with pytest.raises(ValueError, match=f"expected an output folder for several pictures, got {output}"):
                plan(inputs, Path(output))


def test_output_inside_an_input_folder(photos: Path) -> None:
    Path("link").symlink_to("photos")
    for inputs, output in (
        ([photos], photos / "protected"),
        ([photos], photos),
        ([photos], Path("link/out")),
        ([photos, photos / "trip"], None),  # photos/trip-protected
        ([photos / "a.jpg", photos], photos / "out"),
    ):
        with pytest.raises(
            ValueError, match=r"expected (an output outside the input folder|outputs that are no inputs)"
        ):
            plan(inputs, output)


def test_an_output_never_is_an_input(photos: Path) -> None:
    draw(photos / "a.png")
    for inputs, output in (
        ([photos / "a.jpg", photos / "a.png"], photos),  # a.jpg would replace a.png
        ([photos / "a.png"], photos),
        ([photos / "a.png"], photos / "a.png"),
    ):
        with pytest.raises(ValueError, match=r"expected outputs that are no inputs, got photos/a\.png"):
            plan(inputs, output)


def test_collisions(photos: Path) -> None:
    draw(photos / "a.webp")
    with pytest.raises(
        ValueError, match=r"expected one output name a picture, got out/a\.png for both .*a\.jpg and .*a\.webp"
    ):
        plan([photos], Path("out"))
    with pytest.raises(ValueError, match=r"for both photos/a\.jpg and photos/a\.webp"):
        plan([photos / "a.jpg", photos / "a.webp"], None)


def test_a_picture_named_twice_is_done_once(photos: Path) -> None:
    given = photos / "a.jpg"
    assert len(plan([given, given, given.resolve()], Path("out"))) == 1
    assert len(plan([photos, given], Path("out"))) == 2


def test_no_pictures(photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures \(.*\), got none in photos/empty; check"):
        plan([photos / "empty"], None)


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
        assert "expected a place to write to, got" in outcome.error
        assert outcome.error.endswith("; choose another output")


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
    remedy = "expected enough memory, got none left; try --low-memory, --dtype bfloat16 or a smaller --side"
    found = [o.error for o in outcomes(plan([photos], Path("out")), tiny, together=together)]
    assert found == [f"photos/a.jpg: {remedy}", f"photos/trip/b.PNG: {remedy}"]


def test_outcomes_come_one_by_one(photos: Path, tiny: Surrogate) -> None:
    results = run(plan([photos], Path("out")), RandomSign(), tiny, progress=silent)
    assert next(results).card
    assert Path("out/a.png").exists()
    assert not Path("out/trip").exists()


def test_inputs_are_never_touched(photos: Path, tiny: Surrogate) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    outcomes(plan([photos], None), tiny, RandomSign(), overwrite=True)
    assert {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()} == before
