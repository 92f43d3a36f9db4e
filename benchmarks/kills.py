"""What `protect` leaves behind when it is killed: at random moments, by every signal, and on a full disk.

    python benchmarks/kills.py [--kills 100] [--seed 0]     # five minutes; results/kills.json

Each time a process of its own begins on a folder of small pictures with the real command, is killed at a random moment
(or has a disk that is full after a random number of bytes), and a second one goes on with the folder. The model is
loaded once: the processes are forks. Counted is what must never be: a picture that is not whole, a picture without its
card, a hidden file that the second run leaves, a picture that then differs from that of an undisturbed run.
"""

import argparse
import errno
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import antidiffusion.card
import antidiffusion.workers  # here, and not in every fork
from antidiffusion.card import card_path, read_card, versions
from antidiffusion.cli import main as command
from antidiffusion.cli import shared
from antidiffusion.models.base import Surrogate

RESULT = Path(__file__).parent / "results" / "kills.json"
PICTURES = 8
WAYS = ("SIGKILL", "SIGTERM", "SIGHUP", "full disk")
PROTECT = "antidiffusion protect photos -o out --recipe random-sign --model loaded --side 64"


def child(work: Callable[[], None]) -> int:
    """Run in a fork; return its process id."""
    sys.stdout.flush()
    if number := os.fork():
        return number
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        os._exit(0)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    finally:
        os._exit(99)


def protect(limit: int | None = None) -> Callable[[], None]:
    """Give the command, in a process whose files may have so many bytes; Python ignores the signal that would tell."""

    def work() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        sys.argv = PROTECT.split()
        command()

    return work


def ended(number: int) -> str:
    status = os.waitpid(number, 0)[1]
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit {os.WEXITSTATUS(status)}"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")} if folder.exists() else {}


def wrong(folder: Path, whole: dict[str, bytes], *, finished: bool) -> list[str]:
    """Name what is there and must not be."""
    found = bytes_of(folder)
    faults = ["half a picture" for name, content in found.items() if content != whole[name]]
    faults += ["a picture without its card" for name in found if read_card(folder / name) is None]
    if finished:
        faults += ["a hidden file that stays" for path in folder.rglob("*") if path.name.startswith(".")]
        faults += ["a picture that is missing"] * (len(whole) - len(found))
        faults += ["a card alone" for path in folder.glob("*.json") if path.name.removesuffix(".json") not in found]
    return faults


def trial(way: str, seconds: float, whole: dict[str, bytes], draw: random.Random) -> dict[str, object]:
    """Kill one run and go on with it."""
    out = Path("out")
    shutil.rmtree(out, ignore_errors=True)
    if way == "full disk":
        largest = max(map(len, whole.values()))
        end = ended(child(protect(draw.randrange(largest))))
    else:
        number = child(protect())
        time.sleep(draw.uniform(0, seconds))
        try:
            os.kill(number, getattr(signal, way))
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
        end = ended(number)
    faults = wrong(out, whole, finished=False)
    there = len(bytes_of(out))
    hidden = len(list(out.glob(".*"))) if out.exists() else 0
    again = ended(child(protect()))
    faults += wrong(out, whole, finished=True)
    if again != "exit 0":
        faults.append(f"the second run ended with {again}")
    return {"way": way, "end": end, "pictures": there, "hidden": hidden, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    surrogate = Surrogate.from_pretrained("mini")
    _ = surrogate.sha256
    shared.load_surrogate = lambda *names, **others: surrogate  # in the forks
    antidiffusion.card.HELD_OUT_STEPS = 1
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("photos").mkdir()
        for number in range(PICTURES):
            pixels = np.random.default_rng(number).integers(0, 256, (64, 64 + number, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(f"photos/{number:02}.png")
        begun = time.perf_counter()
        if (end := ended(child(protect()))) != "exit 0":
            raise RuntimeError(f"expected an undisturbed run, got {end}; see what `protect` says")
        seconds = time.perf_counter() - begun
        whole = bytes_of(Path("out"))
        if len(whole) != PICTURES or not all(card_path(Path("out", name)).exists() for name in whole):
            raise RuntimeError(f"expected {PICTURES} pictures and cards, got {len(whole)}; see what `protect` says")
        trials = []
        for number in range(options.kills):
            trials.append(trial(WAYS[number % len(WAYS)], seconds, whole, draw))
            print(number + 1, trials[-1], flush=True)
        os.chdir("/")
    rows = {}
    for way in WAYS:
        mine = [row for row in trials if row["way"] == way]
        rows[way] = {
            "kills": len(mine),
            "ends": dict(sorted(Counter(str(row["end"]) for row in mine).items())),
            "pictures that were there, mean": round(sum(int(str(row["pictures"])) for row in mine) / len(mine), 1),
            "left hidden files for the second run": sum(bool(row["hidden"]) for row in mine),
            "faults": dict(Counter(fault for row in mine for fault in row["faults"])),  # type: ignore[attr-defined]
        }
    text = {"pictures": PICTURES, "seed": options.seed, "ways": rows, "versions": versions()}
    RESULT.write_text(json.dumps(text, indent=1) + "\n")
    print(json.dumps(rows, indent=1))
    sys.exit(any(row["faults"] for row in trials))


if __name__ == "__main__":
    main()
