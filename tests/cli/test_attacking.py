from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import cli, draw
from PIL import Image
from torch import Tensor

import antidiffusion.models.memory
from antidiffusion.attacks import EDITS, TUNINGS
from antidiffusion.cli import attacking
from antidiffusion.models.base import Surrogate

EDIT = ["--prompt", "a red hat", "-o", "x.png", "--steps", "2"]
TUNE = ["--prompt", "a photo of sks person", "-o", "x.png", "--steps", "1"]
LORA = [("lora", "bfloat16"), ("lora", "float16")]


def test_sample(loaded: Path, tiny: Surrogate) -> None:
    run = cli("sample", "a person", "a hat", "-o", "new/x.png", "--steps", "2", "--seed", "3")
    assert (run.code, run.out, run.err) == (0, "new/x.png\n", "")
    first = np.asarray(Image.open("new/x.png"))
    assert first.shape == (64, 128, 3)
    assert (first[:, :64] != first[:, 64:]).any()
    cli("sample", "a person", "a hat", "-o", "y.png", "--steps", "2", "--seed", "3")
    assert Path("y.png").read_bytes() == Path("new/x.png").read_bytes()
    cli("sample", "a person", "-o", "z.png", "--steps", "2", "--seed", "4")
    assert (np.asarray(Image.open("z.png")) != first[:, :64]).any()


def test_sample_mistakes(unused: Path) -> None:
    before = Path("photos/a.png").read_bytes()
    for output, fragment in (
        ("photos/a.png", "expected a new file, got an existing one; use --overwrite"),
        ("x.jpg", "expected an output of .png"),
        ("photos/a.png/x.png", "expected a place to write to"),
    ):
        run = cli("sample", "a person", "-o", output)
        assert (run.code, run.out) == (2, "")
        assert run.err.startswith("error: ")
        assert fragment in run.err
    assert Path("photos/a.png").read_bytes() == before


