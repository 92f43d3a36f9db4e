import json
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import PROGRAM, QUIET, Run, cli, draw
from PIL import Image

import antidiffusion.batch
import antidiffusion.card
import antidiffusion.cli
import antidiffusion.models.loading
import antidiffusion.process
import antidiffusion.recipes
from antidiffusion import __version__
from antidiffusion.cli.shared import MINI_NOTE
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.canvas import Canvas
from antidiffusion.recipes import PRESETS, RECIPES, AntiDiffusion, OfficialAntiDiffusion, RandomSign, Trace

CONTROL = ["--recipe", "random-sign"]  # the fast one


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 60000 x 60000."""
    header = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_help_is_instant() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from antidiffusion.cli import app\n"
        "for arguments in (['--help'], ['protect', '--help'], ['--version']):\n"
        "    assert CliRunner().invoke(app, arguments).exit_code == 0\n"
        "print(*{'torch', 'diffusers', 'huggingface_hub', 'numpy'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=QUIET, check=True)
    assert run.stdout == "\n"


def test_version() -> None:
    assert cli("--version") == Run(0, f"antidiffusion {__version__}\n", "")


def test_text(loaded: Path) -> None:
    run = cli("protect", "photos", *CONTROL, "--model", "mini")
    assert run.code == 0
    lines = run.out.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [f"photos-protected/{n}.png" for n in "ab"]
    assert "  budget     8/255 measured on the written file, 8/255 allowed" in lines
    note, *table = run.err.splitlines()
    assert note == MINI_NOTE
    assert table[0].split() == ["2", "protected"]
    assert table[1].strip().startswith("at most 8/255, PSNR 30.")


def test_json(loaded: Path) -> None:
    run = cli("protect", "photos", *CONTROL, "--json", "--seed", "5")
    records = [json.loads(line) for line in run.out.splitlines()]
    for record in records:
        path = Path(record.pop("path"))
        assert json.loads(path.with_name(f"{path.name}.json").read_text()) == record
        assert record["seed"] == 5
    assert len(records) == 2


@pytest.mark.parametrize(("options", "setting"), [([], "keep"), (["--low-memory"], "give_back")])
def test_freed_memory_is_kept_unless_memory_is_low(
    here: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch, options: list[str], setting: str
) -> None:
    calls: list[str] = []
    for name in ("keep", "give_back"):
        monkeypatch.setattr(antidiffusion.process, f"{name}_freed_memory", partial(calls.append, name))
    monkeypatch.setattr(antidiffusion.models.loading, "load", lambda *names, **others: tiny)
    assert cli("protect", "photos/a.png", *CONTROL, "--model", "mini", *options).code == 0
    assert calls == [setting]


def test_the_note_about_mini(loaded: Path) -> None:
    for _ in range(2):
        assert MINI_NOTE in cli("protect", "photos/a.png", *CONTROL, "--overwrite", "--model", "mini").err
    assert cli("protect", "photos/a.png", *CONTROL, "--overwrite", "--model", "other").err == ""


def test_one_photo_alone(loaded: Path) -> None:
    assert cli("protect", "photos/a.png", "--steps", "1", "--rounds", "0").code == 0
    assert sorted(p.name for p in Path("photos").iterdir()) == [
        "a-protected.png",
        "a-protected.png.json",
        "a.png",
        "b.png",
    ]


@pytest.mark.parametrize(
    ("options", "recipe"),
    [
        ([], RECIPES["anti-diffusion"]),
        (["--quick"], PRESETS["anti-diffusion"]["quick"]),
        (["--strong", "--budget", "4"], AntiDiffusion(rounds=7, budget=4)),
        (["--quick", "--rounds", "2", "--steps", "1"], AntiDiffusion(rounds=2, steps=1, tuning_steps=0)),
        (
            ["--tuning-steps", "5", "--tuning", "lora"],
            AntiDiffusion(tuning_steps=5, tuning="lora"),
        ),
        (["--recipe", "official", "--budget", "7.5"], OfficialAntiDiffusion(budget=7.5)),
        (["--recipe", "random-sign", "--budget", "1"], RandomSign(1)),
    ],
)
def test_options_reach_the_recipe(
    loaded: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], recipe: object
) -> None:
    seen = []

    def run(jobs: object, settings: Any, *arguments: object, **options: object) -> list[object]:
        seen.append(settings.recipe)
        return []

    monkeypatch.setattr(antidiffusion.batch, "run", run)
    assert cli("protect", "photos", *options).code == 0
    assert seen == [recipe]


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "unknown recipe": (
        ["photos", "--recipe", "magic"],
        ["a recipe of anti-diffusion, official", "'magic'", "spelling"],
    ),
    "budget 0": (["photos", "--budget", "0"], ["a budget from 1 to 64", "got 0;", "try 8"]),
    "budget 65": (["photos", "--budget", "65"], ["a budget from 1 to 64", "got 65;", "try 8"]),
    "budget nan": (["photos", "--budget", "nan"], ["a budget from 1 to 64", "got nan;", "try 8"]),
    "quick and strong": (["photos", "--quick", "--strong"], ["--quick or --strong", "got both", "leave one out"]),
    "quick official": (
        ["photos", "--recipe", "official", "--quick"],
        ["anti-diffusion", "got official", "leave it out"],
    ),
    "steps of noise": (["photos", *CONTROL, "--steps", "2"], ["options of the recipe", "got --steps", "leave it out"]),
    "lora official": (
        ["photos", "--recipe", "official", "--tuning", "lora"],
        ["options of the recipe", "got --tuning", "leave it out"],
    ),
    "inside": (["photos", "-o", "photos/out"], ["outside the input folder photos", "got photos/out", "choose another"]),
    "jpeg": (["photos/a.png", "-o", "a.jpg"], ["an output of .png", "got a.jpg", "use .png"]),
    "file for many": (["photos", "-o", "a.png"], ["an output folder", "got a.png", "without a suffix"]),
    "no pictures": (["empty"], ["pictures (.", "got none in empty", "check the folder"]),
    "same names": (["photos", "photos/a.webp", "-o", "out"], ["one output name a picture", "out/a.png", "rename one"]),
    "too long": (["x" * 300], ["File name too long", "expected", "choose another"]),
}


@pytest.mark.parametrize(("arguments", "fragments"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_sentence(unused: Path, arguments: list[str], fragments: list[str]) -> None:
    before = sorted(Path().rglob("*"))
    run = cli("protect", *arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert run.err.count("\n") == 1
    assert "expected" in run.err
    assert [fragment for fragment in fragments if fragment not in run.err] == []
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    "option", [["--steps", "0"], ["--seed", "-1"], ["--seed", str(2**32)], ["--side", "1"], ["--bad"]]
)
def test_options_out_of_range(unused: Path, option: list[str]) -> None:
    run = cli("protect", "photos", *option)
    assert (run.code, run.out) == (2, "")
    assert option[0] in run.err


@pytest.mark.parametrize(
    ("model", "fragments"),
    [
        ("missing/folder/model", ["expected 'mini', a folder", "'missing/folder/model'", "check the spelling"]),
        ("photos", ["expected a diffusers folder with a model_index.json", "'photos'", "save_pretrained"]),
        ("photos/a.png", ["expected a .safetensors file", "photos/a.png", "convert it"]),
        ("old.ckpt", ["expected safetensors weights", "old.ckpt", "safe_serialization"]),
    ],
)
def test_a_wrong_model(here: Path, no_network: None, model: str, fragments: list[str]) -> None:
    run = cli("protect", "photos", "--model", model)
    assert (run.code, run.out, run.err.count("\n")) == (2, "", 1)
    assert run.err.startswith("error: ")
    assert [fragment for fragment in fragments if fragment not in run.err] == []
    assert not Path("photos-protected").exists()


def test_a_wrong_device(here: Path) -> None:
    run = cli("protect", "photos", "--device", "abacus")
    assert run.code == 2
    assert run.err.startswith("error: expected a device of this machine, got 'abacus' (")
    assert run.err.endswith("use cpu\n")


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda path: None, "expected a picture file, got no such file; check the path"),
    "empty": (lambda path: path.touch(), "got an empty one"),
    "text": (lambda path: path.write_text("hello"), "got no whole picture"),
    "truncated": (lambda path: path.write_bytes(draw(path).read_bytes()[:-3000]), "expected"),
    "bomb": (lambda path: path.write_bytes(bomb()), "got 3600000000 pixels; scale it down"),
    "small": (lambda path: draw(path, width=20), "expected"),
}


@pytest.mark.parametrize(("make", "fragment"), BROKEN.values(), ids=BROKEN)
def test_a_broken_picture(loaded: Path, make: Callable[[Path], Any], fragment: str) -> None:
    make(Path("x.png"))
    run = cli("protect", "x.png", "photos/a.png", "-o", "out", *CONTROL, "--model", "other")
    assert run.code == 1
    first, *table, last = run.err.splitlines()
    assert first.startswith("failed: x.png: expected ")
    assert fragment in first
    assert [line.split()[:2] for line in table][:2] == [["1", "protected"], ["1", "failed"]]
    assert last == "1 of 2 pictures failed"
    assert run.out.startswith("out/a.png\n")
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.png", "a.png.json"]


@pytest.mark.parametrize("together", [[], ["--together"]], ids=str)
def test_existing_outputs(loaded: Path, together: list[str]) -> None:
    Path("out").mkdir()
    Path("out/a.png").write_text("mine")
    run = cli("protect", "photos", "-o", "out", *CONTROL, *together)
    assert run.code == 1
    assert "failed: out/a.png: expected a new file, got an existing one; use --overwrite" in run.err
    assert Path("out/a.png").read_text() == "mine"
    assert run.out.startswith("out/b.png\n")
    assert cli("protect", "photos", "-o", "out", *CONTROL, *together, "--overwrite").code == 0
    assert Path("out/a.png").read_bytes().startswith(b"\x89PNG")


def test_together(loaded: Path) -> None:
    Path("photos/c.png").write_text("broken")
    cheap = ["--steps", "1", "--rounds", "0", "--together", "--json"]
    run = cli("protect", "photos", *cheap)
    assert run.code == 1
    cards = [json.loads(line) for line in run.out.splitlines()]
    assert [card["picture"]["protected_together"] for card in cards] == [2, 2]
    assert [card["picture"]["height"] for card in cards] == [64, 100]
    assert "failed: photos/c.png: expected" in run.err
    assert run.err.endswith("1 of 3 pictures failed\n")


def limited(size: int, *arguments: str) -> Run:
    """Run with files of at most `size` bytes, as on a full disk; Python ignores the signal that would tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return cli(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@dataclass(frozen=True)
class Nothing:
    """A recipe that leaves pictures alone: a flat one stays a small file."""

    budget: float = 8

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: torch.Generator, progress: Any
    ) -> Trace:
        return Trace(0, progress)


