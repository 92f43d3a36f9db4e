import json
import re
from pathlib import Path

import pytest
import torch
from command_line import cli, draw
from PIL import Image
from typer.testing import CliRunner

from antidiffusion.cli.shared import app
from antidiffusion.models.base import Surrogate

CONTROL = ["--recipe", "random-sign"]  # the fast one


def test_every_picture_is_accounted_for(loaded: Path) -> None:
    """Done, finished before, our own, failed and left out, each said once, counted and in the log."""
    assert cli("protect", "photos/a.png", *CONTROL).code == 0
    assert cli("protect", "photos/b.png", "-o", "out", *CONTROL).code == 0
    draw("photos/c.png", 3)
    Path("photos/d.png").write_text("broken")
    Path("photos/e.jxl").touch()
    Path("photos/f").symlink_to("nowhere")
    Path("photos/g.jpg").symlink_to("nowhere")
    run = cli("protect", "photos", "-o", "out", *CONTROL, "--model", "other", "--log", "log")
    assert run.code == 1
    said, table = run.err.splitlines()[:4], run.err.splitlines()[4:-1]
    assert [line.split(";")[0] for line in said[:2]] == [
        "left out: photos/e.jxl: JPEG XL format",
        "left out: photos/g.jpg: link to nothing",
    ]
    assert said[2].startswith("left as it is: photos/a-protected.png: expected an untouched picture")
    assert said[3].startswith("failed: photos/d.png: expected")
    counts = {" ".join(line.split()[1:3]): int(line.split()[0]) for line in table if line[0] != " "}
    assert counts == {
        "protected": 2,
        "finished before,": 1,
        "made by": 1,
        "failed": 1,
        "left out:": 1,
    }
    assert [line for line in run.out.splitlines() if line[0] != " "] == ["out/a.png", "out/c.png"]
    log = [line.split(" ", 1)[1] for line in Path("log").read_text().splitlines()]
    assert log[2].startswith("left as it is: photos/a-protected.png")
    assert log[3].startswith("protected: out/a.png: 8/255")
    assert log[4] == "finished before: out/b.png"
    assert log[7].startswith("2 protected, 1 finished before, with the same options, 1 made by antidiffusion")


@pytest.mark.parametrize("character", ["\n", "\x1b", "\u202e", "\u2028"], ids=ascii)
def test_what_a_terminal_obeys_is_escaped(loaded: Path, character: str) -> None:
    escaped = character.encode("unicode_escape").decode()
    draw(f"a{character}b.png")
    Path(f"c{character}d.png").write_text("broken")
    run = cli("protect", f"a{character}b.png", f"c{character}d.png", "-o", "out", *CONTROL, "--log", "log")
    assert Path("out", f"a{character}b.png").exists()
    assert run.out.splitlines()[0] == f"out/a{escaped}b.png"
    assert f"failed: c{escaped}d.png: expected" in run.err
    assert character not in run.err.replace("\n", "" if character == "\n" else "\n")[:1]
    assert all(character not in text for text in (run.out, run.err, Path("log").read_text()) if character != "\n")


def test_json_and_the_format_of_pictures(loaded: Path) -> None:
    for name in ("webp", "tiff"):
        run = cli("protect", "photos/a.png", *CONTROL, "--format", name, "--json")
        assert json.loads(run.out)["path"] == f"photos/a-protected.{name}"
        assert Image.open(f"photos/a-protected.{name}").format == name.upper()
    run = cli("protect", "photos/a.png", *CONTROL, "--jpeg", "95")
    assert re.search(r"budget     \d+/255 measured on the written file, 8/255 allowed, 38/255 as JPEG of", run.out)
    assert cli("protect", "photos/a.png", "--jpeg", "95", "--format", "png").code == 2
    assert "expected --format or --jpeg, got both" in cli("protect", "photos", "--jpeg", "95", "--format", "png").err


def test_standard_streams(loaded: Path) -> None:
    original = Path("photos/a.png").read_bytes()
    arguments = ["protect", "-", *CONTROL, "--model", "other"]
    result = CliRunner().invoke(app, arguments, input=original)
    assert result.exit_code == 0, result.stderr
    cli("protect", "photos/a.png", "-o", "out.png", *CONTROL)
    assert result.stdout_bytes == Path("out.png").read_bytes()
    card = json.loads(result.stderr)
    assert card["budget"]["measured"] == 8
    assert "source" not in card
    out = CliRunner().invoke(app, ["protect", "photos/a.png", "-o", "-", *CONTROL, "--format", "webp"])
    assert out.stdout_bytes[8:12] == b"WEBP"
    broken = CliRunner().invoke(app, arguments, input=b"no picture")
    assert (broken.exit_code, broken.stdout_bytes) == (1, b"")
    assert "failed: standard input: expected" in broken.stderr
    assert cli("protect", "-", "photos/a.png").code == 2


def test_a_preview(loaded: Path) -> None:
    cli("protect", "photos/a.png", "-o", "out", *CONTROL)
    run = cli("protect", "photos", "-o", "out", *CONTROL, "--preview")
    assert run.out.splitlines()[-1] == "out/preview.html"
    page = Path("out/preview.html").read_text()
    assert page.count("data:image/webp;base64,") == 6
    run = cli("protect", "photos/b.png", *CONTROL, "--preview")
    assert run.out.splitlines()[-1] == "photos/b-protected.png.html"


def test_memory_that_is_not_enough(loaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(Surrogate, "embed", exhausted)
    commands = [
        ["sample", "a person", "-o", "x.png", "--steps", "1"],
        ["edit", "sdedit", "photos/a.png", "--prompt", "a", "-o", "x.png"],
        ["attack", "lora", "photos/a.png", "--prompt", "a", "-o", "x.png"],
        ["protect", "photos/a.png", "--quick"],
    ]
    for command in commands:
        run = cli(*command)
        assert run.code == 1
        assert "expected enough memory, got none left; try --low-memory" in run.err
        assert not Path("x.png").exists()
