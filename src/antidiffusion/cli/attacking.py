"""`antidiffusion sample`, `edit` and `attack`: the misuse, to see and to measure what a protection does to it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from antidiffusion.cli import shared
from antidiffusion.cli.shared import MAX_SEED, DType, app, progress_bar, usage, with_options
from antidiffusion.failures import expect_finite
from antidiffusion.progress import Progress

Output = Annotated[Path, typer.Option("--output", "-o", help="PNG file; several pictures stand side by side.")]
Model = Annotated[str, typer.Option(help="Hub id, diffusers folder, .safetensors file, or mini.")]
ModelConfig = Annotated[str | None, typer.Option(help="Diffusers folder or hub id with a single file's configuration.")]
Seed = Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Same seed, same bytes.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[DType, typer.Option(help="Precision of the model.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing output.")]
LowMemory = Annotated[bool, typer.Option("--low-memory", help="Text encoders and autoencoder wait on the CPU; slower.")]
Guidance = Annotated[float | None, typer.Option(help="Scale of classifier-free guidance; 1 turns it off.")]


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One picture is drawn for each.")],
    output: Output,
    model: Model = "mini",
    model_config: ModelConfig = None,
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=1000, help="Default: 25, or fewer where a model needs fewer."),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(help="Scale of guidance. Default: 5, or less where a model takes less."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    overwrite: Overwrite = False,
) -> None:
    """Draw what a model makes of prompts: what an attacker would see."""
    with usage():
        from torch import Generator

        from antidiffusion.models.sampling import sample as sampled

        surrogate = _prepare(output, overwrite, model, model_config, device, dtype)
        with _reporting("drawing") as progress:
            scale = min(5, surrogate.guidance) if guidance is None else guidance
            options: dict[str, Any] = {"steps": steps, "guidance": scale, "progress": progress}
            x = sampled(prompts, surrogate, Generator().manual_seed(seed), **options)
        _write(x, output, overwrite)
    print(output)


@app.command()
def edit(
    method: Annotated[str, typer.Argument(help="sdedit, inpaint, diffedit, masactrl or prompt-to-prompt.")],
    picture: Annotated[Path, typer.Argument(metavar="PICTURE")],
    prompt: Annotated[str, typer.Option(help="What the edited picture should show.")],
    output: Output,
    source_prompt: Annotated[str, typer.Option(help="What the picture shows; for methods that invert it.")] = "",
    mask: Annotated[Path | None, typer.Option(help="Picture of the same size, white where inpaint redraws.")] = None,
    strength: Annotated[float | None, typer.Option(help="Share of the noising, in (0, 1].")] = None,
    guidance: Guidance = None,
    steps: Annotated[int | None, typer.Option(help="Of the whole way. Default: the model's usual number.")] = None,
    model: Model = "mini",
    model_config: ModelConfig = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    low_memory: LowMemory = False,
    overwrite: Overwrite = False,
) -> None:
    """Edit a picture with a sentence, as an attacker would: compare a photo with its protected copy."""
    with usage():
        from antidiffusion.attacks import EDITS
        from antidiffusion.attacks.base import Prompts
        from antidiffusion.attacks.pictures import fitted, fitted_mask
        from antidiffusion.pictures.picture import Picture

        chosen = _choose(EDITS, method, {"--strength": strength, "--guidance": guidance, "--steps": steps})
        if (mask is not None) != (method == "inpaint"):
            raise ValueError("expected --mask with inpaint and with no other method; give it or leave it out")
        original = Picture.read(picture)
        surrogate = _prepare(output, overwrite, model, model_config, device, dtype, low_memory=low_memory)
        region = None if mask is None else fitted_mask(Picture.read(mask), original, surrogate)
        with _offloaded(surrogate, low_memory), _reporting(f"editing with {method}") as progress:
            request = Prompts(prompt, source_prompt, region)
            x = chosen(fitted(original, surrogate), request, surrogate, seed, progress=progress)
        _write(x, output, overwrite)
    print(output)


@app.command()
def attack(
    method: Annotated[str, typer.Argument(help="dreambooth, lora, textual-inversion or custom-diffusion.")],
    pictures: Annotated[list[Path], typer.Argument(metavar="PICTURE...", help="Pictures of one person, or folders.")],
    prompt: Annotated[str, typer.Option(help="The text that the person is tuned to.")],
    output: Output,
    draw: Annotated[
        list[str] | None,
        typer.Option("--sample", help="Draw this with the tuned model; repeatable. Default: --prompt."),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Folder for the tuned weights, in diffusers' format.")] = None,
    steps: Annotated[int | None, typer.Option(help="Tuning steps.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of LoRA's matrices.")] = None,
    text_encoder: Annotated[
        bool, typer.Option("--text-encoder", help="DreamBooth, LoRA: tune the text encoder too.")
    ] = False,
    class_prompt: Annotated[str | None, typer.Option(help="Prior preservation: what others are called.")] = None,
    class_pictures: Annotated[int | None, typer.Option(help="Drawn from --class-prompt before the tuning.")] = None,
    placeholder: Annotated[
        str | None, typer.Option(help="Custom Diffusion, Textual Inversion: word of the prompts learnt as a new token.")
    ] = None,
    guidance: Guidance = None,
    model: Model = "mini",
    model_config: ModelConfig = None,
    seed: Seed = 0,
    device: Device = "auto",
    dtype: Precision = DType.auto,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations instead of keeping them; slower.")
    ] = False,
    low_memory: Annotated[
        bool,
        typer.Option(
            "--low-memory",
            help="--gradient-checkpointing, and text encoders and autoencoder wait on the CPU; slower.",
        ),
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Fine-tune a model on a person's pictures and draw, as an attacker would."""
    with usage():
        import torch

        from antidiffusion.attacks import TUNINGS
        from antidiffusion.attacks.pictures import squared
        from antidiffusion.folders import pictures_in
        from antidiffusion.pictures.picture import Picture

        options: dict[str, Any] = {"--steps": steps, "--learning-rate": learning_rate, "--rank": rank}
        options |= {"--class-prompt": class_prompt, "--guidance": guidance, "--text-encoder": text_encoder or None}
        options |= {"--class-pictures": class_pictures, "--placeholder": placeholder}
        options |= {"--gradient-checkpointing": gradient_checkpointing or low_memory or None}
        chosen = _choose(TUNINGS, method, options)
        originals = []
        for path in pictures:
            files, left = pictures_in(path)
            originals += [Picture.read(file) for file in files]
            for other in left:
                shared.say(f"left out: {other.path}: {other.reason}; {other.remedy}", style="yellow")
        if save is not None and save.exists() and not overwrite:
            raise ValueError(f"{save}: expected a new folder, got an existing one; use --overwrite or another name")
        loading = {"full_tuning": chosen.full_tuning, "low_memory": low_memory}
        surrogate = _prepare(output, overwrite, model, model_config, device, dtype, **loading)
        x = torch.cat([squared(original, surrogate) for original in originals])
        with (
            _offloaded(surrogate, low_memory),
            _reporting(f"tuning with {method}") as progress,
            chosen.tuned(x, prompt, surrogate, seed, progress=progress) as tuned,
        ):
            drawn = tuned.sample(draw or [prompt], seed, progress=progress)
            expect_finite(drawn, "the picture that the tuned model drew")
            if save is not None:
                tuned.save(save)
        _write(drawn, output, overwrite)
    print(output)


