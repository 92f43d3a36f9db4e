"""All stages in turn, in a time: pictures are drawn beside the training, which starts with what is there."""

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open

from train_mini.data import Store, create, wait
from train_mini.decoder import train_decoder
from train_mini.encoder import train_encoder
from train_mini.loop import Budget, Machine, run
from train_mini.measure import measure
from train_mini.package import package
from train_mini.results import FINISHED
from train_mini.settings import Settings
from train_mini.unet import train_unet

# Of the time. The decoder sharpens slowest, so it has most; on one H200 the UNet took 12,000 samples/s.
SHARES = {"encoder": 0.26, "decoder": 0.32, "mini": 0.24, "second": 0.07}
END = 0.07  # share for packages and figures; the other 0.04 are for the start
FIRST = 0.02  # share of the pictures that training waits for


def train(
    settings: Settings, stage: str, data: Path, folder: Path, teacher: Path, machine: Machine, budget: Budget
) -> int:
    """Run one training stage, "encoder", "decoder" or a model's name; returns its steps."""
    if stage == "encoder":
        training = train_encoder(settings, data, teacher, machine)
    elif stage == "decoder":
        training = train_decoder(settings, data, folder, machine)
    else:
        training = train_unet(settings, stage, data, folder, machine)
    return run(training, folder, machine, budget)


def complete(settings: Settings, data: Path) -> bool:
    return all(len(Store(data, kind).rows()) == count for kind, count in settings.data.counts().items())


def allowance(stage: str, whole: float, elapsed: float, spent: float) -> float:
    """Return the seconds that a stage may take in all its runs.

    Arguments:
        stage: A key of `SHARES`; those after it are still to come.
        whole: Seconds of all.
        elapsed: Seconds that are over, `spent` among them.
        spent: Seconds that this stage took in earlier runs.

    Returns:
        Its share of the whole, or less if it is late: then this stage and those to come shrink alike.
    """
    stages = list(SHARES)
    wanted = max(0.0, SHARES[stage] * whole - spent)
    later = sum(SHARES[name] for name in stages[stages.index(stage) + 1 :]) * whole
    left = max(0.0, (1 - END) * whole - elapsed)
    return spent + wanted * min(1.0, left / max(1e-9, wanted + later))


def spent_in(folder: Path, stage: str) -> float:
    """Return the seconds that a stage's weights have been trained for."""
    path = folder / f"{stage}.safetensors"
    if not (path.exists() and path.with_suffix(".pt").exists()):
        return 0.0
    with safe_open(path, "pt") as file:
        return float(file.metadata()["seconds"])


class Progress:
    """Which stages are done and how long everything took, in progress.json."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "progress.json"
        kept = json.loads(self.path.read_text()) if self.path.exists() else {"seconds": 0.0, "done": []}
        self.done: list[str] = kept["done"]
        self.begun = time.monotonic() - kept["seconds"]

    def elapsed(self) -> float:
        return time.monotonic() - self.begun

    def finish(self, *stages: str) -> None:
        self.done += stages
        self.path.write_text(json.dumps({"seconds": self.elapsed(), "done": self.done}))


def report(folder: Path, event: str) -> None:
    """Print and log what happened outside the stages' loops."""
    row = json.dumps({"stage": "all", "event": event})
    print(row, flush=True)
    with (folder / "all.jsonl").open("a") as file:
        file.write(row + "\n")


def everything(
    settings: Settings,
    folder: Path,
    data: Path,
    teacher: Path,
    machine: Machine,
    minutes: float,
    command: Callable[[str, float], list[str]],
) -> list[str]:
    """Train, package and measure in so many minutes of all calls together; one after a kill goes on where it was.

    A stage that fails is tried again in a process of its own with plain steps; if it fails there, the others go on.

    Arguments:
        settings: Of the run.
        folder: For checkpoints, weights, logs, packages and figures.
        data: For pictures.
        teacher: Folder of the teacher.
        machine: Where to compute.
        minutes: Time of the clock.
        command: Returns the command line of a stage and its minutes, "data" among them.

    Returns:
        What failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FINISHED).unlink(missing_ok=True)
    progress, whole, failed = Progress(folder), 60 * minutes, []
    create(data, settings.data)
    with (folder / "data.log").open("a") as log:
        artist = subprocess.Popen(
            command("data", minutes), stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )

    def drawing() -> bool:
        return artist.poll() is None or complete(settings, data)

    try:
        wait(data, {kind: max(1, int(FIRST * n)) for kind, n in settings.data.counts().items()}, drawing)
        report(folder, f"first pictures after {progress.elapsed():.0f} s")
        for stage in SHARES:
            if stage in progress.done:
                continue
            spent = spent_in(folder, stage)
            progress.begun -= spent  # a killed call did not come to write it down
            if stage in settings.models and not complete(settings, data):
                try:
                    wait(data, settings.data.counts(), drawing, 0.02 * whole)
                except RuntimeError as error:
                    report(folder, f"going on without all pictures: {error}")
            seconds = allowance(stage, whole, progress.elapsed(), spent)
            try:
                steps = train(settings, stage, data, folder, teacher, machine, Budget(seconds))
            except Exception as error:  # whatever it is, nobody is there, and the others' time must not be lost
                traceback.print_exc()
                report(folder, f"{stage} failed, plain steps in another process: {error!r}"[:500])
                seconds = allowance(stage, whole, progress.elapsed(), spent)
                if subprocess.run([*command(stage, seconds / 60), "--plain"], check=False).returncode:
                    failed.append(stage)
            else:
                report(folder, f"{stage} ended after {steps} steps, {progress.elapsed():.0f} s in all")
            progress.finish(*({stage} - set(failed)))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(artist.pid, signal.SIGTERM)  # and its workers
        artist.wait()
    failed += finish(settings, folder, data, teacher, machine, command)
    report(folder, f"the end after {progress.elapsed():.0f} s; failed: {', '.join(failed) or 'nothing'}")
    (folder / FINISHED).touch()
    return failed


def finish(
    settings: Settings,
    folder: Path,
    data: Path,
    teacher: Path,
    machine: Machine,
    command: Callable[[str, float], list[str]],
) -> list[str]:
    """Package every model whose weights are there, to folder/models, and measure them; return what failed."""
    failed = []
    for name in settings.models:
        try:
            package(settings, name, folder, folder / "models" / name, torch.float16)
        except Exception as error:
            traceback.print_exc()
            report(folder, f"package {name} failed: {error!r}"[:500])
            failed.append(f"package {name}")
    try:
        measure(
            settings.measure, folder / "models", list(settings.models), data, teacher, machine, folder / "measure.json"
        )
    except Exception as error:
        traceback.print_exc()
        report(folder, f"measure failed, another process tries: {error!r}"[:500])
        if subprocess.run(command("measure", 1), check=False).returncode:
            failed.append("measure")
    return failed
