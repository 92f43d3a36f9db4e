"""Every figure of a benchmark in one table: which way is better, how it is printed, and what measures it.

Plan, trials, tables, plots and CSV read it; nothing here needs torch.
"""

from dataclasses import dataclass

ARROWS = {1: " ↑", -1: " ↓", 0: ""}
OTHER_PROMPT = "_other_prompt"
"""Ends the name of a figure that is measured on drawings of another prompt than the tuned one."""

OPTIONAL = {
    "lpips": "safetensors of AlexNet",
    "clip": "a CLIP model's folder or cached hub id",
    "arcface": "an ONNX file",
}
"""Models that a user may have and a plan may name: backend and what it is."""


@dataclass(frozen=True)
class Metric:
    """One figure.

    Arguments:
        better: 1 where more is better for the protector, -1 where less is, 0 where nobody can say.
        digits: After the point.
        backend: What measures it beside our own code: "faces", "attributes" or one of `OPTIONAL`.
        device: "cpu", or "model" where it runs the attacker's model and so wants the model's device.
        ranks: Kind of attack whose recipes are ranked by it, or "".
        largest: Whether items are summarised by the largest, for a promise that holds for each, instead of the mean.
        axis: Label where it is an axis of the plots, or "".
    """

    better: int = 0
    digits: int = 3
    backend: str = ""
    device: str = "cpu"
    ranks: str = ""
    largest: bool = False
    axis: str = ""


METRICS: dict[str, Metric] = {
    # of what is published
    "linf": Metric(-1, 0, largest=True),
    "psnr": Metric(1, 1, axis="PSNR in dB"),
    "ssim": Metric(1),
    "delta_e": Metric(-1, 2, axis="visibility: S-CIELAB, mean"),
    "delta_e_95": Metric(-1, 2),
    "delta_e_99": Metric(-1, 2),
    "lpips": Metric(-1, backend="lpips"),
    "loss_ratio": Metric(1, device="model"),
    # of an edit
    "ssim_to_clean": Metric(-1, ranks="edit"),
    "ssim_autoencoder": Metric(-1, device="model"),  # the part of the former that encoding and decoding alone make
    "psnr_to_clean": Metric(-1, 1),
    "lpips_to_clean": Metric(1, backend="lpips"),
    "obeys": Metric(-1, backend="attributes", ranks="edit"),
    "success": Metric(-1, backend="attributes"),
    "kept_outside": Metric(-1),
    "clip_score": Metric(-1, backend="clip"),
    "face_lost": Metric(1, backend="faces"),
    "face_distance": Metric(1, backend="faces"),
    # of drawings with a tuned model
    "likeness": Metric(-1, backend="faces", ranks="tuning"),
    "fdfr": Metric(1, backend="faces"),
    "likeness_of_faces": Metric(-1, backend="faces"),
    "ism": Metric(-1, backend="faces"),
    "distance": Metric(1, backend="faces"),
    "margin": Metric(-1, backend="faces"),
    "kid": Metric(1, backend="clip"),
    # what it cost
    "seconds": Metric(-1, 1, axis="seconds to protect an item"),
    "peak_memory_mb": Metric(0, 0),  # the process's so far, which says nothing of a recipe
}
"""By name, in the order of the columns."""

RANKED = {kind: [name for name, metric in METRICS.items() if metric.ranks == kind] for kind in ("edit", "tuning")}
"""By kind of attack the figures that recipes are ranked by."""

PRIMARY = {kind: names[0] for kind, names in RANKED.items()}
"""The first of them, that purifiers and transfer are judged by too: whether the result differs."""

AXES = {name: metric.axis for name, metric in METRICS.items() if metric.axis}


def known(name: str) -> Metric:
    """Return what is known of a figure, also of another prompt's; nothing is known of one that is not in `METRICS`."""
    return METRICS.get(name.removesuffix(OTHER_PROMPT), Metric())


def place(name: str) -> tuple[bool, int, str]:
    """Return a key that sorts names into the order of `METRICS`: other prompts' after all, unknown names last."""
    plain, order = name.removesuffix(OTHER_PROMPT), list(METRICS)
    return name != plain, order.index(plain) if plain in METRICS else len(order), name


def heading(name: str) -> str:
    """Return a column's heading: the name with the arrow that says what is better for the protector."""
    metric = known(name)
    return f"{name}{', largest' if metric.largest else ''}{ARROWS[metric.better]}"