@pytest.mark.parametrize("method", EDITS)
def test_edit(loaded: Path, tiny: Surrogate, method: str) -> None:
    draw("photos/wide.png", height=100, width=250)
    Image.fromarray(np.uint8(np.arange(250) > 120) * 255 * np.ones((100, 1), np.uint8)).save("mask.png")
    mask = ["--mask", "mask.png"] if method == "inpaint" else []
    command = ["edit", method, "photos/wide.png", "--source-prompt", "a hat", *EDIT, *mask]
    run = cli(*command)
    assert (run.code, run.out) == (0, "x.png\n"), run.err
    first = np.asarray(Image.open("x.png"))
    assert first.shape == (64, 128, 3)
    assert cli(*command, "-o", "lean.png", "--low-memory").code == 0
    assert Path("lean.png").read_bytes() == Path("x.png").read_bytes()
    cli(*command, "--overwrite", "--guidance", "9", "--seed", "1")
    assert (np.asarray(Image.open("x.png")) != first).any()


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["sdedits", "photos/a.png"], "expected a method of sdedit, "),
        (["masactrl", "photos/a.png", "--strength", "0.5"], "expected options of masactrl, got --strength"),
        (["sdedit", "photos/a.png", "--strength", "2"], "expected a strength in (0, 1]"),
        (["sdedit", "photos/a.png", "--steps", "0"], "expected at least 1 step, got 0"),
        (["inpaint", "photos/a.png"], "expected --mask with inpaint"),
        (["sdedit", "photos/a.png", "--mask", "photos/b.png"], "expected --mask with inpaint and with no other"),
        (["sdedit", "photos/none.png"], "photos/none.png"),
        (["sdedit", "photos/a.png", "-o", "photos/b.png"], "got an existing one"),
    ],
)
def test_edit_mistakes(unused: Path, arguments: list[str], fragment: str) -> None:
    run = cli("edit", *EDIT[:4], *arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert fragment in run.err


def test_a_mask_of_another_size(loaded: Path) -> None:
    run = cli("edit", "inpaint", "photos/a.png", "--mask", "photos/b.png", *EDIT)
    assert (run.code, run.out) == (2, "")
    assert "expected a mask of 70 x 64 pixels, got 70 x 100" in run.err
    assert not Path("x.png").exists()


@pytest.mark.parametrize("method", TUNINGS)
def test_attack(loaded: Path, tiny: Surrogate, method: str) -> None:
    before = [parameter.clone() for parameter in tiny.denoiser.parameters()]
    run = cli("attack", method, "photos", *TUNE, "--sample", "a hat", "--sample", "a person", "--save", "weights")
    assert (run.code, run.out) == (0, "x.png\n"), run.err
    assert np.asarray(Image.open("x.png")).shape == (64, 128, 3)
    assert any(Path("weights").rglob("*.safetensors"))
    assert not [path for path in Path().iterdir() if path.name.startswith(".")]
    assert all(torch.equal(*pair) for pair in zip(before, tiny.denoiser.parameters(), strict=True))
    run = cli(
        "attack", method, "photos", *TUNE, "--sample", "a hat", "--sample", "a person", "-o", "y.png", "--low-memory"
    )
    assert run.code == 0, run.err
    assert Path("y.png").read_bytes() == Path("x.png").read_bytes()


@pytest.fixture
def spared(tiny: Surrogate, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to spare memory, in order."""
    done: list[str] = []

    @contextmanager
    def offload(surrogate: Surrogate) -> Iterator[None]:
        done.append("offload")
        yield
        done.append("back")

    monkeypatch.setattr(antidiffusion.models.memory, "offload", offload)
    monkeypatch.setattr(type(tiny.denoiser), "enable_gradient_checkpointing", lambda unet: done.append("checkpoint"))
    return done


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["--gradient-checkpointing"], ["checkpoint"]),
        (["--low-memory"], ["offload", "checkpoint", "back"]),
    ],
)
def test_flags_that_spare_memory(loaded: Path, spared: list[str], flags: list[str], expected: list[str]) -> None:
    run = cli("attack", "lora", "photos", *TUNE, *flags)
    assert run.code == 0, run.err
    assert spared == expected
    if "--gradient-checkpointing" not in flags:
        spared.clear()
        run = cli("edit", "sdedit", "photos/a.png", *EDIT, "--overwrite", *flags)
        assert run.code == 0, run.err
        assert spared == [step for step in expected if step != "checkpoint"]


@pytest.mark.parametrize(("method", "dtype"), [*((name, "bfloat16") for name in EDITS), *LORA])
def test_half_precision(here: Path, sd15, method: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Tensor] = []
    monkeypatch.setattr(attacking, "_write", lambda x, *options: written.append(x))
    Image.new("L", (70, 64), 255).save("mask.png")
    mask = ["--mask", "mask.png"] if method == "inpaint" else []
    command = ["edit", method, "photos/a.png", "--source-prompt", "a hat", *EDIT, *mask]
    if method == "lora":
        command = ["attack", "lora", "photos", *TUNE, "--steps", "4", "--learning-rate", "1e-2", "--guidance", "1"]
    run = cli(*command, "--model", sd15.folder, "--dtype", dtype, "--device", "cpu")
    assert run.code == 0, run.err
    assert written[0].isfinite().all() and written[0].std() > 0.01


def test_attack_draws_with_its_guidance(loaded: Path) -> None:
    drawn = []
    for guidance in ("1", "9"):
        assert cli("attack", "lora", "photos", *TUNE, "--guidance", guidance, "--overwrite").code == 0
        drawn.append(Path("x.png").read_bytes())
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["dreamboat", "photos"], "expected a method of dreambooth, "),
        (["lora", "empty"], "got none in empty"),
        (["lora", "photos", "--steps", "0"], "steps"),
        (["dreambooth", "photos", "--rank", "4"], "expected options of dreambooth, got --rank"),
        (["lora", "photos", "--save", "photos"], "got an existing one"),
        (["lora", "photos/none.png"], "photos/none.png"),
    ],
)
def test_attack_mistakes(unused: Path, arguments: list[str], fragment: str) -> None:
    run = cli("attack", *TUNE[:4], *arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err.startswith("error: ")
    assert fragment in run.err


def test_a_long_prompt_is_noted(loaded: Path) -> None:
    run = cli("sample", "a hat " * 40, "-o", "x.png", "--steps", "1")
    assert run.code == 0
    assert run.err.startswith("note: expected a prompt of at most ")


def test_dreambooth_tunes_the_text_encoder_when_asked(loaded: Path) -> None:
    for number, flags in enumerate(([], ["--text-encoder"])):
        run = cli("attack", "dreambooth", "photos", *TUNE, "--save", f"tuned{number}", "--overwrite", *flags)
        assert run.code == 0, run.err
    name = Path("text_encoder") / "model.safetensors"
    assert (Path("tuned0") / name).read_bytes() != (Path("tuned1") / name).read_bytes()


@pytest.mark.parametrize(
    ("method", "options"), [("textual-inversion", ["--text-encoder"]), ("lora", ["--placeholder", "sks"])]
)
def test_options_of_another_tuning(unused: Path, method: str, options: list[str]) -> None:
    run = cli("attack", method, "photos", *TUNE, *options)
    assert (run.code, run.out) == (2, "")
    assert f"expected options of {method}, got {options[0]}; leave it out" in run.err


def test_a_picture_of_numbers_that_are_none_is_not_written(
    loaded: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny, "decode", lambda z: torch.full((len(z), 3, 64, 64), float("nan")))
    commands = [
        ["sample", "a person", "--steps", "1"],
        ["edit", "sdedit", "photos/a.png", "--prompt", "a", "--steps", "2"],
        ["attack", "lora", "photos/a.png", "--prompt", "a", "--steps", "1", "--save", "tuned"],
    ]
    for command in commands:
        run = cli(*command, "-o", "x.png")
        assert run.code == 1
        assert "expected finite numbers in the picture that the" in run.err
        assert not Path("x.png").exists() and not Path("tuned").exists()
