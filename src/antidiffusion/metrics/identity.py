"""Whether drawn pictures show a face, and whether it is the person's.

A model of faces turns pictures into embeddings, None where it sees no face; the measures are pure functions of those.

References:
    Anti-DreamBooth: Protecting Users from Personalized Text-to-Image Synthesis, Van Le et al., 2023, arXiv 2303.15433
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from antidiffusion.pictures.tensors import check_pictures, to_bytes

Embeddings = Sequence[Tensor | None]
"""One `(d,)` for each picture, or None where no face was found."""

SIDE = 384  # dlib's detector wants faces of 80 px; 128 px portraits then are upscaled 3 x


def face_models() -> Path:
    """Return the folder of dlib's models.

    Raises:
        ModuleNotFoundError: If dlib or its models are not installed.
    """
    # Not imported: the package asks for pkg_resources, which recent setuptools no longer have.
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("dlib") is None:
        raise ModuleNotFoundError(
            "expected the packages dlib-bin and face-recognition-models, got none; pip install 'antidiffusion[eval]'"
        )
    return Path(spec.submodule_search_locations[0]) / "models"


class Faces:
    """Embed the largest face of each picture, found by dlib's frontal detector; subclasses say how.

    `same` is the distance of two embeddings below which the authors of the network speak of one person.

    The landmarks are the 5-point model's: the 68-point one may not be used commercially.

    Raises:
        ModuleNotFoundError: If dlib or its models are not installed.
    """

    same: ClassVar[float]

    def __init__(self) -> None:
        self._models = face_models()
        import dlib

        self._detect = dlib.get_frontal_face_detector()
        self._landmarks = dlib.shape_predictor(str(self._models / "shape_predictor_5_face_landmarks.dat"))

    def embed(self, x: Tensor) -> list[Tensor | None]:
        """Describe the largest face of each picture; a detector that fails raises, it never means "no face".

        Arguments:
            x: Pictures `(B, 3, H, W)` float in [0, 1], rounded to 8 bits. Those with a side below 384 px are upscaled
                by a whole factor until none is.

        Returns:
            One `(d,)` float32 for each picture, or None where no face was found.

        Raises:
            ValueError: If these are no pictures in [0, 1].
        """
        check_pictures(x)
        return [self._embed(picture) for picture in to_bytes(x)]

    def _embed(self, pixels: np.ndarray) -> Tensor | None:
        height, width = pixels.shape[:2]
        factor = max(1, -(-SIDE // min(height, width)))
        if factor > 1:
            larger = (width * factor, height * factor)
            pixels = np.asarray(Image.fromarray(pixels).resize(larger, Image.Resampling.BICUBIC))
        boxes = list(self._detect(pixels, 0))
        if not boxes:
            return None
        return self._embedding(pixels, self._landmarks(pixels, max(boxes, key=lambda box: box.area())))

    def _embedding(self, pixels: np.ndarray, landmarks: Any) -> Tensor:
        """Describe the face of dlib's landmarks in pixels `(H, W, 3)` uint8: `(d,)` float32."""
        raise NotImplementedError


class DlibFaces(Faces):
    """dlib's ResNet descriptor of 128 numbers, from installed packages only.

    Raises:
        ModuleNotFoundError: If dlib or its models are not installed.
    """

    same = 0.6

    def __init__(self) -> None:
        super().__init__()
        import dlib

        self._describe = dlib.face_recognition_model_v1(str(self._models / "dlib_face_recognition_resnet_model_v1.dat"))

    def _embedding(self, pixels: np.ndarray, landmarks: Any) -> Tensor:
        return torch.tensor(list(self._describe.compute_face_descriptor(pixels, landmarks)))


def fdfr(embeddings: Embeddings) -> float:
    """Return the face detection failure rate in [0, 1]: the share of pictures without a face.

    Raises:
        ValueError: If there is no picture.
    """
    if not embeddings:
        raise ValueError("expected at least one picture, got none; draw some first")
    return sum(embedding is None for embedding in embeddings) / len(embeddings)


