import errno
import os
import resource
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from picture_files import (
    grey_icc,
    noise,
    refusal,
    saved,
    smooth,
    srgb_icc,
)
from PIL import Image

from antidiffusion.pictures.metadata import Metadata
from antidiffusion.pictures.picture import Picture, PictureError, check_writable, linf

OUTPUTS = [".png", ".webp", ".tiff"]

FULL = Metadata(
    {
        "author": ("José N.", "A. Other"),
        "copyright": ("© José <N.> & Co",),
        "description": ("One line.\nAnd another.",),
        "keywords": ("a, b", "c"),
        "date": ("2020-01-31T23:59:59+02:00",),
        "data_mining": ("http://ns.useplus.org/ldf/vocab/DMI-PROHIBITED-AIMLTRAINING",),
        "city": ("Zürich",),
    },
    (300.0, 72.0),
    (47.37688888888889, -8.5),
)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(64, 90),
    width=st.integers(64, 90),
    channels=st.sampled_from([1, 3]),
    transparent=st.booleans(),
    profile=st.sampled_from([None, "rgb", "grey"]),
    metadata=st.sampled_from([Metadata(), FULL, Metadata(dpi=(240.0, 240.0)), Metadata({"date": ("1999-12-31",)})]),
    suffix=st.sampled_from([*OUTPUTS, ".TIF", ".bmp"]),
    seed=st.integers(0, 9),
)
def test_what_is_written_reads_back_to_the_bit(
    height: int,
    width: int,
    channels: int,
    transparent: bool,
    profile: str | None,
    metadata: Metadata,
    suffix: str,
    seed: int,
) -> None:
    alpha = noise(height, width, 1, seed + 1)[..., 0] // 86 * 127 if transparent else None  # 0, 127 or 254
    icc = {None: None, "rgb": srgb_icc(), "grey": grey_icc() if channels == 1 else srgb_icc()}[profile]
    picture = Picture(noise(height, width, channels, seed), alpha, icc, metadata)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        try:
            check_writable(picture, path)
        except PictureError:
            with pytest.raises(PictureError):
                picture.write(path)
            assert list(Path(folder).iterdir()) == []
            bare = alpha is None and picture.icc is None and not metadata.texts
            assert (suffix == ".bmp" and not bare) or (suffix == ".webp" and picture.icc == grey_icc())
            return
        picture.write(path)
        again = Picture.read(path, keep_location=True)
        assert [path] == list(Path(folder).iterdir())
        stream = BytesIO()
        picture.write(stream, format=suffix[1:])
        assert stream.getvalue() == path.read_bytes()
        assert linf(Picture.read(BytesIO(stream.getvalue())), picture) == 0
    assert linf(again, picture) == 0 and again.notes == ()
    assert np.array_equal(again.alpha, alpha) if transparent else again.alpha is None
    assert again.icc == picture.icc and (again.metadata == metadata or suffix == ".bmp")  # where Pillow says 96 dpi


def test_tiff_is_compressed(tmp_path: Path) -> None:
    Picture(np.zeros((64, 64, 1), np.uint8), metadata=FULL).write(tmp_path / "a.tiff")
    assert (tmp_path / "a.tiff").stat().st_size < 64 * 64


def test_a_stream_is_read_to_its_end_and_named_in_refusals() -> None:
    assert "the stream: expected a picture, got an empty stream" in refusal(lambda: Picture.read(BytesIO()))
    assert "the stream: " in refusal(lambda: Picture.read(BytesIO(b"text")))
    for wrong in (None, "jpg", "gif"):
        assert "the stream: " in refusal(lambda wrong=wrong: Picture(noise()).write(BytesIO(), format=wrong))


def test_the_longer_side_is_resized() -> None:
    picture = Picture(noise(300, 400), noise(300, 400, 1)[..., 0], srgb_icc(), FULL)
    small = picture.resized(200)
    assert small.pixels.shape == (150, 200, 3) and small.alpha is not None and small.alpha.shape == (150, 200)
    assert (small.icc, small.metadata) == (picture.icc, FULL) and small.notes == (
        "resized from 400 x 300 to 200 x 150",
    )
    assert picture.resized(400) is picture
    grey = Picture(np.full((300, 400, 1), 77, np.uint8)).resized(128)
    assert grey.pixels.shape == (96, 128, 1) and (grey.pixels == 77).all()
    assert "got 80 x 60 after resizing" in refusal(lambda: picture.resized(80))


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".gif", ".avif", ""])
def test_lossy_or_unknown_outputs_are_refused(suffix: str, tmp_path: Path) -> None:
    sentence = refusal(lambda: Picture(noise()).write(tmp_path / f"a{suffix}"))
    assert ("17/255" in sentence) == (suffix.lower() in (".jpg", ".jpeg")) and "use .png, .webp or .tiff" in sentence


