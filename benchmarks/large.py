"""The largest picture: `antidiffusion protect --quick` on 100 megapixels with `mini`, as one process.

    python benchmarks/large.py [--side 10000] [--out benchmarks/results/large.json]

The picture is a bundled portrait, enlarged, with grain. Written are CPU seconds, the peak of resident memory, and what
the report card says of the written file.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from antidiffusion.card import versions

GRAIN = 6  # 8-bit steps, at most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "large.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "large.jpg", Path(folder) / "out.png"
        portrait = Image.open(str(resources.files("antidiffusion") / "mini" / "portraits" / "1.png")).convert("RGB")
        pixels = np.asarray(portrait.resize((args.side, args.side), Image.Resampling.BICUBIC)).astype(np.int16)
        pixels += np.random.default_rng(0).integers(-GRAIN, GRAIN + 1, pixels.shape, dtype=np.int16)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(source, quality=92)
        del pixels
        command = ["protect", str(source), "-o", str(target), "--quick", "--format", "json"]
        code = "from antidiffusion.cli import main; main()"
        begun = time.perf_counter()
        run = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
        seconds, used = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    card = json.loads(run.stdout)
    result = {
        "megapixels": args.side**2 / 1e6,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 2),
        **{key: card[key] for key in ("budget", "fidelity", "effect")},
        "versions": versions(),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
