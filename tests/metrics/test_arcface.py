import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import antidiffusion
from antidiffusion.metrics.arcface import SIDE, TEMPLATE, ArcFace, aligned, five_to_three, similarity
from antidiffusion.metrics.identity import DlibFaces, ism
from antidiffusion.pictures.picture import Picture

PORTRAIT = Path(antidiffusion.__file__).parent / "mini" / "portraits" / "1.png"
needs_onnxruntime = pytest.mark.skipif(
    importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime: pip install onnxruntime"
)


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffer."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def onnx(side: int = SIDE) -> bytes:
    """A network that averages tiles of 7 x 7 pixels: its output has 768 numbers for sides of 112."""

    def tensor(name: str, *shape: int) -> bytes:
        dims = b"".join(field(1, field(1, size)) for size in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    sevens = [field(1, name) + field(8, 7) + field(8, 7) + field(20, 7) for name in ("kernel_shape", "strides")]
    pool = field(1, "x") + field(2, "tiles") + field(4, "AveragePool") + b"".join(field(5, seven) for seven in sevens)
    flatten = field(1, "tiles") + field(2, "y") + field(4, "Flatten")
    graph = field(1, pool) + field(1, flatten) + field(2, "tiny")
    graph += field(11, tensor("x", 1, 3, side, side)) + field(12, tensor("y", 1, 3 * (side // 7) ** 2))
    return field(1, 8) + field(7, graph) + field(8, field(2, 13))


@pytest.fixture
def portrait() -> Tensor:
    return Picture.read(PORTRAIT).tensor()


def moved(points: np.ndarray, degrees: float, scale: float, shift: complex) -> np.ndarray:
    return scale * np.exp(1j * math.radians(degrees)) * points + shift


@pytest.mark.parametrize(("degrees", "scale", "shift"), [(0, 1, 0), (30, 2.5, 40 - 7j), (-170, 0.1, 3 + 90j)])
def test_a_similarity_is_found_exactly(degrees: float, scale: float, shift: complex) -> None:
    points = np.array([1 + 2j, 30 - 4j, 11 + 17j])
    a, b = similarity(points, moved(points, degrees, scale, shift))
    assert abs(a) == pytest.approx(scale) and math.degrees(np.angle(a)) == pytest.approx(degrees)
    np.testing.assert_allclose(a * points + b, moved(points, degrees, scale, shift), atol=1e-9)


def test_a_similarity_is_the_least_squares_one_and_no_mirror() -> None:
    rng = np.random.default_rng(0)
    points, targets = (rng.normal(size=(4, 2)).view(complex).ravel() for _ in range(2))
    rows = [[p.real, -p.imag, 1, 0] for p in points] + [[p.imag, p.real, 0, 1] for p in points]
    c, s, u, v = np.linalg.lstsq(np.array(rows), np.r_[targets.real, targets.imag], rcond=None)[0]
    np.testing.assert_allclose(similarity(points, targets), [c + 1j * s, u + 1j * v], atol=1e-9)


@pytest.mark.parametrize("degrees", [0, 25, -40])
@pytest.mark.parametrize("scale", [1.0, 2.0, 3.5])
def test_eyes_and_nose_land_on_the_template(degrees: float, scale: float) -> None:
    """Gaussian spots at the landmarks of a turned and scaled face, one in each channel."""
    points = moved(TEMPLATE, degrees, scale, 0)
    points += 200 + 180j - points.mean()
    y, x = np.mgrid[:360, :400]
    spots = [np.exp(-(np.abs(x + 1j * y - point) ** 2) / (2 * (3 * scale) ** 2)) for point in points]
    face = aligned(np.uint8(255 * np.stack(spots, -1)), points).astype(float)
    assert face.shape == (SIDE, SIDE, 3)
    y, x = np.mgrid[:SIDE, :SIDE]
    centres = [(channel * (x + 1j * y)).sum() / channel.sum() for channel in face.transpose(2, 0, 1)]
    np.testing.assert_allclose(centres, TEMPLATE, atol=0.1)


def test_the_template_is_kept_bit_by_bit_and_what_is_outside_is_black() -> None:
    pixels = np.random.default_rng(0).integers(1, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(aligned(pixels, TEMPLATE), pixels)
    shifted = aligned(pixels, TEMPLATE - 10)
    np.testing.assert_array_equal(shifted[:, 10:], pixels[:, :-10])
    assert not shifted[:, :9].any()


def test_the_five_landmarks_are_eyes_and_nose(portrait: Tensor) -> None:
    """Left and right as seen in the picture; upside up."""
    assert five_to_three([8 + 1j, 6 + 1j, 0j, 2 + 0j, 4 + 5j]).tolist() == [1, 7 + 1j, 4 + 5j]
    faces = DlibFaces()
    pixels = np.asarray(Image.open(PORTRAIT).convert("RGB").resize((384, 384)))
    (box,) = faces._detect(pixels, 0)
    left, right, nose = five_to_three([complex(p.x, p.y) for p in faces._landmarks(pixels, box).parts()])
    assert left.real < nose.real < right.real and nose.imag > max(left.imag, right.imag)
    a, b = similarity(np.array([left, right, nose]), TEMPLATE)
    np.testing.assert_allclose(a * np.array([left, right, nose]) + b, TEMPLATE, atol=4)


@needs_onnxruntime
def test_the_network_sees_the_aligned_face(portrait: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "tiny.onnx"
    path.write_bytes(onnx())
    faces = ArcFace(path)
    (face, none) = faces.embed(torch.cat([portrait, torch.full_like(portrait, 0.5)]))
    assert none is None and face is not None
    assert face.shape == (768,) and face.dtype == torch.float32 and face.norm().item() == pytest.approx(1)
    side = portrait.shape[-1] * 3
    enlarged = np.asarray(Image.open(PORTRAIT).convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
    (box,) = faces._detect(enlarged, 0)
    points = five_to_three([complex(p.x, p.y) for p in faces._landmarks(enlarged, box).parts()])
    crop = torch.from_numpy(aligned(enlarged, points).copy()).permute(2, 0, 1).double()
    expected = torch.nn.functional.avg_pool2d((crop - 127.5) / 127.5, 7).flatten()
    torch.testing.assert_close(face.double(), expected / expected.norm(), rtol=0, atol=1e-5)
    assert ism([face], [face]) == pytest.approx(1)


@needs_onnxruntime
def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(ValueError, match=r"expected an ONNX file of ArcFace, got none at .*x\.onnx; "):
        ArcFace(path)
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"expected an ONNX file of ArcFace, got .*x\.onnx: .*; "):
        ArcFace(path)
    path.write_bytes(onnx(side=224))
    with pytest.raises(ValueError, match=r"expected an input of \(1, 3, 112, 112\), got \(1, 3, 224, 224\) in .*; "):
        ArcFace(path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(ModuleNotFoundError, match="expected the package onnxruntime, got none; pip install onnx"):
        ArcFace(tmp_path / "x.onnx")
