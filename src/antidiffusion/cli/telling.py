"""What `antidiffusion protect` says: a line or a card for each picture, a log, and in the end a table."""

import json
import os
import shutil
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self, TextIO

from rich.table import Table

from antidiffusion.cli.shared import say, stderr
from antidiffusion.failures import printable

STREAM = Path("-")
NAMES = {
    "done": "protected",
    "finished": "finished before, with the same options",
    "own": "made by antidiffusion, so left as they are",
    "failed": "failed",
}


class Teller:
    """Says what became of pictures, on both streams and in a log, and counts.

    Arguments:
        log: File to append to, or None.
    """

    def __init__(self, log: Path | None) -> None:
        self.counts: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self.there: list[Any] = []  # outcomes whose card is on the disk, without the card
        self.largest, self.seconds = 0, 0.0
        self.psnr: tuple[int, float] = (0, 0.0)  # pictures that changed, and the sum
        self.hidden = ""  # the folder in which files stand for streams
        self._path = log
        self._log: TextIO | None = None

    def __enter__(self) -> Self:
        self._log = self._path.open("a", encoding="utf-8", errors="backslashreplace") if self._path else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._log:
            self._log.close()

    def note(self, text: str) -> None:
        """Append a line to the log."""
        if self._log:
            self._log.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {printable(text)}\n")
            self._log.flush()

    def warn(self, text: str, style: str) -> None:
        """Say a line on standard error and in the log."""
        text = text.replace(self.hidden, "") if self.hidden else text
        self.note(text)
        say(text, style)

    def left_out(self, left: Iterable[Any]) -> None:
        """Name what a folder holds and is not protected."""
        for entry in left:
            self.left[entry.reason] += 1
            self.warn(f"left out: {entry.path}: {entry.reason}; {entry.remedy}", "yellow")

    def told(self, outcome: Any, quiet: bool, as_json: bool) -> None:
        """Say what became of a picture: its card on standard output, anything else on standard error.

        Arguments:
            outcome: From a run.
            quiet: Standard output is not for cards: they go to standard error, each a line.
            as_json: Print cards as JSON.
        """
        path, card = str(outcome.job.target), outcome.card
        self.counts[outcome.kind] += 1
        if outcome.kind == "failed":
            self.warn(f"failed: {outcome.error}", "red")
        elif outcome.kind == "own":
            self.warn(f"left as it is: {outcome.error}", "yellow")
        elif outcome.kind == "finished":
            self.there.append(outcome.job)
            self.note(f"finished before: {path}")
        else:
            self.there.append(outcome.job)
            self.largest = max(self.largest, card["budget"]["measured"])
            if (psnr := card["fidelity"]["psnr"]) is not None:
                self.psnr = (self.psnr[0] + 1, self.psnr[1] + psnr)
            self.seconds += card["cost"]["seconds"]
            self.note(f"protected: {path}: {card['budget']['measured']}/255, {card['cost']['seconds']:.1f} s")
            if quiet:
                stderr.print(json.dumps({name: value for name, value in card.items() if name != "source"}))
            else:
                print(json.dumps({"path": path} | card) if as_json else summary(path, card), flush=True)

    def interrupted(self, total: int) -> None:
        """Say what an interrupted run has done."""
        there = self.counts["done"] + self.counts["finished"]
        self.warn(
            f"interrupted with {there} of {total} pictures finished and no half-written file; "
            "run the same command again to do the rest",
            "red",
        )

    def summed_up(self, total: int) -> None:
        """Print the table, unless there was one picture only; say how many failed."""
        rows = [(NAMES[kind], self.counts[kind]) for kind in NAMES if self.counts[kind]]
        rows += [(f"left out: {reason}", count) for reason, count in sorted(self.left.items())]
        self.note(", ".join(f"{count} {name}" for name, count in rows))
        if total + len(self.left) > 1 or not self.counts["done"]:
            table = Table("pictures", "", box=None, show_header=False, pad_edge=False)
            for name, count in rows:
                table.add_row(str(count), name)
            if done := self.counts["done"]:
                changed, total_psnr = self.psnr
                fidelity = f"PSNR {total_psnr / changed:.1f} dB" if changed else "unchanged"
                table.add_row("", f"at most {self.largest}/255, {fidelity} and {self.seconds / done:.1f} s each")
            stderr.print(table)
        if failed := self.counts["failed"]:
            self.warn(f"{failed} of {total} pictures failed", "red")

    def preview(self) -> Path | None:
        """Write the page of all pictures that are there, and return its path; None if there is none."""
        from antidiffusion.card import read_card
        from antidiffusion.preview import page_for, write_preview

        if not self.there:
            return None
        page = page_for(job.target for job in self.there)
        cards = ((job, read_card(job.target)) for job in self.there)
        write_preview(page, ((job.source, job.target, card) for job, card in cards if card), len(self.there))
        return page


