"""`antidiffusion protect` and `antidiffusion demo`."""

import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from antidiffusion.cli import shared
from antidiffusion.cli.shared import (
    LATENTS_NOTE,
    MAX_SEED,
    MINI_NOTE,
    DType,
    app,
    progress_bar,
    stderr,
    usage,
    with_options,
)
from antidiffusion.cli.telling import Teller, expect_room_for_all, streams
from antidiffusion.failures import printable


class PictureFormat(StrEnum):
    png = "png"
    webp = "webp"
    tiff = "tiff"


class Tuning(StrEnum):
    auto = "auto"
    full = "full"
    lora = "lora"


@app.command()
def protect(
    inputs: Annotated[
        list[Path], typer.Argument(metavar="IN...", help="Pictures or folders of pictures; - for standard input.")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder, or a file for one picture, or - for standard output. Default: NAME-protected beside IN.",
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="Surrogate: hub id, diffusers folder, .safetensors file, mini, latents (public encoders of four "
            "families) or latents:sd+flux (some of them)."
        ),
    ] = "latents",
    model_config: Annotated[
        str | None, typer.Option(help="Diffusers folder or hub id with a single file's configuration.")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="anti-diffusion, latents, official, another protection of the field such as aspl or mist, or "
            "random-sign. Default: latents for latent spaces, anti-diffusion for a model."
        ),
    ] = None,
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
    resize: Annotated[
        int | None, typer.Option(min=64, help="Scale down to this longest side first; then protect.")
    ] = None,
    format_: Annotated[PictureFormat | None, typer.Option("--format", help="Of the pictures. Default: png.")] = None,
    jpeg: Annotated[
        int | None,
        typer.Option(
            min=80, max=100, help="Write JPEG of this quality, which leaves the budget; the card says how far."
        ),
    ] = None,
    keep_location: Annotated[
        bool, typer.Option("--keep-location", help="Keep coordinates and names of places in the metadata.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each loads the model.")] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing outputs.")] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Protect what antidiffusion made too, from the original if it is there.")
    ] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Write a page that shows before, after and difference.")
    ] = False,
    log: Annotated[Path | None, typer.Option(help="Append to this file what became of every picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each report card as a line of JSON.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Try a few steps, say what time and memory it takes, write nothing.")
    ] = False,
) -> None:
    """Protect pictures; writes lossless copies and a report card (JSON) beside each.

    A folder that was begun is gone on with: what is finished with the same options is not done again.
    """
    with usage(), Teller(log) as teller:
        from antidiffusion.batch import Settings, run
        from antidiffusion.folders import plan
        from antidiffusion.models.latents import names_latents
        from antidiffusion.pictures.picture import Picture
        from antidiffusion.workers import spread

        if quick and strong:
            raise ValueError("expected --quick or --strong, got both; leave one out")
        if format_ and jpeg:
            raise ValueError("expected --format or --jpeg, got both; leave one out")
        if jobs > 1 and together:
            raise ValueError("expected one job for pictures together, got --jobs too; leave one out")
        options = {
            "--budget": budget,
            "--steps": steps,
            "--rounds": rounds,
            "--tuning-steps": tuning_steps,
            "--tuning": None if tuning is Tuning.auto else tuning.value,
        }
        recipe = recipe or ("latents" if names_latents(model) else "anti-diffusion")
        chosen = choose_recipe(recipe, "quick" if quick else "strong" if strong else None, options)
        if dry_run and not hasattr(chosen, "counts"):
            raise ValueError(f"expected --dry-run with anti-diffusion, latents or official, got {recipe}; leave it out")
        suffix = ".jpg" if jpeg else f".{format_}" if format_ else None
        with streams(inputs, output, suffix, teller) as (sources, destination, pour):
            planned = plan(sources, destination, suffix=suffix)
            if mask is not None:
                Picture.read(mask)  # better now than after the first picture
            how: dict[str, Any] = {"mask": mask, "luma": luma, "low_memory": low_memory, "resize": resize}
            how |= {"quality": jpeg, "keep_location": keep_location, "overwrite": overwrite, "again": again}
            settings = Settings(chosen, seed, together, side, **how)
            teller.left_out(planned.left)
            load = partial(
                shared.load_surrogate,
                model,
                model_config,
                device,
                dtype,
                encoders=True,
                full_tuning=recipe == "official" or tuning is Tuning.full,
                low_memory=low_memory,
            )
            if dry_run:
                print(_forecast(planned.jobs, settings, load(), teller, as_json))
                raise typer.Exit(1 if teller.counts["failed"] else 0)
            expect_room_for_all(planned.jobs, resize)
            surrogate: Any = load() if jobs == 1 else None  # else every process has its own
            if model == "mini" or names_latents(model):
                stderr.print(MINI_NOTE if model == "mini" else LATENTS_NOTE, style="yellow")
            with progress_bar() as bar:
                hook = moving(bar, len(planned.jobs), together)
                if jobs > 1:
                    outcomes = spread(planned.jobs, settings, load, jobs)
                else:
                    outcomes = run(planned.jobs, settings, surrogate, progress=hook)
                try:
                    for outcome in outcomes:
                        bar.advance(bar.tasks[0].id)
                        teller.told(outcome, bool(pour), as_json)
                except KeyboardInterrupt:
                    bar.stop()
                    teller.interrupted(len(planned.jobs))
                    raise typer.Exit(130) from None
            if pour:
                pour()
            if preview:
                print(printable(str(teller.preview())))
            teller.summed_up(len(planned.jobs))
    if teller.counts["failed"] or (pour and not teller.counts["done"]):
        raise typer.Exit(1)


