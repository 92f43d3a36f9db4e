"""Whether pictures show a face, by dlib's detector alone, in several processes.

The package's `antidiffusion.metrics.identity` wants dlib's other models too, a hundred megabytes, and finds faces in
the same pictures: this module repeats only how it scales them. Imports are few, as every process has them.
"""

import importlib.util
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE = 384  # dlib's detector wants faces of 80 px


def count_faces(pictures: NDArray[np.uint8]) -> int:
    """Return in how many of the pictures `(N, H, W, 3)` there is a face."""
    import dlib

    detect, found = dlib.get_frontal_face_detector(), 0
    for picture in pictures:
        factor = max(1, -(-SIDE // min(picture.shape[:2])))
        larger = (picture.shape[1] * factor, picture.shape[0] * factor)
        scaled = np.asarray(Image.fromarray(picture).resize(larger, Image.Resampling.BICUBIC))
        found += len(detect(scaled, 0)) > 0
    return found


def faces_found(pictures: NDArray[np.uint8]) -> float | None:
    """Return the share of pictures `(N, H, W, 3)` in which dlib finds a face, None without dlib."""
    if importlib.util.find_spec("dlib") is None:
        return None
    workers = min(os.cpu_count() or 1, 1 + len(pictures) // 16)
    if workers == 1:
        return count_faces(pictures) / len(pictures)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        return sum(pool.map(count_faces, np.array_split(pictures, workers))) / len(pictures)
