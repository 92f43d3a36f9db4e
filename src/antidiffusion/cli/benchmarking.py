"""`antidiffusion bench`: protections against attacks, as rows that a stopped run does not lose."""

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer

from antidiffusion.cli import shared
from antidiffusion.cli.shared import DType, app, progress_bar, say, stderr, usage


@app.command()
def bench(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run; a stopped run goes on in it.")],
    plan: Annotated[Path | None, typer.Argument(help="TOML file. Default: the plan that ships.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="A few minutes that try every part; no figures.")] = False,
    dataset: Annotated[
        Path | None, typer.Option(help="Folder NAME/{picture, prompt.txt} or with a manifest, for the edits.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each loads the models.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Precision of the models.")] = DType.auto,
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Stream the blocks of large transformers.")] = False,
) -> None:
    """Run protections against attacks and write a row for every trial; `antidiffusion report` shows them."""
    with usage():
        from antidiffusion.bench.plan import Plan
        from antidiffusion.bench.rows import ROWS
        from antidiffusion.bench.runner import run

        if plan is not None and smoke:
            raise ValueError("expected a plan or --smoke, got both; leave one out")
        shipped = Path(str(resources.files("antidiffusion"))) / "bench" / ("smoke.toml" if smoke else "default.toml")
        chosen = Plan.read(plan or shipped, dataset)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "low_memory": low_memory}
        load = partial(shared.load_surrogate, config=None, full_tuning=True, **options)
        total, failed = sum(1 for _ in chosen.trials()), 0
        with progress_bar() as bar:
            task = bar.add_task("trials", total=total)
            for done in run(chosen, output, load, jobs=jobs):
                bar.advance(task)
                where = (
                    f"{done.trial.dataset}/{done.trial.item}, {done.trial.recipe}, {done.trial.attack or 'protection'}"
                )
                bar.update(task, description=where)
                if done.error is not None:
                    failed += 1
                    say(f"error: {where}: {done.error}", style="red")
    print(output / ROWS)
    if failed:
        stderr.print(f"{failed} of {total} trials failed and have no row; run the same command again to try them")
        raise typer.Exit(1)
