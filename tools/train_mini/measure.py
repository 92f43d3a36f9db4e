"""What a run reached, on pictures and people that were never in training, from the packaged models."""

import json
import statistics
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from antidiffusion import Surrogate
from antidiffusion.metrics.attributes import Attributes
from antidiffusion.models.sampling import sample
from train_mini.data import Store
from train_mini.degrade import attack
from train_mini.encoder import load_teacher
from train_mini.faces import faces_found
from train_mini.loop import Machine
from train_mini.pictures import dead_leaves, letters
from train_mini.settings import MeasureSettings
from train_mini.train_attributes import PROMPTED, stated

UNSEEN = 10_000_000  # index of the first texture that no run trains on


def held_out(data: Path, count: int) -> dict[str, Tensor]:
    """Return `count` pictures of each kind, `(N, 3, H, W)` in [-1, 1]."""
    store = Store(data, "held")
    arrays = {"portraits": store.pictures[store.rows()[:count]]}
    for kind, draw in (("textures", dead_leaves), ("text", letters)):
        arrays[kind] = np.stack([draw(UNSEEN + index) for index in range(count // 4)])
    return {kind: torch.from_numpy(array).permute(0, 3, 1, 2) / 127.5 - 1 for kind, array in arrays.items()}


def psnr(x: Tensor, y: Tensor) -> float:
    """Return the mean peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return (10 * torch.log10(4 / (x - y).square().mean((1, 2, 3)))).mean().item()


class Spaces:
    """The trained autoencoder and its teacher, as functions of pictures in [-1, 1]."""

    def __init__(self, surrogate: Surrogate, teacher_folder: Path) -> None:
        self.surrogate, self.teacher = surrogate, load_teacher(teacher_folder, surrogate.device)

    def student(self, x: Tensor) -> Tensor:
        return self.surrogate.posterior(x / 2 + 0.5).mean

    def answer(self, x: Tensor) -> Tensor:
        return self.teacher.encode(x).latents.float()


def fidelity(spaces: Spaces, x: Tensor) -> dict[str, float]:
    """Return R2 of the student's clean latents and the decibels of both autoencoders' reconstructions."""
    rows = []
    for part in x.split(16):
        with torch.no_grad():
            mine, its = spaces.student(part), spaces.answer(part)
            theirs = spaces.teacher.decode(its).sample.clamp(-1, 1)
        rows.append((mine, its, psnr(spaces.surrogate.decode(mine) * 2 - 1, part), psnr(theirs, part), len(part)))
    mine, its = (torch.cat([row[i] for row in rows]) for i in (0, 1))
    ours, theirs = (sum(row[i] * row[4] for row in rows) / len(x) for i in (2, 3))
    r2 = 1 - (mine - its).square().mean() / (its - its.mean((0, 2, 3), keepdim=True)).square().mean()
    return {"r2": r2.item(), "psnr": ours, "psnr_teacher": theirs, "pictures": len(x)}


def sensitivity(spaces: Spaces, x: Tensor, settings: MeasureSettings, generator: Generator) -> dict[str, dict]:
    """Return, by radius, how far signs and attacks move both latents, as share of each one's variance.

    "on_student" and "on_teacher" of an attack made on the other are what carries over; ratios compare like with like:
    random signs and white-box attacks with the teacher's own, carried ones with the victim's white-box shift.
    """
    with torch.no_grad():
        clean = {"student": spaces.student(x), "teacher": spaces.answer(x)}
    encode = {"student": spaces.student, "teacher": spaces.answer}

    @torch.no_grad()
    def shift(y: Tensor, name: str) -> float:
        return ((encode[name](y) - clean[name]).square().mean() / clean[name].var()).item()

    result = {}
    for radius in settings.radii:
        size, row = 2 * radius / 255, {}
        made = {"random": attack(lambda y: y.sum(), x, size, 0, generator)}
        for name in encode:
            gain = lambda y, name=name: (encode[name](y) - clean[name]).square().sum()  # noqa: E731
            made[name] = attack(gain, x, size, settings.attack_steps, generator)
        for source, y in made.items():
            row[source] = {f"on_{name}": shift(y, name) for name in encode}
        row["random_ratio"] = row["random"]["on_student"] / row["random"]["on_teacher"]
        row["attack_ratio"] = row["student"]["on_student"] / row["teacher"]["on_teacher"]
        row["carried_to_teacher"] = row["student"]["on_teacher"] / row["teacher"]["on_teacher"]
        row["carried_to_student"] = row["teacher"]["on_student"] / row["student"]["on_student"]
        result[str(radius)] = row
    return result


def drawing(surrogate: Surrogate, data: Path, settings: MeasureSettings, sheet: Path) -> dict[str, object]:
    """Draw the captions of held-out people; return how many samples show a face and the attributes asked for."""
    store = Store(data, "held")
    rows = store.rows()
    prompts = (store.texts(rows) * (1 + settings.samples // len(rows)))[: settings.samples]
    parts = []
    for first in range(0, len(prompts), settings.batch):
        some, generator = prompts[first : first + settings.batch], Generator().manual_seed(first)
        x = sample(some, surrogate, generator, steps=settings.sampling_steps, guidance=settings.guidance)
        parts.append(x.cpu())
    x = torch.cat(parts)
    said = Attributes.load().classify(x)
    hits: dict[str, list[bool]] = {name: [] for name in PROMPTED}
    for prompt, seen in zip(prompts, said, strict=True):
        for name, value in stated(prompt).items():
            hits[name].append(seen[name] == value)
    shown = x[:32].split(8)
    side = torch.cat([torch.cat(list(row), 2) for row in shown if len(row) == len(shown[0])], 1)
    Image.fromarray((side.permute(1, 2, 0) * 255).round().byte().numpy()).save(sheet)
    return {
        "samples": len(x),
        "faces": faces_found(x.mul(255).round().byte().permute(0, 2, 3, 1).numpy()),
        "attributes": {name: statistics.mean(values) for name, values in hits.items() if values},
        "attributes_all": statistics.mean(hit for values in hits.values() for hit in values),
    }


def measure(
    settings: MeasureSettings, models: Path, names: list[str], data: Path, teacher: Path, machine: Machine, out: Path
) -> None:
    """Measure packaged models and write `out`, anew after each part, with a sheet NAME.png of samples beside it.

    Arguments:
        settings: How much of everything.
        models: Folder of their folders.
        names: Of the models; those that are not there are left out, and the autoencoder is the first one's.
        data: Memory maps; only the held-out people are looked at.
        teacher: Folder of the teacher.
        machine: Where to compute, in float32.
        out: The JSON file.

    Raises:
        FileNotFoundError: If no model is there.
    """
    packages = {name: models / name for name in names if (models / name / "model_index.json").exists()}
    if not packages:
        raise FileNotFoundError(f"expected one of {', '.join(names)} in {models}, found none; run stage package first")
    result: dict[str, object] = {"settings": vars(settings), "device": machine.device.type, "models": list(packages)}

    def write() -> None:
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps({"stage": "measure", "done": list(result)}), flush=True)

    surrogate = Surrogate.from_pretrained(str(next(iter(packages.values())))).to(machine.device)
    spaces, generator = Spaces(surrogate, teacher), Generator(machine.device).manual_seed(0)
    pictures = {kind: x.to(machine.device) for kind, x in held_out(data, settings.pictures).items()}
    result["fidelity"] = {kind: fidelity(spaces, x) for kind, x in pictures.items()}
    write()
    result["sensitivity"] = {
        kind: sensitivity(spaces, x[: settings.attacked], settings, generator) for kind, x in pictures.items()
    }
    write()
    store = Store(data, "held")
    result["faces_of_renders"] = faces_found(store.pictures[store.rows()])
    for name, folder in packages.items():
        surrogate = Surrogate.from_pretrained(str(folder)).to(machine.device)
        result[name] = drawing(surrogate, data, settings, out.with_name(f"{name}.png"))
        write()
