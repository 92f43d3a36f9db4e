"""Train the embedded model and its sister, on a processor or a card.

    python -m train_mini all --out RUN --teacher DIR --assets DIR --minutes 14
    python -m train_mini data|encoder|decoder|unet|package|measure --out RUN ...
    python -m train_mini follow|restore --out RUN --results DIR

RUN gets the stages' files: STAGE.pt to resume from, STAGE.safetensors with the averaged weights, STAGE.jsonl, a line a
minute. `all` draws the pictures beside the training, and after a kill goes on where it was. `follow` copies what there
is of a run's results to a few small files again and again; `restore` makes a run of them.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path

from train_mini.settings import Settings, tiny

STAGES = ("data", "encoder", "decoder", "unet", "package", "measure", "all", "follow", "restore")


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser("train_mini", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    top.add_argument("stage", choices=STAGES)
    top.add_argument("--out", type=Path, required=True, metavar="RUN", help="folder of the run")
    top.add_argument("--data", type=Path, help="folder of the pictures (RUN/data)")
    top.add_argument("--assets", type=Path, help="folder that `python -m portraits assets` made: data, all")
    top.add_argument("--teacher", type=Path, help="folder of an AutoencoderTiny, taesd: encoder, measure, all")
    top.add_argument("--name", default="mini", help="model that unet trains and package writes: mini or second")
    top.add_argument("--prediction", choices=("epsilon", "v_prediction"), help="in place of the model's own, as next")
    top.add_argument(
        "--channels", type=lambda text: tuple(map(int, text.split(","))), help="UNet's, such as 64,128,192"
    )
    top.add_argument("--seed", type=int, help="of the stage or, with unet, of the model")
    top.add_argument("--batch", type=int, help="pictures a step, all kinds together")
    top.add_argument("--minutes", type=float, help="of the clock, all runs of this stage together")
    top.add_argument("--steps", type=float, default=float("inf"), help="end after so many, whatever the clock says")
    top.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that draw")
    top.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    top.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    top.add_argument("--plain", action="store_true", help="no CUDA graph")
    top.add_argument("--tiny", action="store_true", help="a minute or two on a processor, to try the way")
    top.add_argument("--weights", choices=("float16", "float32"), default="float16", help="of package's files")
    top.add_argument("--package", type=Path, help="where package writes (RUN/models/NAME)")
    top.add_argument("--results", type=Path, help="folder of follow and restore")
    top.add_argument("--pid", type=int, help="process that follow looks at")
    top.add_argument("--seconds", type=float, default=560, help="how long follow stays")
    return top


def settings_of(options: argparse.Namespace) -> Settings:
    """Return the run's settings with what the command line changes."""
    settings = tiny() if options.tiny else Settings()
    if options.name not in settings.models:
        raise SystemExit(f"expected a model of {', '.join(settings.models)}, got {options.name!r}")
    wanted = {key: getattr(options, key) for key in ("prediction", "channels", "seed", "batch")}
    changes = {key: value for key, value in wanted.items() if value is not None}
    if options.stage in ("encoder", "decoder"):
        own = getattr(settings, options.stage)
        own = own.sized(options.batch or sum(own.batch.values()))
        own = dataclasses.replace(own, seed=own.seed if options.seed is None else options.seed)
        return dataclasses.replace(settings, **{options.stage: own})
    model = dataclasses.replace(settings.models[options.name], **changes)
    return dataclasses.replace(settings, models=settings.models | {options.name: model})


def need(options: argparse.Namespace, *names: str) -> None:
    """Exit with a sentence unless these options are given."""
    if absent := [f"--{name}" for name in names if getattr(options, name) is None]:
        raise SystemExit(f"expected {' and '.join(absent)} with stage {options.stage}, got none")


def stage_command(options: argparse.Namespace, stage: str, minutes: float) -> list[str]:
    """Return the command line of one stage of `all`."""
    name = stage if stage in Settings().models else options.name
    words = [sys.executable, "-m", "train_mini", "unet" if name == stage else stage, "--name", name]
    words += ["--minutes", f"{minutes:.3f}", "--device", options.device, "--precision", options.precision]
    for key in ("out", "data", "assets", "teacher", "workers"):
        words += [f"--{key}", str(getattr(options, key))]
    if stage == options.name:
        for key in ("prediction", "seed", "batch"):
            words += [f"--{key}", str(getattr(options, key))] * (getattr(options, key) is not None)
        words += ["--channels", ",".join(map(str, options.channels))] * (options.channels is not None)
    return words + ["--tiny"] * options.tiny


def draw(options: argparse.Namespace, settings: Settings) -> None:
    """Draw the pictures, with a line every ten seconds."""
    from train_mini.data import draw_all

    begun = last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        if time.monotonic() - last > 10:
            last = time.monotonic()
            print(f"{done} chunks, {last - begun:.0f} s", flush=True)

    draw_all(options.assets, options.data, settings.data, options.workers, report)
    print(f"all pictures after {time.monotonic() - begun:.0f} s", flush=True)


def running(pid: int) -> bool:
    """Return whether a process lives, zombies excluded."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def main() -> int:
    """Run one stage and return the exit status."""
    options = parser().parse_args()
    options.data = options.data or options.out / "data"
    stage, settings = options.stage, settings_of(options)
    if stage == "data":
        need(options, "assets")
        draw(options, settings)
        return 0
    if stage in ("follow", "restore"):
        from train_mini.results import follow, restore

        need(options, "results")
        if stage == "restore":
            restore(options.results, options.out)
            return 0
        need(options, "pid")
        every = 5.0 if options.tiny else 20.0
        ended = follow(options.out, options.results, options.seconds, every, lambda: running(options.pid))
        print("finished" if ended else "not finished: call again, the run goes on", flush=True)
        return 0

    import torch

    from train_mini.everything import everything, train
    from train_mini.loop import Budget, Machine

    machine = Machine.choose(options.device, options.precision)
    machine = dataclasses.replace(machine, graph=machine.graph and not options.plain)
    if machine.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if stage == "all":
        need(options, "assets", "teacher", "minutes")
        places = (options.out, options.data, options.teacher)
        return bool(
            everything(settings, *places, machine, options.minutes, lambda *what: stage_command(options, *what))
        )
    if stage == "package":
        from train_mini.package import package

        target = options.package or options.out / "models" / options.name
        package(settings, options.name, options.out, target, getattr(torch, options.weights))
        return 0
    if stage == "measure":
        from train_mini.measure import measure

        need(options, "teacher")
        names = list(settings.models)
        out = options.out / "measure.json"
        measure(settings.measure, options.out / "models", names, options.data, options.teacher, machine, out)
        return 0
    if options.minutes is None and options.steps == float("inf"):
        raise SystemExit(f"expected --minutes or --steps with stage {stage}, got neither")
    if stage == "encoder":
        need(options, "teacher")
    budget = Budget(float("inf") if options.minutes is None else 60 * options.minutes, options.steps)
    name = options.name if stage == "unet" else stage
    train(settings, name, options.data, options.out, options.teacher, machine, budget)
    return 0


if __name__ == "__main__":
    sys.exit(main())
