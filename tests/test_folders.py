import os
from pathlib import Path

import numpy as np
import pytest
from command_line import draw
from PIL import Image

from antidiffusion.folders import Job, Left, counted, expect_nameable, plan, sniffed, walk
from antidiffusion.pictures.errors import PictureError


def jobs(inputs: list[Path], output: Path | None, suffix: str | None = None) -> list[Job]:
    return plan(inputs, output, suffix=suffix).jobs


def pairs(jobs: list[Job]) -> list[tuple[str, str]]:
    return [(str(job.source), str(job.target)) for job in jobs]


def test_a_tree_is_mirrored(photos: Path) -> None:
    assert pairs(jobs([photos], Path("out"))) == [
        ("photos/a.jpg", "out/a.png"),
        ("photos/trip/b.PNG", "out/trip/b.png"),
    ]


def test_hidden_files_are_left_out(photos: Path) -> None:
    (photos / ".thumbnails").mkdir()
    for name in ("._a.jpg", ".thumbnails/c.png"):
        draw(photos / name)
    assert [job.source.name for job in jobs([photos], None)] == ["a.jpg", "b.PNG"]
    Path("photos").rename(".photos")
    assert len(jobs([Path(".photos")], None)) == 2
    assert len(jobs([Path(".photos/._a.jpg")], None)) == 1


def test_defaults_are_beside_the_input(photos: Path) -> None:
    assert pairs(jobs([photos / "a.jpg"], None)) == [("photos/a.jpg", "photos/a-protected.png")]
    assert pairs(jobs([photos], None))[1] == ("photos/trip/b.PNG", "photos-protected/trip/b.png")


@pytest.mark.parametrize(("inside", "given"), [("photos", "."), ("photos/trip", ".."), ("photos/trip", "../")])
def test_a_folder_without_a_name(photos: Path, monkeypatch: pytest.MonkeyPatch, inside: str, given: str) -> None:
    root = Path.cwd()
    monkeypatch.chdir(inside)
    targets = [job.target.resolve() for job in jobs([Path(given)], None)]
    assert targets[0] == root / "photos-protected" / "a.png"


def test_a_linked_folder_keeps_its_name(photos: Path) -> None:
    Path("album").symlink_to("photos")
    assert jobs([Path("album")], None)[0].target == Path("album-protected/a.png")


def test_one_picture_to_a_file_or_a_folder(photos: Path) -> None:
    source = photos / "a.jpg"
    Path("v1.0").mkdir()
    for given, wanted in (("b.webp", "b.webp"), ("out", "out/a.png"), ("v1.0", "v1.0/a.png")):
        assert jobs([source], Path(given))[0].target == Path(wanted)


@pytest.mark.parametrize("name", ["b.jpg", "b.gif", "b.xyz"])
def test_lossy_output(photos: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"expected an output of \.png, .* got {name}; use \.png"):
        jobs([photos / "a.jpg"], Path(name))


def test_several_pictures_to_one_file(photos: Path) -> None:
    Path("file").touch()
    for inputs in ([photos], [photos / "a.jpg", photos / "trip" / "b.PNG"]):
        for output in ("out.png", "out.jpg", "file"):
            with pytest.raises(ValueError, match=f"expected an output folder for several pictures, got {output}"):
                jobs(inputs, Path(output))


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
            jobs(inputs, output)


def test_an_output_never_is_an_input(photos: Path) -> None:
    draw(photos / "a.png")
    for inputs, output in (
        ([photos / "a.jpg", photos / "a.png"], photos),  # a.jpg would replace a.png
        ([photos / "a.png"], photos),
        ([photos / "a.png"], photos / "a.png"),
    ):
        with pytest.raises(ValueError, match=r"expected outputs that are no inputs, got photos/a\.png"):
            jobs(inputs, output)


def test_collisions(photos: Path) -> None:
    draw(photos / "a.webp")
    with pytest.raises(
        ValueError, match=r"expected one output name a picture, got out/a\.png for both .*a\.jpg and .*a\.webp"
    ):
        jobs([photos], Path("out"))
    with pytest.raises(ValueError, match=r"for both photos/a\.jpg and photos/a\.webp"):
        jobs([photos / "a.jpg", photos / "a.webp"], None)


def test_a_picture_named_twice_is_done_once(photos: Path) -> None:
    given = photos / "a.jpg"
    assert len(jobs([given, given, given.resolve()], Path("out"))) == 1
    assert len(jobs([photos, given], Path("out"))) == 2


