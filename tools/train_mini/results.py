"""A run's results as few small files that a machine hands back, and the way back into a run.

At most eight files of at most 15 MiB: log.jsonl, measure.json, a sheet of samples a model, and one archive of the
averaged weights and the tokenizers in pieces. `restore` makes a run of them that the stages go on from.
"""

import io
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

PIECE = 15 * 2**20  # bytes
FINISHED = "finished"  # file that says that all stages are done


def _write(path: Path, content: bytes) -> None:
    if not path.exists() or path.read_bytes() != content:
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        partial.replace(path)


def publish(run: Path, out: Path) -> None:
    """Copy what there is of a run's results."""
    out.mkdir(parents=True, exist_ok=True)
    logs = sorted(run.glob("*.jsonl"), key=lambda path: path.stat().st_mtime)
    _write(out / "log.jsonl", b"".join(path.read_bytes() for path in logs))
    for path in [*run.glob("measure.json"), *run.glob("*.png")]:
        _write(out / path.name, path.read_bytes())
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for path in sorted([*run.glob("*.safetensors"), *run.glob("*-tokenizer")]):
            tar.add(path, path.name)
    content = archive.getvalue()
    for index, first in enumerate(range(0, len(content), PIECE)):
        _write(out / f"weights.tar.{index}", content[first : first + PIECE])


def restore(out: Path, run: Path) -> None:
    """Put published weights into a run's folder, from which stages go on, package and measure.

    Raises:
        FileNotFoundError: If there are none.
    """
    pieces = sorted(out.glob("weights.tar.*"))
    if not pieces:
        raise FileNotFoundError(f"expected weights.tar.0 in {out}, found none; name the folder that `follow` wrote")
    run.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO(b"".join(path.read_bytes() for path in pieces))
    with tarfile.open(fileobj=content) as tar:
        tar.extractall(run, filter="data")


def follow(run: Path, out: Path, seconds: float, every: float, alive: Callable[[], bool]) -> bool:
    """Publish a running training again and again, until it has finished, has died, or the time is over.

    Returns:
        Whether it has finished.
    """
    end = time.monotonic() + seconds
    while True:
        over = (run / FINISHED).exists() or not alive() or time.monotonic() + every > end
        publish(run, out)
        if over:
            return (run / FINISHED).exists()
        time.sleep(every)
