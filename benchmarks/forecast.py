"""How far `protect --dry-run` is from what a run then takes; each in a process of its own, since peaks never fall.

python benchmarks/forecast.py        # five minutes; results/forecast.json
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from antidiffusion.protection import versions

HERE = Path(__file__).parent
PORTRAITS = sorted((HERE / "portraits").glob("*.png"))
RUNS = {
    "default": [],
    "quick": ["--quick"],
    "full tuning, low memory": ["--tuning", "full", "--low-memory"],
    "official": ["--recipe", "official"],
}


def protect(picture: Path, options: list[str], output: Path) -> dict:
    """Run the command and return its JSON."""
    code = "from antidiffusion.cli import main; main()"
    command = [sys.executable, "-c", code, "protect", str(picture), "-o", str(output), "--format", "json", *options]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = {}
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            said = protect(PORTRAITS[0], [*options, "--dry-run"], Path(folder) / "x.png")
            cost = protect(PORTRAITS[0], options, Path(folder) / "x.png")["cost"]
        rows[name] = {"seconds": [said["seconds"], cost["seconds"]]}
        rows[name]["peak_memory_mb"] = [said["peak_memory_mb"], cost["peak_memory_mb"]]
        rows[name] |= {f"{key} off by": round(a / b - 1, 3) for key, (a, b) in list(rows[name].items())}
        print(name, rows[name], flush=True)
    result = {"said, then measured": rows, "versions": versions()}
    (HERE / "results" / "forecast.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
