"""Pictures drawn at random, perturbed, written and read back: python benchmarks/budgets.py writes results/budgets.json.

Every picture has a size, a mode, a content, a format, a budget and a seed of its own. It goes the way that a protection
goes: read from a file, perturbed on the canvas by sign steps up random gradients, rounded inside the budget, written,
read back, and compared with the untouched pixels. Hypothesis draws them and would shrink one that is over its budget.
"""

import argparse
import json
import time
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Generator

from antidiffusion.metrics.fidelity import linf as float_linf
from antidiffusion.pictures.budget import Linf
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.pictures.picture import Picture, linf
from antidiffusion.protection import versions

HERE = Path(__file__).parent
MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16")
INPUTS = {
    "PNG": (*MODES[:6], "I;16"),
    "TIFF": (*MODES[:7], "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "BMP": ("RGB", "L", "P", "1"),
}
INPUTS |= {"WEBP": ("RGB", "RGBA"), "GIF": ("P", "L")}
CONTENTS = ("noise", "black", "white", "ramp", "edges", "photo")


def drawn(content: str, height: int, width: int, seed: int) -> np.ndarray:
    """Four channels of uint8."""
    y, x = np.mgrid[:height, :width]
    rng = np.random.default_rng(seed)
    if content == "noise":
        return rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
    if content in ("black", "white"):
        return np.full((height, width, 4), 255 * (content == "white"), np.uint8)
    if content == "ramp":
        return np.stack([x * 255 // width, y * 255 // height, (x + y) % 256, 255 - x % 256], -1).astype(np.uint8)
    if content == "edges":
        return np.repeat(255 * ((x // 3 + y // 5) % 2)[..., None], 4, 2).astype(np.uint8)
    waves = [127 + 90 * np.sin(x / (7 + 9 * k) + k) * np.cos(y / (11 + 5 * k)) for k in range(4)]
    return (np.stack(waves, -1) + rng.normal(0, 6, (height, width, 4))).clip(0, 255).astype(np.uint8)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(INPUTS)))
    return {
        "kind": kind,
        "mode": draw(st.sampled_from(INPUTS[kind])),
        "content": draw(st.sampled_from(CONTENTS)),
        "height": draw(st.integers(64, 100)),
        "width": draw(st.integers(64, 100)),
        "output": draw(st.sampled_from(["png", "tiff", "bmp", "png", "tiff", "bmp", "webp"])),
        "budget": draw(st.one_of(st.integers(1, 64), st.floats(1, 64))),
        "step": draw(st.floats(0.1, 64)),
        "steps": draw(st.integers(1, 3)),
        "side": draw(st.sampled_from([64, 128])),
        "seed": draw(st.integers(0, 2**31)),
    }


def check(case: dict[str, Any], seen: Counter[str], largest: list[float]) -> None:
    """Protect one picture cheaply and raise AssertionError if the written file is outside its budget."""
    values = drawn(case["content"], case["height"], case["width"], case["seed"])
    if case["mode"] == "I;16":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    elif case["mode"] == "CMYK":
        image = Image.fromarray(values, "CMYK")
    else:
        image = Image.fromarray(values).convert(case["mode"])
    buffer = BytesIO()
    image.save(buffer, case["kind"], **({"lossless": True} if case["kind"] == "WEBP" else {}))
    original = Picture.read(BytesIO(buffer.getvalue()))
    height, width, channels = original.pixels.shape
    canvas, budget = Canvas(original.pixels, view_size(height, width, case["side"], 8)), Linf(case["budget"])
    generator = Generator().manual_seed(case["seed"])
    for _ in range(case["steps"]):
        canvas.ascend(torch.randn(1, 3, *canvas.size, generator=generator), case["step"], budget)
    protected = original.with_pixels(canvas.pixels(budget))
    output = case["output"]
    if output == "bmp" and (original.alpha is not None or original.icc is not None):
        output = "png"
    stream = BytesIO()
    protected.write(stream, format=output)
    written = Picture.read(BytesIO(stream.getvalue()))
    if written.pixels.shape != original.pixels.shape:  # a perturbed colour picture may come out grey, and is one
        grey = written.pixels.repeat(3, 2)
        assert written.pixels.shape[2] == 1 and channels == 3, case
        written = original.with_pixels(grey)
    gap = linf(written, original)
    assert gap <= case["budget"], (gap, case)
    assert np.array_equal(written.pixels, protected.pixels), case
    exact = float_linf(written.tensor().double(), original.tensor().double()).item() * 255
    assert exact <= case["budget"] + 1e-4, (exact, case)
    seen[f"{case['kind']} {case['mode']} to {output}"] += 1
    largest[0] = max(largest[0], gap / case["budget"])
    largest[1] += gap == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "budgets.json")
    args = parser.parse_args()
    begun, seen, largest, over = time.perf_counter(), Counter[str](), [0.0, 0.0], list[str]()
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large]
    options: dict[str, Any] = {"deadline": None, "database": None, "derandomize": True, "suppress_health_check": checks}

    @settings(max_examples=args.count, phases=[Phase.generate], **options)
    @given(cases())
    def every(case: dict[str, Any]) -> None:
        try:
            check(case, seen, largest)
        except AssertionError as error:
            over.append(str(error))

    every()
    result = {
        "pictures": sum(seen.values()) + len(over),
        "over_budget_or_not_to_the_bit": len(over),
        "failures": over[:10],
        "largest_share_of_a_budget": largest[0],
        "pictures_that_could_not_move": int(largest[1]),
        "ways": dict(sorted(seen.items())),
        "seconds": round(time.perf_counter() - begun),
        "versions": versions(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