def test_limits_of_the_formats_are_said(tmp_path: Path) -> None:
    long = Picture(np.zeros((64, 16384, 1), np.uint8))
    assert "16383" in refusal(lambda: long.write(tmp_path / "a.webp"))
    long.with_pixels(long.pixels).write(tmp_path / "a.png")
    heavy = Picture(noise(), icc=srgb_icc() + bytes(1 << 20))
    assert "ICC" in refusal(lambda: heavy.write(tmp_path / "b.png"))
    assert "alpha" in refusal(lambda: Picture(noise(), noise()[..., 0]).write(tmp_path / "c.bmp"))
    grey = Picture(noise(channels=1), icc=grey_icc())
    assert "grey" in refusal(lambda: grey.write(tmp_path / "d.webp"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Picture(noise()).write(path)
    before = path.read_bytes()
    other = Picture(noise(seed=1))
    assert "existing" in refusal(lambda: other.write(path)) and path.read_bytes() == before
    other.write(path, overwrite=True)
    assert linf(Picture.read(path), other) == 0


def test_the_source_is_never_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", Image.fromarray(smooth()))
    before = path.read_bytes()
    (tmp_path / "link.png").symlink_to(path)
    os.link(path, tmp_path / "hard.png")
    monkeypatch.chdir(tmp_path)
    picture = Picture.read("a.png")
    for name in ("a.png", "./a.png", str(path), "link.png", "hard.png"):
        assert "own" in refusal(lambda name=name: picture.write(name, overwrite=True))
    assert path.read_bytes() == before and (tmp_path / "link.png").is_symlink()


@pytest.mark.parametrize("suffix", [*OUTPUTS, ".bmp"])
def test_a_full_disk_is_said_and_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    """The kernel's own short writes: no file of this process may grow past 4 kB for the moment."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        sentence = refusal(lambda: Picture(noise(200, 200)).write(tmp_path / f"a{suffix}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "room" in sentence and list(tmp_path.iterdir()) == []


def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    Picture(noise()).write(path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert "No space left" in refusal(lambda: Picture(noise(seed=1)).write(path, overwrite=True))
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_an_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Image.Image, file: Any, **options: Any) -> None:
        file.write(b"half a picture")
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Picture(noise()).write(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    assert "No such file" in refusal(lambda: Picture(noise()).write(tmp_path / "missing" / "a.png"))
    (tmp_path / "folder.png").mkdir()
    assert "directory" in refusal(lambda: Picture(noise()).write(tmp_path / "folder.png"))
    assert "directory" in refusal(lambda: Picture(noise()).write(tmp_path / "folder.png", overwrite=True))
    assert len(list(tmp_path.iterdir())) == 1


def test_the_same_picture_gives_the_same_bytes_and_usual_rights(tmp_path: Path) -> None:
    picture = Picture(noise(), icc=srgb_icc(), metadata=FULL)
    (tmp_path / "probe").touch()
    for suffix in OUTPUTS:
        picture.write(tmp_path / f"a{suffix}")
        picture.write(tmp_path / f"b{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
        assert (tmp_path / f"a{suffix}").stat().st_mode == (tmp_path / "probe").stat().st_mode


# ---- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_tensor_holds_every_level_exactly(channels: int) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(channels, 2)
    picture = Picture(levels)
    x = picture.tensor()
    assert x.shape == (1, channels, 16, 16) and x.dtype == torch.float32 and x.is_contiguous()
    assert torch.equal(x.mul(255).round().byte()[0].permute(1, 2, 0), torch.from_numpy(levels))
    x.zero_()
    assert picture.pixels.max() == 255, "a tensor shares no memory with its picture"


def test_pixels_of_another_shape_or_type_are_refused() -> None:
    picture = Picture(noise(), noise()[..., 0], metadata=FULL)
    kept = picture.with_pixels(noise(seed=1))
    assert kept.alpha is picture.alpha and kept.metadata == FULL and linf(kept, Picture(noise(seed=1))) == 0
    for wrong in (noise(71), noise(channels=1), noise().astype(np.float32)):
        with pytest.raises(ValueError, match="expected"):
            picture.with_pixels(wrong)
    for shape in ((70, 80), (70, 80, 4)):
        with pytest.raises(ValueError, match="expected"):
            Picture(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="alpha"):
        Picture(noise(), noise(60)[..., 0])


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2))
def test_linf_is_the_largest_gap_in_either_direction(low: int, high: int, channel: int) -> None:
    a, b = np.full((8, 8, 3), 7, np.uint8), np.full((8, 8, 3), 7, np.uint8)
    a[3, 4, channel], b[3, 4, channel] = low, high
    assert linf(Picture(a), Picture(b)) == linf(Picture(b), Picture(a)) == abs(low - high)


def test_linf_needs_one_shape() -> None:
    with pytest.raises(ValueError, match="expected pictures of one shape"):
        linf(Picture(noise()), Picture(noise(channels=1)))