def ism(embeddings: Embeddings, reference_embeddings: Embeddings) -> float | None:
    """Return the identity score matching: cosine similarity to the mean reference, averaged over pictures with a face.

    That is Anti-DreamBooth's definition, there with ArcFace. dlib's descriptors of strangers already have a similarity
    of about 0.9, so that with dlib only differences between two figures speak; `distance` is what dlib is trained for.

    Arguments:
        embeddings: Of the pictures to judge. Those without a face do not count here but in `fdfr`.
        reference_embeddings: Of clean photos of the person; those without a face are left out.

    Returns:
        The score in [-1, 1], or None if no picture shows a face.

    Raises:
        ValueError: If no reference shows a face.
    """
    faces, reference = _found(embeddings, reference_embeddings)
    return float(torch.cosine_similarity(faces, reference, dim=-1).mean()) if len(faces) else None


def distance(embeddings: Embeddings, reference_embeddings: Embeddings) -> float | None:
    """Return the Euclidean distance to the mean reference, averaged over pictures with a face.

    Arguments, result and errors are `ism`'s, but 0 is the same face and more is farther. dlib's authors call photos
    within 0.6 of each other one person; among the synthetic portraits 0.5 parts people better.
    """
    faces, reference = _found(embeddings, reference_embeddings)
    return float((faces - reference).norm(dim=-1).mean()) if len(faces) else None


def likeness(embeddings: Embeddings, reference_embeddings: Embeddings, *, cosine: bool = False) -> float:
    """Return one figure in [0, 1] for how much of the person pictures show: 1 - `distance`, averaged over all pictures.

    With `cosine`, for embeddings of length 1 such as ArcFace's, it is the similarity of `ism` instead. A picture
    without a face, or whose figure is negative, counts 0. So it falls both when faces vanish and when they become
    somebody else's, which `fdfr` and `likeness_of_faces` say apart: benchmarks rank by it. Ours, of no paper.

    Arguments and errors are `fdfr`'s and `ism`'s.
    """
    failed = fdfr(embeddings)
    return (1 - failed) * (likeness_of_faces(embeddings, reference_embeddings, cosine=cosine) or 0.0)


def likeness_of_faces(
    embeddings: Embeddings, reference_embeddings: Embeddings, *, cosine: bool = False
) -> float | None:
    """Return `likeness` over the pictures that show a face, or None if none does."""
    faces, reference = _found(embeddings, reference_embeddings)
    if not len(faces):
        return None
    apart = 1 - torch.cosine_similarity(faces, reference, dim=-1) if cosine else (faces - reference).norm(dim=-1)
    return float((1 - apart).clamp(min=0).mean())


def margin(embeddings: Embeddings, reference_embeddings: Embeddings, strangers: Sequence[Embeddings]) -> float | None:
    """Return how much nearer faces are to the person than to strangers: clearer faces come nearer to everybody.

    Arguments:
        embeddings, reference_embeddings: As for `distance`.
        strangers: Of other people's photos, one entry for each of them.

    Returns:
        Mean distance to the strangers less that to the person, or None if no picture shows a face or there is nobody.

    Raises:
        ValueError: If no reference of somebody shows a face.
    """
    near = distance(embeddings, reference_embeddings)
    far = [apart for other in strangers if (apart := distance(embeddings, other)) is not None]
    return None if near is None or not far else sum(far) / len(far) - near


def _found(embeddings: Embeddings, reference_embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """Return the faces `(N, d)` and the mean reference `(d,)`, float64."""
    references = [embedding for embedding in reference_embeddings if embedding is not None]
    if not references:
        got = f"none in {len(reference_embeddings)}"
        raise ValueError(f"expected a reference picture with a face, got {got}; use clear frontal photos")
    reference = torch.stack(references).double().mean(0)
    faces = [embedding.double() for embedding in embeddings if embedding is not None]
    return torch.stack(faces) if faces else reference.new_empty(0, len(reference)), reference
