"""`antidiffusion protect` and `antidiffusion demo`."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from antidiffusion.cli import shared
from antidiffusion.cli.shared import MAX_SEED, MINI_NOTE, DType, app, progress_bar, stderr, usage, with_options


class OutputFormat(StrEnum):
    text = "text"
    json = "json"


class Tuning(StrEnum):
    auto = "auto"
    full = "full"
    lora = "lora"


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
    recipe: Annotated[
        str,
        typer.Option(
            help="anti-diffusion, official, another protection of the field such as aspl or mist, or random-sign."
        ),
    ] = "anti-diffusion",
    budget: Annotated[float, typer.Option(help="Largest change of any channel of any pixel, in 1/255 (1 to 64).")] = 8,
    steps: Annotated[int | None, typer.Option(min=1, help="Ascent steps of each phase.")] = None,
    rounds: Annotated[int | None, typer.Option(min=0, help="Rounds of surrogate tuning and ascent.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the work.")] = False,
    strong: Annotated[bool, typer.Option("--strong", help="Twice the work.")] = False,
    together: Annotated[
        bool, typer.Option("--together", help="All pictures show one person: protect them jointly.")
    ] = False,
    tuning_steps: Annotated[int | None, typer.Option(min=0, help="Steps that tune the surrogate in a round.")] = None,
    tuning: Annotated[Tuning, typer.Option(help="How these steps tune it.")] = Tuning.auto,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Recompute instead of keeping; slower.")] = False,
    side: Annotated[int | None, typer.Option(min=64, help="Pixels at which the surrogate looks.")] = None,
    mask: Annotated[
        Path | None, typer.Option(help="Picture as large as IN, white where IN may change: the rest stays as it is.")
    ] = None,
    luma: Annotated[bool, typer.Option("--luma", help="Change brightness only, not colours.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same bytes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Precision of the surrogate.")] = DType.auto,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try a few steps, say what time and memory it takes, write nothing.")
    ] = False,
    format_: Annotated[OutputFormat, typer.Option("--format", help="Of standard output.")] = OutputFormat.text,
) -> None:
    """Protect pictures; writes lossless copies and a report card (JSON) beside each."""
    with usage():
        from antidiffusion.batch import Job, plan, run
        from antidiffusion.pictures.picture import Picture

        if quick and strong:
            raise ValueError("expected --quick or --strong, got both; leave one out")
        options = {
            "--budget": budget,
            "--steps": steps,
            "--rounds": rounds,
            "--tuning-steps": tuning_steps,
            "--tuning": None if tuning is Tuning.auto else tuning.value,
        }
        chosen = choose_recipe(recipe, "quick" if quick else "strong" if strong else None, options)
        if dry_run and not hasattr(chosen, "counts"):
            raise ValueError(f"expected --dry-run with anti-diffusion or official, got {recipe}; leave it out")
        jobs = plan(inputs, output)
        allowed = None if mask is None else Picture.read(mask)
        full_tuning = recipe == "official" or tuning is Tuning.full
        surrogate = shared.load_surrogate(
            model, model_config, device, dtype, full_tuning=full_tuning, low_memory=low_memory
        )
        if dry_run:
            print(_forecast(jobs, chosen, surrogate, together, side, low_memory, format_))
            return
    if model == "mini":
        stderr.print(MINI_NOTE, style="yellow")

    done = failed = 0
    with progress_bar() as bar:
        task = bar.add_task("starting", total=None)

        def progress(job: Job) -> Any:
            name = f"{len(jobs)} pictures together" if together else job.source.name

            def update(stage: str, done: int, total: int) -> None:
                bar.update(task, description=f"{name}: {stage}", completed=done, total=total)

            bar.reset(task)
            return update

        how: dict[str, Any] = {"seed": seed, "together": together, "side": side, "overwrite": overwrite}
        how |= {"mask": allowed, "luma": luma, "low_memory": low_memory}
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


def _forecast(
    jobs: list[Any],
    recipe: Any,
    surrogate: Any,
    together: bool,
    side: int | None,
    low_memory: bool,
    format_: OutputFormat,
) -> str:
    from antidiffusion.forecast import forecast
    from antidiffusion.pictures.picture import Picture

    pictures = [Picture.read(job.source) for job in jobs]
    found = forecast(pictures, recipe, surrogate, together=together, side=side, low_memory=low_memory)
    figures = {"pictures": len(jobs), "seconds": round(found.seconds, 1)}
    figures["peak_memory_mb"] = round(found.peak_memory / 1e6)
    if format_ is OutputFormat.json:
        return json.dumps(figures)
    return "about {seconds} s for {pictures} picture(s), {peak_memory_mb} MB at the peak; nothing was written".format(
        **figures
    )


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
    budget: Annotated[float, typer.Option(help="In 1/255 (1 to 64).")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="A fifth of the work.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED)] = 0,
) -> None:
    """Protect synthetic portraits with the embedded model, edit them, and write one page that shows it all."""
    with usage():
        from antidiffusion.demo import run_demo

        recipe = choose_recipe("anti-diffusion", "quick" if quick else None, {"--budget": budget})
        surrogate = shared.load_surrogate("mini", None, "cpu", DType.float32)
        with progress_bar() as bar:
            task = bar.add_task("starting", total=None)

            def progress(stage: str, done: int, total: int) -> None:
                bar.update(task, description=stage, completed=done, total=total)

            page = run_demo(output, surrogate, recipe, seed=seed, progress=progress)
    print(page)


def choose_recipe(name: str, preset: str | None, options: dict[str, Any]) -> Any:
    """Return the recipe with the options that were given: those that are not None."""
    from antidiffusion.pictures.budget import Linf
    from antidiffusion.recipes import PRESETS, RECIPES

    if name not in RECIPES:
        raise ValueError(f"expected a recipe of {', '.join(RECIPES)}, got {name!r}; check the spelling")
    if preset and name != "anti-diffusion":
        raise ValueError(f"expected --{preset} with the recipe anti-diffusion, got {name}; leave it out")
    recipe: Any = PRESETS[preset] if preset else RECIPES[name]
    Linf(options["--budget"])
    return with_options(recipe, f"the recipe {name}", options)
