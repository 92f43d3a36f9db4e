"""What measures the pictures of a benchmark: our own code, what ships, and the models that a plan names."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from antidiffusion.data.defense_edit import Item, asked
from antidiffusion.metrics.arcface import ArcFace
from antidiffusion.metrics.attributes import Attributes
from antidiffusion.metrics.distribution import kid
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.metrics.identity import (
    DlibFaces,
    Embeddings,
    Faces,
    distance,
    fdfr,
    ism,
    likeness,
    likeness_of_faces,
    margin,
)
from antidiffusion.metrics.perceptual import LPIPS
from antidiffusion.metrics.semantic import ClipScore
from antidiffusion.metrics.visibility import visibility
from antidiffusion.pictures.picture import Picture, linf

KEPT = 0.5
"""SSIM to the source outside the mask below which an edit has not left the rest alone; of those that ship SDEdit keeps
least, 0.59 on average, and the autoencoder alone 0.88 (benchmarks/README.md)."""

Metrics = dict[str, float | None]


class Instruments:
    """Measures, each loaded once and when it is first needed.

    Arguments:
        given: Models that the user has, see `antidiffusion.metrics.table.OPTIONAL`.
    """

    def __init__(self, given: Mapping[str, str]) -> None:
        self.given = given

    def check(self) -> None:
        """Load everything that will be needed: better now than after hours of work.

        Raises:
            ValueError: If a package or a model is missing; the sentence says what to do.
        """
        try:
            _ = self.faces, self.attributes
            if "lpips" in self.given:
                _ = self.lpips
            if "clip" in self.given:
                _ = self.clip
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from error

    @property
    def names(self) -> dict[str, str]:
        """What measures what, by the names of its files."""
        given = {key: Path(name).name for key, name in self.given.items()}
        faces = f"ArcFace {given.pop('arcface')}" if "arcface" in given else "dlib"
        return {"faces": faces, "attributes": "mini's classifier"} | given

    @cached_property
    def faces(self) -> Faces:
        weights = self.given.get("arcface")
        return ArcFace(Path(weights)) if weights else DlibFaces()

    @cached_property
    def lpips(self) -> LPIPS:
        return LPIPS(Path(self.given["lpips"]))

    @cached_property
    def clip(self) -> ClipScore:
        return ClipScore(self.given["clip"])

    @cached_property
    def attributes(self) -> Attributes:
        return Attributes.load()

    def published(self, pictures: Sequence[Picture], originals: Sequence[Picture]) -> Metrics:
        """Compare pictures with their originals: the largest L-infinity distance in 1/255, the means of the others."""
        moved = [linf(a, b) for a, b in zip(pictures, originals, strict=True)]
        pairs = [(a.tensor(), b.tensor()) for a, b in zip(pictures, originals, strict=True)]
        metrics: Metrics = {"linf": max(moved), "ssim": fmean(ssim(*pair).item() for pair in pairs)}
        metrics["psnr"] = fmean(psnr(*pair).item() for pair in pairs) if min(moved) else None
        eye = torch.cat([visibility(*pair) for pair in pairs]).mean(0).tolist()
        metrics |= dict(zip(("delta_e", "delta_e_95", "delta_e_99"), eye, strict=True))
        if "lpips" in self.given:
            metrics["lpips"] = fmean(self.lpips(*pair).item() for pair in pairs)
        return metrics

    def edit(self, item: Item, edited: Tensor, source: Tensor, mask: Tensor | None) -> Metrics:
        """Say whether an edit is what was asked for: the value, the person, and the rest of the picture as it was.

        Arguments:
            item: What was asked for.
            edited, source: `(1, 3, h, w)` in [0, 1].
            mask: `(1, 1, h, w)`, 1 where the edit may change the picture, or None if nobody knows.
        """
        (there,), (before,) = self.faces.embed(edited), self.faces.embed(source)
        near = None if there is None or before is None else (there - before).norm().item()
        metrics: Metrics = {"success": self.success(item, edited, source), "face_distance": near}
        metrics["face_lost"] = None if before is None else float(there is None)
        metrics["kept_outside"] = None if mask is None else _kept(edited, source, mask)
        if "clip" in self.given:
            metrics["clip_score"] = self.clip(edited, [item.target_prompt]).item()
        return metrics | {"obeys": self._obeys(metrics)}

    def _obeys(self, metrics: Metrics) -> float | None:
        """Return whether what was asked for was done to this person and left the rest alone; None if nobody can say."""
        if metrics["success"] is None:
            return None
        same = metrics["face_lost"] is None or (metrics["face_distance"] or 2 * self.faces.same) < self.faces.same
        kept = metrics["kept_outside"] is None or metrics["kept_outside"] >= KEPT
        return float(bool(metrics["success"]) and same and kept)

    def success(self, item: Item, edited: Tensor, source: Tensor) -> float | None:
        """Return whether the classifier sees what was asked for; None if it cannot judge, or saw that in the source.

        Where it has no class for it, CLIP judges if there is one and the item says what the source shows: by which of
        the two texts is nearer to the edit.
        """
        wanted = asked(item)
        if wanted is not None:
            before, after = (self.attributes.classify(x)[0][wanted[0]] == wanted[1] for x in (source, edited))
            return None if before else float(after)
        if "clip" not in self.given or not item.source_prompt:
            return None
        wished, had = self.clip(edited.expand(2, -1, -1, -1), [item.target_prompt, item.source_prompt]).tolist()
        return float(wished > had)

    def similarity(self, edited: Tensor, clean: Tensor) -> Metrics:
        """Compare an edit with that of the clean picture; equal pictures have no finite PSNR."""
        same = torch.equal(edited, clean)
        metrics: Metrics = {"ssim_to_clean": ssim(edited, clean).item()}
        metrics["psnr_to_clean"] = None if same else psnr(edited, clean).item()
        if "lpips" in self.given:
            metrics["lpips_to_clean"] = self.lpips(edited, clean).item()
        return metrics

    def drawn(
        self, x: Tensor, photos: Tensor, reference: Embeddings, strangers: Sequence[Embeddings], suffix: str
    ) -> Metrics:
        """Say how much of a person drawings show.

        Arguments:
            x: Drawings `(B, 3, h, w)` in [0, 1].
            photos, reference: Clean photos of the person, and their embeddings.
            strangers: Embeddings of other people's photos.
            suffix: Ends every name.
        """
        found, cosine = self.faces.embed(x), isinstance(self.faces, ArcFace)
        values: Metrics = {"fdfr": fdfr(found), "ism": ism(found, reference), "distance": distance(found, reference)}
        values["likeness"] = likeness(found, reference, cosine=cosine)
        values["likeness_of_faces"] = likeness_of_faces(found, reference, cosine=cosine)
        values["margin"] = margin(found, reference, strangers)
        if "clip" in self.given and min(len(x), len(photos)) > 1:
            values["kid"] = kid(self.clip.features(x), self.clip.features(photos))
        return {f"{name}{suffix}": value for name, value in values.items()}


def _kept(edited: Tensor, source: Tensor, mask: Tensor) -> float | None:
    """Return the SSIM to the source outside a mask; windows inside count as kept, and are taken out again."""
    share = mask.mean().item()
    if share == 1:
        return None
    outside = ssim(mask * source + (1 - mask) * edited, source).item()
    return (outside - share) / (1 - share)