def moving(bar: Progress, total: int, together: bool) -> Callable[[Any], Callable[[str, int, int], None]]:
    """Show a bar for the pictures and one for the steps; gives what makes the hook of a job."""
    bar.add_task("pictures", total=total, visible=total > 1)
    steps = bar.add_task("starting", total=None)

    def progress(job: Any) -> Callable[[str, int, int], None]:
        name = f"{total} pictures together" if together else printable(job.source.name)
        bar.reset(steps)
        return lambda stage, done, total: bar.update(steps, description=f"{name}: {stage}", completed=done, total=total)

    return progress


def _forecast(jobs: list[Any], settings: Any, surrogate: Any, teller: Teller, as_json: bool) -> str:
    """Go through the pictures as a run does, and try the largest."""
    from antidiffusion.batch import Outcome, Worker, groups
    from antidiffusion.forecast import forecast

    worker, needed = Worker(settings, surrogate), 0

    def opened() -> Iterator[Any]:
        nonlocal needed
        for group in groups(jobs, settings):
            for _, found in worker.prepared(group):
                if isinstance(found, Outcome):
                    teller.told(found, True, as_json)
                else:
                    needed += found.pixels.nbytes
                    yield found

    how: dict[str, Any] = {name: getattr(settings, name) for name in ("together", "side", "low_memory")}
    found = forecast(opened(), settings.recipe, surrogate, **how)
    figures = {"pictures": found.pictures, "seconds": round(found.seconds, 1)}
    figures |= {"peak_memory_mb": round(found.peak_memory / 1e6), "output_mb": round(needed / 1e6, 1)}
    if as_json:
        return json.dumps(figures)
    return (
        "about {seconds} s for {pictures} picture(s), {peak_memory_mb} MB at the peak, {output_mb} MB of files at most"
        "; nothing was written"
    ).format(**figures)


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
    if preset and name not in PRESETS:
        raise ValueError(f"expected --{preset} with a recipe of {', '.join(PRESETS)}, got {name}; leave it out")
    recipe: Any = PRESETS[name][preset] if preset else RECIPES[name]
    Linf(options["--budget"])
    return with_options(recipe, f"the recipe {name}", options)