@pytest.mark.parametrize("size", [50, 800], ids=["picture", "card"])
def test_full_disk(loaded: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    Image.new("L", (64, 64), 128).save("photos/a.png")
    Path("photos/b.png").unlink()
    monkeypatch.setitem(RECIPES, "random-sign", Nothing())
    assert cli("protect", "photos", "-o", "fits", *CONTROL).code == 0
    assert 50 < Path("fits/a.png").stat().st_size < 800 < Path("fits/a.png.json").stat().st_size, "the test's premise"
    run = limited(size, "protect", "photos", "-o", "out", *CONTROL)
    assert (run.code, run.out) == (1, "")
    assert "failed: out/a.png: expected a writable place with room, got 'File too large'; choose another" in run.err
    assert list(Path("out").iterdir()) == []


def test_a_setting_that_the_model_refuses(loaded: Path, monkeypatch: pytest.MonkeyPatch, sd15: Any) -> None:
    half = Surrogate.from_pretrained(str(sd15.folder), dtype=torch.bfloat16)
    monkeypatch.setattr(antidiffusion.cli.shared, "load_surrogate", lambda *options, **named: half)
    run = cli("protect", "photos/a.png", "--tuning", "full", "--steps", "1", "--rounds", "1")
    assert run.code == 1
    assert "failed: photos/a.png: expected float32 weights for full tuning, got torch.bfloat16; use float32" in run.err


def test_unwritable_output(loaded: Path) -> None:
    Path("file").touch()
    run = cli("protect", "photos/a.png", "-o", "file/out", *CONTROL)
    assert (run.code, run.out) == (1, "")
    assert (
        "failed: file/out/a.png: expected a place to write to, got 'Not a directory'; choose another output" in run.err
    )


@pytest.mark.parametrize(
    "name", ["[bold].png", ":cat: [red].png", "ünï  cödé \N{HAMSTER FACE}.png", "-x.png", "a.b.c.png"]
)
def test_strange_names(loaded: Path, name: str) -> None:
    draw(name)
    good = cli("protect", *CONTROL, "-o", "out", "--", name)
    assert good.code == 0
    assert good.out.startswith(f"out/{name}\n")
    assert Path("out", name).exists()
    again = cli("protect", *CONTROL, "-o", "out", "--", name)
    assert (again.code, again.out) == (0, "")
    assert "1  finished before, with the same options" in again.err


def test_offline_is_set_before_the_hub_is_imported() -> None:
    code = (
        "import os, sys; from antidiffusion.cli.shared import common; common(offline=True)\n"
        "print(os.environ['HF_HUB_OFFLINE'], 'huggingface_hub' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=QUIET, check=True)
    assert run.stdout == "1 False\n"


def test_offline_asks_no_hub(here: Path, no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # and take back what the command sets
    run = cli("--offline", "protect", "photos", "--model", "nobody/nothing")
    assert run.code == 2
    assert "'nobody/nothing', which is not in the local cache" in run.err


@dataclass(frozen=True)
class Interrupted:
    """A recipe in which the user presses Ctrl-C at the second picture."""

    budget: float = 8

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: torch.Generator, progress: Any
    ) -> Trace:
        if canvases[0].clean.shape[2] == 100 or len(canvases) > 1:
            raise KeyboardInterrupt
        return RandomSign(self.budget)(canvases, surrogate, generator, progress)


@pytest.mark.parametrize(("together", "finished"), [([], 1), (["--together"], 0)])
def test_interrupted(loaded: Path, monkeypatch: pytest.MonkeyPatch, together: list[str], finished: int) -> None:
    monkeypatch.setitem(RECIPES, "random-sign", Interrupted())
    run = cli("protect", "photos", "-o", "out", *CONTROL, *together)
    assert run.code == 130
    assert f"interrupted with {finished} of 2 pictures finished" in run.err
    assert "run the same command again" in run.err
    assert sorted(p.name for p in Path("out").iterdir()) == ["a.png", "a.png.json"][: 2 * finished]


def test_interrupted_while_loading(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*options: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(antidiffusion.cli.shared, "load_surrogate", interrupted)
    for arguments in (["protect", "photos"], ["demo"], ["sample", "a person", "-o", "x.png"]):
        run = cli(*arguments)
        assert run.code == 130
        assert "run the same command again" in run.err


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_stops_a_program_is_like_ctrl_c(here: Path, name: str) -> None:
    """The whole program, with a name that is no text, stopped in its second picture."""
    first = os.fsdecode(b"photos/\xff.png")
    Path("photos/a.png").rename(first)
    Path("out").mkdir()
    draw(os.fsdecode(b"out/\xff.png"))
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    with subprocess.Popen(
        [*PROGRAM, "protect", first, "photos/b.png", "--model", "mini", "--steps", "1000", "-o", "out", "--log", "log"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=QUIET,
        text=True,
        preexec_fn=lambda: [signal.signal(stop, signal.SIG_DFL) for stop in stops],  # a job may inherit "ignore"
    ) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith(r"failed: out/\udcff.png: expected a new file"):  # the second has begun
                    break
            process.send_signal(getattr(signal, name))
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
    assert (process.returncode, out) == (130, "")
    assert "interrupted with 0 of 2 pictures finished" in err
    assert "Traceback" not in err
    assert [os.fsencode(p.name) for p in Path("out").iterdir()] == [b"\xff.png"]
    assert [line.split(" ", 1)[1][:9] for line in Path("log").read_text().splitlines()] == ["failed: o", "interrupt"]


def test_a_closed_pipe(loaded: Path) -> None:
    """`antidiffusion ... | head -0` ends without a traceback."""
    code = f"""
import antidiffusion.batch as batch, antidiffusion.cli as cli
from pathlib import Path
cli.shared.load_surrogate = lambda *options, **named: None
cli.telling.summary = lambda path, card: path
card = {{"budget": {{"measured": 0}}, "fidelity": {{"psnr": 1}}, "cost": {{"seconds": 1}}}}
batch.run = lambda jobs, *_, **__: [batch.Outcome(job, "done", card) for job in jobs]
import sys; sys.argv[1:] = {["protect", "photos"]!r}
cli.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=QUIET)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == 1
    assert "Traceback" not in err


def test_demo(loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def run_demo(output: Path, surrogate: Surrogate, recipe: Any, *, seed: int, progress: Any) -> Path:
        progress("drawing", 1, 2)
        seen.append((output, recipe, seed))
        return output / "index.html"

    monkeypatch.setattr("antidiffusion.demo.run_demo", run_demo)
    run = cli("demo", "-o", "show", "--quick", "--budget", "4", "--seed", "9")
    assert (run.code, run.out, run.err) == (0, "show/index.html\n", "")
    assert seen == [(Path("show"), AntiDiffusion(4, rounds=0, steps=25, tuning_steps=0), 9)]
    assert cli("demo", "--budget", "0").code == 2


def test_a_dry_run_writes_nothing(loaded: Path) -> None:
    short = ["--steps", "2", "--rounds", "0", "--quick"]
    run = cli("protect", "photos", *short, "--dry-run")
    assert run.code == 0
    said = r"about [\d.]+ s for 2 picture\(s\), \d+ MB at the peak, 0.0 MB of files at most; nothing was written\n"
    assert re.fullmatch(said, run.out), run.out
    as_json = json.loads(cli("protect", "photos/a.png", *short, "--dry-run", "--json").out)
    assert as_json.keys() == {"pictures", "seconds", "peak_memory_mb", "output_mb"} and as_json["pictures"] == 1
    assert not Path("photos-protected").exists()
    assert sorted(Path().rglob("*.png")) == [Path("photos/a.png"), Path("photos/b.png")]


def test_a_dry_run_knows_few_recipes(unused: Path) -> None:
    run = cli("protect", "photos", *CONTROL, "--dry-run")
    assert (run.code, run.out) == (2, "")
    assert "expected --dry-run with anti-diffusion, latents or official, got random-sign" in run.err


def test_a_dry_run_survives_a_broken_picture_and_knows_what_is_done(loaded: Path) -> None:
    short = ["--steps", "1", "--rounds", "0", "--quick"]
    assert cli("protect", "photos", *short).code == 0
    Path("photos/c.png").write_text("broken")
    draw("photos/d.png", 5)
    run = cli("protect", "photos", *short, "--dry-run", "--json")
    assert run.code == 1
    assert json.loads(run.out)["pictures"] == 1
    assert "failed: photos/c.png: expected" in run.err


def test_a_dry_run_of_nothing(loaded: Path) -> None:
    short = ["--steps", "1", "--rounds", "0", "--quick"]
    assert cli("protect", "photos", *short).code == 0
    run = cli("protect", "photos", *short, "--dry-run")
    assert run.code == 0
    assert run.out.startswith("about 0 s for 0 picture(s)")