def _offloaded(surrogate: Any, wanted: bool) -> AbstractContextManager[None]:
    from antidiffusion.models.memory import offload

    return offload(surrogate) if wanted else nullcontext()


def _choose(methods: dict[str, Any], name: str, options: dict[str, Any]) -> Any:
    if name not in methods:
        raise ValueError(f"expected a method of {', '.join(methods)}, got {name!r}; check the spelling")
    return with_options(methods[name], name, options)


@contextmanager
def _reporting(name: str) -> Iterator[Progress]:
    """Show a bar; gives the function that moves it."""
    with progress_bar() as bar:
        task = bar.add_task(name, total=None)
        yield lambda stage, done, total: bar.update(task, description=f"{name}: {stage}", completed=done, total=total)


def _prepare(
    output: Path,
    overwrite: bool,
    model: str,
    config: str | None,
    device: str,
    dtype: DType,
    **loading: bool,
) -> Any:
    """Check that the output can be written before the work begins, then load the model."""
    from antidiffusion.folders import expect_suffix, make_writable
    from antidiffusion.pictures.files import expect_new

    expect_new(expect_suffix(output), overwrite=overwrite)
    make_writable(output.parent)
    return shared.load_surrogate(model, config, device, dtype, **loading)


def _write(x: Any, output: Path, overwrite: bool) -> None:
    """Write pictures `(B, 3, H, W)` in [0, 1] side by side."""
    from antidiffusion.pictures.tensors import to_picture

    expect_finite(x, "the picture that the model drew")
    to_picture(x).write(output, overwrite=overwrite)
