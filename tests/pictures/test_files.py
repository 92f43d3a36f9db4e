import itertools
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from antidiffusion.pictures import files
from antidiffusion.pictures.errors import PictureError
from antidiffusion.pictures.files import atomic, tidy


def save(folder: Path, content: str, *, overwrite: bool = False) -> None:
    with atomic(folder / "a.png", folder / "a.png.json", overwrite=overwrite) as parts:
        for part in parts:
            part.write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def killed_at_line(number: int, run: Callable[[], None]) -> bool:
    """Run in a child that kills itself before the n-th line of the module or its caller; False when it ends first."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    lines = itertools.count()

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in (files.__file__, __file__):
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process that kills itself at a chosen line")
@pytest.mark.parametrize("overwrite", [False, True])
def test_whatever_line_a_process_is_killed_at_both_files_appear_or_none(overwrite: bool, tmp_path: Path) -> None:
    old, new = ({"a.png": text, "a.png.json": text} for text in ("old", "new"))
    seen = set()
    for number in itertools.count(overwrite, 2):  # half the lines each: a fork of a process with torch takes long
        for path in tmp_path.iterdir():
            path.unlink()
        if overwrite:
            save(tmp_path, "old")
        was_killed = killed_at_line(number, lambda: save(tmp_path, "new", overwrite=overwrite))
        assert (tmp_path / "a.png.json").exists() or not (tmp_path / "a.png").exists()
        left = len(list(tmp_path.glob(".*")))
        assert tidy(tmp_path) == left and left <= 1
        found = contents(tmp_path)
        assert found in (old if overwrite else {}, new)
        seen.add((left, found == new))
        if not was_killed:
            break
    assert number > 50 and left == 0 and found == new
    assert seen == {(0, False), (1, False), (1, True), (0, True)}


def test_a_failing_block_leaves_what_was_there(tmp_path: Path) -> None:
    save(tmp_path, "old")
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), atomic(tmp_path / "a.png", overwrite=True) as (part,):
            part.write_text("half")
            raise error
    assert contents(tmp_path) == {"a.png": "old", "a.png.json": "old"}


def test_a_target_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="No such file"), atomic(tmp_path / "a", tmp_path / "b") as (part, _):
        part.write_text("alone")
    assert contents(tmp_path) == {}


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="existing"), atomic(tmp_path / "a.png") as (part,):
        part.write_text("mine")
        (tmp_path / "a.png").write_text("another's")
    assert contents(tmp_path) == {"a.png": "another's"}


def test_the_second_move_that_fails_is_made_up_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name == "a.png":
            raise PermissionError(1, "not now")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(PictureError, match="not now"):
            save(tmp_path, "new")
        assert not (tmp_path / "a.png").exists() and (tmp_path / "a.png.json").exists()
    assert tidy(tmp_path) == 1 and contents(tmp_path) == {"a.png": "new", "a.png.json": "new"}


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    (tmp_path / ".other.part").touch()
    with atomic(tmp_path / "a.png") as (part,):
        part.write_text("slow")
        assert tidy(tmp_path) == 0 and part.exists()
    assert contents(tmp_path) == {"a.png": "slow", ".other.part": ""}


def test_the_longest_name_can_be_written(tmp_path: Path) -> None:
    with atomic(tmp_path / ("x" * 255)) as (part,):
        part.touch()
    assert [len(path.name) for path in tmp_path.iterdir()] == [255]


def test_names_of_one_folder_are_needed(tmp_path: Path) -> None:
    for targets in ((tmp_path / "a", tmp_path / "b" / "a"), (tmp_path / "a", tmp_path / "a")):
        with pytest.raises(ValueError, match="expected different names in one folder"), atomic(*targets):
            pass