def test_no_pictures(photos: Path) -> None:
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures \(.*\), got none in photos/empty; check"):
        jobs([photos / "empty"], None)


def left(folder: Path) -> dict[str, str]:
    found = [entry for entry in walk(folder) if isinstance(entry, Left)]
    return {entry.path.relative_to(folder).as_posix(): entry.reason for entry in found}


def test_what_is_left_out_is_named(photos: Path) -> None:
    (photos / "a.psd").touch()
    (photos / "IMG_1").write_bytes(b"\xff\x0a")
    (photos / "b.nef").write_bytes(b"MM\0*")
    (photos / "layers.dat").write_bytes(b"8BPS\0\1")
    (photos / "elsewhere").symlink_to("trip")
    (photos / "gone.jpg").symlink_to("nowhere")
    (photos / "notes").symlink_to("nowhere")
    (photos / ".git").mkdir()
    (photos / ".thumbs").mkdir()
    for name in (".thumbs/c.png", "._a.jpg"):
        draw(photos / name)
    assert left(photos) == {
        ".thumbs": "hidden",
        "._a.jpg": "hidden",
        "IMG_1": "JPEG XL format",
        "a.psd": "Photoshop format",
        "b.nef": "raw format",
        "layers.dat": "Photoshop format",
        "elsewhere": "link to a folder",
        "gone.jpg": "link to nothing",
    }
    found = plan([photos], None)
    assert len(found.jobs) == 2
    assert counted(found.left).startswith("1 JPEG XL format, 2 Photoshop format, 2 hidden, 1 link to a")


def test_a_picture_without_a_suffix_is_taken(photos: Path) -> None:
    rgb = Image.fromarray(np.zeros((64, 64, 3), np.uint8))
    kinds = ("GIF", "JPEG", "PNG", "TIFF", "WEBP")
    for kind in kinds:
        rgb.save(photos / f"x-{kind}", kind)
        assert sniffed(photos / f"x-{kind}")
    rgb.save(photos / "download.php", "PNG")
    taken = [job.source.name for job in jobs([photos], None)]
    assert taken == ["a.jpg", "download.php", "b.PNG", *(f"x-{kind}" for kind in kinds)]
    assert left(photos) == {}


def test_a_link_to_a_picture_is_followed(photos: Path) -> None:
    (photos / "z.png").symlink_to("trip/b.PNG")
    assert [job.source.name for job in jobs([photos], None)] == ["a.jpg", "b.PNG", "z.png"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named(photos: Path) -> None:
    draw(photos / "trip" / "nameless.")
    (photos / "trip" / "nameless.").chmod(0)
    assert left(photos) == {"trip/nameless.": "unreadable file"}
    (photos / "trip").chmod(0)
    assert left(photos) == {"trip": "unreadable folder"}
    (photos / "trip").chmod(0o700)


def test_a_folder_that_cannot_be_listed_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = os.scandir

    def scandir(folder: Path) -> object:
        if Path(folder).name == "trip":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert left(photos) == {"trip": "unreadable folder"}


def test_a_folder_of_nothing_else_says_what_it_has(photos: Path) -> None:
    (photos / "empty").mkdir()
    (photos / "empty" / "a.jxl").touch()
    with pytest.raises(ValueError, match=r"got none in photos/empty but 1 JPEG XL format; check"):
        jobs([photos / "empty"], None)


def test_the_format_of_the_outputs(photos: Path) -> None:
    assert pairs(jobs([photos], Path("out"), ".webp"))[0] == ("photos/a.jpg", "out/a.webp")
    assert jobs([photos / "a.jpg"], None, ".tiff")[0].target == Path("photos/a-protected.tiff")
    assert jobs([photos / "a.jpg"], Path("b.tif"), ".tiff")[0].target == Path("b.tif")
    assert jobs([photos / "a.jpg"], Path("b.jpeg"), ".jpg")[0].target == Path("b.jpeg")
    with pytest.raises(ValueError, match=r"expected an output of \.webp, got b\.png; give it that suffix"):
        jobs([photos / "a.jpg"], Path("b.png"), ".webp")


def test_names_leave_room_for_the_card(tmp_path: Path) -> None:
    expect_nameable(tmp_path / ("x" * 246 + ".png"))
    for name in ("x" * 247 + ".png", "\N{HAMSTER FACE}" * 62 + ".png"):
        with pytest.raises(PictureError, match=r"expected a name of at most 250 bytes, .* got 25[12]; rename"):
            expect_nameable(tmp_path / name)
