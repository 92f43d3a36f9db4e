"""ArcFace embeddings from an ONNX file, as Anti-DreamBooth's identity score takes them.

References:
    ArcFace: Additive Angular Margin Loss for Deep Face Recognition, Deng et al., 2019, arXiv 1801.07698
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from antidiffusion.metrics.identity import Faces

SIDE = 112
# InsightFace's template, x + iy: the eyes as seen in the picture, left and right. It has the tip of the nose and dlib
# its base, which lies 0.8 of the eyes' distance below them (median over Defense-Edit-Synth).
LEFT, RIGHT = 38.2946 + 51.6963j, 73.5318 + 51.5014j
TEMPLATE = np.array([LEFT, RIGHT, (LEFT + RIGHT) / 2 + 0.8j * (RIGHT - LEFT)])


class ArcFace(Faces):
    """An ArcFace network that the user has, on faces found by dlib; `embed` gives one `(512,)` of length 1 for each.

    InsightFace publishes such files, for example `w600k_r50.onnx` of its model pack buffalo_l, for non-commercial
    research only. That is why none ships with the package and none is downloaded.

    Arguments:
        weights: ONNX file of one input `(1, 3, 112, 112)`, RGB in [-1, 1], and one output.

    Raises:
        ModuleNotFoundError: If onnxruntime, dlib or dlib's models are not installed.
        ValueError: If there is no such file, or its input is another one.
    """

    same = 1.2  # a cosine of 0.28, from which on InsightFace's demonstration says that two faces are one person's

    def __init__(self, weights: Path) -> None:
        super().__init__()
        if importlib.util.find_spec("onnxruntime") is None:
            raise ModuleNotFoundError("expected the package onnxruntime, got none; pip install onnxruntime")
        if not weights.is_file():
            raise ValueError(f"expected an ONNX file of ArcFace, got none at {weights}; get one and name it")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = onnxruntime.InferenceSession(str(weights), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # of a class that onnxruntime does not name in public
            reason = str(error).splitlines()[0]
            raise ValueError(f"expected an ONNX file of ArcFace, got {weights}: {reason}; download it again") from error
        self._input = self._session.get_inputs()[0]
        if list(self._input.shape[1:]) != [3, SIDE, SIDE]:
            got = tuple(self._input.shape)
            raise ValueError(f"expected an input of (1, 3, {SIDE}, {SIDE}), got {got} in {weights}; name another file")

    def _embedding(self, pixels: np.ndarray, landmarks: Any) -> Tensor:
        face = aligned(pixels, five_to_three([complex(point.x, point.y) for point in landmarks.parts()]))
        pictures = (face.astype(np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5
        output = torch.from_numpy(self._session.run(None, {self._input.name: pictures})[0])
        return torch.nn.functional.normalize(output[0], dim=0)


def five_to_three(landmarks: list[complex]) -> np.ndarray:
    """Return left eye, right eye and base of the nose, as seen in the picture, of dlib's five landmarks x + iy.

    dlib's order is: right eye, outer and inner corner; left eye, outer and inner corner; nose.
    """
    outer_right, inner_right, outer_left, inner_left, nose = landmarks
    return np.array([(outer_left + inner_left) / 2, (outer_right + inner_right) / 2, nose])


def similarity(points: np.ndarray, targets: np.ndarray) -> tuple[complex, complex]:
    """Return the rotation with scale, a, and the shift, b, that bring points nearest to targets in least squares.

    Arguments:
        points, targets: `(N,)` complex, x + iy; points must not all be one.

    Returns:
        a and b of p -> a p + b, which never mirrors.

    References:
        Least-Squares Estimation of Transformation Parameters Between Two Point Patterns, Umeyama, 1991
    """
    centred = points - points.mean()
    a = np.vdot(centred, targets - targets.mean()) / np.vdot(centred, centred)
    return complex(a), complex(targets.mean() - a * points.mean())


def aligned(pixels: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Cut a face out so that eyes and nose lie where ArcFace wants them.

    Sampled bilinearly without antialiasing, as InsightFace does; what lies outside the picture is black.

    Arguments:
        pixels: `(H, W, 3)` uint8.
        points: Left eye, right eye and base of the nose in pixels, x + iy; whole numbers are pixels' centres.

    Returns:
        `(112, 112, 3)` uint8.
    """
    centre = 0.5 + 0.5j  # Pillow counts from the pixel's corner
    a, b = similarity(TEMPLATE + centre, points + centre)
    matrix = (a.real, -a.imag, b.real, a.imag, a.real, b.imag)
    face = Image.fromarray(pixels).transform((SIDE, SIDE), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(face)