@contextmanager
def streams(
    inputs: Sequence[Path], output: Path | None, suffix: str | None, teller: Teller
) -> Iterator[tuple[Sequence[Path], Path | None, Callable[[], None] | None]]:
    """Give files in the place of standard input and output, in a folder that nobody else can read and that goes again.

    Arguments:
        inputs, output: As given; `-` is a stream. One picture from standard input goes to standard output.
        suffix: Of the output.
        teller: Is told which folder to say nothing of.

    Yields:
        What stands for inputs and output, and a function that writes the result to standard output, if it goes there.

    Raises:
        ValueError: If a stream is one of several.
    """
    to_stream = output == STREAM or (output is None and list(inputs) == [STREAM])
    if STREAM not in inputs and not to_stream:
        yield inputs, output, None
        return
    if len(inputs) > 1 or inputs[0].is_dir():
        raise ValueError("expected one picture with -, got several; name files and a folder for them")
    with TemporaryDirectory(prefix="antidiffusion-") as folder:
        source, target = inputs[0], output
        teller.hidden = f"{folder}{os.sep}"
        if source == STREAM:
            source = Path(folder) / "standard input"
            source.write_bytes(sys.stdin.buffer.read())
        if to_stream:
            target = Path(folder) / f"standard output{suffix or '.png'}"

        def pour() -> None:
            if target is not None and target.is_file():
                sys.stdout.buffer.write(target.read_bytes())
                sys.stdout.buffer.flush()

        yield [source], target, pour if to_stream else None


def expect_room_for_all(jobs: Sequence[Any], resize: int | None) -> None:
    """Warn if the disk may not have the room for all outputs, by the headers of the pictures alone."""
    from PIL import Image

    needed = 0
    for job in jobs:
        if not job.target.exists():
            try:
                with warnings.catch_warnings(action="ignore"), Image.open(job.source) as image:
                    width, height = image.size
            except Exception:  # whatever is wrong with it is said when it is read
                continue
            scale = min(1, (resize or max(width, height)) / max(width, height))
            needed += round(3 * width * height * scale**2)
    if not jobs:
        return
    folder = jobs[0].target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        got = f"{free / 1e9:.1f} GB free"
        warnings.warn(f"the outputs may take {needed / 1e9:.1f} GB, and {folder} has {got}", stacklevel=2)


def summary(path: str, card: dict[str, Any]) -> str:
    """Render a report card in a few lines."""

    def number(value: float | None, form: str) -> str:
        return "undefined" if value is None else format(value, form)

    budget, effect, fidelity, cost = card["budget"], card["effect"], card["fidelity"], card["cost"]
    allowed = f"{budget['requested']:g}/255 allowed"
    if "allowed_as_jpeg" in budget:
        allowed += f", {budget['allowed_as_jpeg']:g}/255 as JPEG of quality {budget['jpeg_quality']}"
    lines = [
        printable(path),
        f"  budget     {budget['measured']}/255 measured on the written file, {allowed}",
        f"  fidelity   PSNR {number(fidelity['psnr'], '.1f')} dB, SSIM {number(fidelity['ssim'], '.3f')}",
        f"  to the eye {fidelity['delta_e_95']:.1f} of CIELAB at the 95th percentile, 2.3 is just noticed: "
        + ("visible side by side" if fidelity["visible"] else "not visible"),
        *effects(effect, number),
        f"  cost       {cost['seconds']:.1f} s, {cost['peak_memory_mb']} MB peak",
        f"  recipe     {card['recipe']['name']}, seed {card['seed']}, model {card['model']['name']} "
        f"{card['model']['sha256'][:12]}",
    ]
    return "\n".join(lines + [f"  note       {printable(note)}" for note in card["picture"]["notes"]])


def effects(effect: dict[str, Any], number: Callable[[float | None, str], str]) -> list[str]:
    """Render what the model, or the latent spaces, make of the protected picture."""
    if "latent_shift" in effect:
        noise = effect["latent_shift_of_random_signs"]
        moved = (f"{name} {value:.2f} ({noise[name]:.2f})" for name, value in effect["latent_shift"].items())
        return [f"  latents    moved by this share of their variance (random signs): {', '.join(moved)}"]
    before, after = (number(effect[f"denoising_loss_{name}"], ".4f") for name in ("before", "after"))
    ratio = number(effect["denoising_loss_ratio"], ".2f")
    return [
        f"  loss       {before} -> {after} ({ratio}x; fresh noise, prompt '{effect['prompt']}')",
        f"  attention  {number(effect['attention_mass_moved'], '.1%')} of the mass moved",
    ]
