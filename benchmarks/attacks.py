"""Do the attacks succeed on clean pictures? A protection only means something against those that do.

    python benchmarks/attacks.py tuning [--people 10]     # the package's synthetic people
    python benchmarks/attacks.py editing [--items 50]     # Defense-Edit-Synth
    python benchmarks/attacks.py speed                    # four pictures, on an idle machine

Tuning: how much nearer samples of "a photo of sks person" come to the person (dlib) than the untuned model's with the
same noise, and whether "a portrait of another person" still draws others: whether its samples are nearer to the person
than to the other people (the margin), since clearer faces come nearer to everybody. Editing: whether the package's
classifier sees the asked value, and what happens to the rest. Results go to results/attacks_*.json, contact sheets
to docs/attacks_*.png. `--only NAME...` runs some and keeps the other results.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from antidiffusion import Picture, Surrogate
from antidiffusion.attacks import EDITS, TUNINGS
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.pictures import fitted, fitted_mask, squared
from antidiffusion.card import versions
from antidiffusion.data import people
from antidiffusion.data.defense_edit import asked, read, synthetic
from antidiffusion.metrics.attributes import Attributes
from antidiffusion.metrics.fidelity import ssim
from antidiffusion.metrics.identity import DlibFaces, distance, fdfr, ism
from antidiffusion.metrics.statistics import bootstrap
from antidiffusion.models.sampling import sample
from antidiffusion.pictures.tensors import to_picture

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
PERSON, OTHER = "a photo of sks person", "a portrait of another person"
DRAWN = [PERSON] * 6 + [OTHER] * 4
DRAWING: dict[str, Any] = {"steps": 25, "guidance": 3.0}
# On so small a model: larger steps than Stable Diffusion's, and fewer. To `mini` "sks" means as little as "another"
# until its text encoder or the word's embedding is tuned, so all attacks tune one of them, and need the prior.
PRIOR: dict[str, Any] = {"class_prompt": OTHER, "class_pictures": 24, "sampling_steps": 20, "guidance": 3.0}
SETTINGS: dict[str, dict[str, Any]] = {
    "dreambooth": {"steps": 200, "batch_size": 2, "learning_rate": 2e-4, "text_encoder": True} | PRIOR,
    "lora": {"steps": 200, "batch_size": 4, "rank": 16, "learning_rate": 4e-3, "text_encoder": True} | PRIOR,
    "textual-inversion": {"steps": 200, "batch_size": 4, "learning_rate": 2e-2},
    "custom-diffusion": {"steps": 200, "batch_size": 4, "learning_rate": 4e-3, "placeholder": "sks"} | PRIOR,
}
CATEGORIES = ("hair", "glasses", "clothing", "background", "age")  # few expressions can be judged
EDITING: dict[str, dict[str, Any]] = {"sdedit": {"strength": 0.7}}  # at 0.5 too many edits are not made
GUIDANCE = 5.0
SHOWN = 4  # people on a contact sheet


def interval(values: list[float]) -> dict[str, float]:
    """Return the mean over independent units and its bootstrap interval."""
    low, high = bootstrap(values, seed=0) if values else (float("nan"),) * 2
    return {"mean": statistics.fmean(values) if values else float("nan"), "low": low, "high": high, "n": len(values)}


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def show(rows: list[Tensor], path: Path) -> None:
    """Write rows of pictures `(N, 3, H, W)` as one sheet."""
    sheet = torch.cat([torch.cat(list(row), 2) for row in rows], 1)
    to_picture(sheet[None]).write(path, overwrite=True)


def tuning(surrogate: Surrogate, count: int, only: list[str] | None) -> None:
    faces, path = DlibFaces(), RESULTS / "attacks_tuning.json"
    results = load(path)
    untuned = sample(DRAWN, surrogate, Generator().manual_seed(0), **DRAWING)

    def stacked(files: Iterable[Path]) -> Tensor:
        return torch.cat([squared(Picture.read(file), surrogate) for file in files])

    chosen = people.read(people.synthetic())[:count]
    everybody = [(stacked(p.published), faces.embed(stacked(p.reference + p.others))) for p in chosen]

    def judged(x: Tensor, own: int) -> dict[str, float | None]:
        found, reference = faces.embed(x), everybody[own][1]
        person, other = found[: DRAWN.count(PERSON)], found[DRAWN.count(PERSON) :]
        row: dict[str, float | None] = {"fdfr": fdfr(person), "ism": ism(person, reference)}
        for suffix, drawn in (("", person), ("_of_others", other)):
            near = distance(drawn, reference)
            far = [distance(drawn, theirs) for k, (_, theirs) in enumerate(everybody) if k != own]
            row[f"distance{suffix}"] = near
            row[f"margin{suffix}"] = None if near is None else statistics.fmean(d for d in far if d is not None) - near
        return row

    before = [judged(untuned, own) for own in range(len(everybody))]
    for name in only or TUNINGS:
        attack, rows, seconds, sheet = replace(TUNINGS[name], **SETTINGS[name]), [], [], []
        for seed, (x, _) in enumerate(everybody):
            begun = time.perf_counter()
            with attack.tuned(x, PERSON, surrogate, seed) as tuned:
                seconds.append(time.perf_counter() - begun)
                y = tuned.sample(DRAWN, 0, **DRAWING)
            rows.append(judged(y, seed))
            sheet.append(torch.cat([x, y[:5], y[-3:]]))
            print(name, seed, rows[-1], before[seed], flush=True)
        pairs = list(zip(before, rows, strict=True))
        summary: dict[str, Any] = {"settings": SETTINGS[name], "tuning_seconds": statistics.median(seconds)}
        for key in ("ism", "distance", "distance_of_others", "margin", "margin_of_others"):
            both = [(b[key], a[key]) for b, a in pairs if b[key] is not None and a[key] is not None]
            summary[f"{key}_before"] = statistics.fmean(b for b, _ in both)
            summary[f"{key}_after"] = statistics.fmean(a for _, a in both)
            summary[f"{key}_change"] = interval([a - b for b, a in both])
        summary["fdfr_before"], summary["fdfr_after"] = (
            statistics.fmean(r["fdfr"] for r in rs) for rs in (before, rows)
        )
        results |= {name: summary, "model_sha256": surrogate.sha256, "versions": versions(), "drawing": DRAWING}
        path.write_text(json.dumps(results, indent=1) + "\n")
        show(sheet[:SHOWN], DOCS / f"attacks_{name}.png")
    print(json.dumps(results, indent=1))


def editing(surrogate: Surrogate, count: int, only: list[str] | None) -> None:
    network, faces, path = Attributes.load(), DlibFaces(), RESULTS / "attacks_editing.json"
    items = [item for item in read(synthetic()) if item.category in CATEGORIES][:count]
    pictures = [Picture.read(item.picture) for item in items]
    x = torch.cat([fitted(picture, surrogate) for picture in pictures])
    masks = torch.cat([fitted_mask(Picture.read(i.mask), p, surrogate) for i, p in zip(items, pictures, strict=True)])
    sources, results = faces.embed(x), load(path)
    with torch.no_grad():
        decoded = torch.cat([surrogate.decode(surrogate.posterior(batch).mean) for batch in x.split(10)])

    def judged(y: Tensor) -> dict[str, Any]:
        seen = network.classify(y)
        wanted = [asked(item) for item in items]
        hits = [want is not None and seen[k][want[0]] == want[1] for k, want in enumerate(wanted)]
        share = masks.mean((1, 2, 3))
        kept = (ssim(masks * x + (1 - masks) * y, x) - share) / (1 - share)  # windows inside count as kept: 1
        found = zip(sources, faces.embed(y), strict=True)
        near = [float((a - b).norm()) for a, b in found if a is not None and b is not None]
        by = {c: statistics.fmean(h for h, i in zip(hits, items, strict=True) if i.category == c) for c in CATEGORIES}
        outside = {"ssim_outside": interval(kept.tolist()), "face_distance": interval(near)}
        return {"success": interval([float(hit) for hit in hits]), "success_by_category": by, **outside}

    results["no edit, autoencoder only"] = judged(decoded)
    results["true result"] = judged(torch.cat([fitted(Picture.read(i.edited), surrogate) for i in items if i.edited]))
    for name in only or EDITS:
        attack, edits = replace(EDITS[name], guidance=GUIDANCE, **EDITING.get(name, {})), []
        begun = time.perf_counter()
        for part in range(0, len(items), 10):
            some = slice(part, part + 10)
            texts = [[item.target_prompt for item in items[some]], [item.source_prompt for item in items[some]]]
            edits.append(attack(x[some], Prompts(*texts, masks[some]), surrogate, seed=part))
        y = torch.cat(edits)
        seconds = (time.perf_counter() - begun) / len(items)
        results[name] = judged(y) | {"settings": repr(attack), "seconds_per_picture": round(seconds, 2)}
        results |= {"model_sha256": surrogate.sha256, "versions": versions()}
        path.write_text(json.dumps(results, indent=1) + "\n")
        show([x[:12], y[:12], x[12:24], y[12:24]], DOCS / f"attacks_{name}.png")
        print(name, json.dumps(results[name]), flush=True)


def speed(surrogate: Surrogate) -> None:
    """Time every edit and LoRA on four pictures."""
    items = read(synthetic())[:4]
    pictures = [Picture.read(item.picture) for item in items]
    x = torch.cat([fitted(picture, surrogate) for picture in pictures])
    masks = torch.cat([fitted_mask(Picture.read(i.mask), p, surrogate) for i, p in zip(items, pictures, strict=True)])
    prompts = Prompts([item.target_prompt for item in items], [item.source_prompt for item in items], masks)
    seconds: dict[str, float] = {}
    for name, attack in EDITS.items():
        begun = time.perf_counter()
        attack(x, prompts, surrogate, seed=0)
        seconds[name] = round(time.perf_counter() - begun, 1)
    plain = {key: SETTINGS["lora"][key] for key in ("steps", "batch_size", "rank", "learning_rate")}
    for name, settings in {"lora": plain, "lora with text encoder and prior": SETTINGS["lora"]}.items():
        begun = time.perf_counter()
        with replace(TUNINGS["lora"], **settings).tuned(x, PERSON, surrogate, seed=0):
            seconds[f"{name}, {settings['steps']} steps"] = round(time.perf_counter() - begun, 1)
    result = {"seconds": seconds, "pictures": len(x), "threads": torch.get_num_threads(), "versions": versions()}
    (RESULTS / "attacks_speed.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    tune, edit = commands.add_parser("tuning"), commands.add_parser("editing")
    tune.add_argument("--people", type=int, default=10)
    edit.add_argument("--items", type=int, default=50)
    timed = commands.add_parser("speed")
    timed.add_argument("--model", default="mini")
    for command in (tune, edit):
        command.add_argument("--model", default="mini")
        command.add_argument("--only", nargs="+")
    args = parser.parse_args()
    surrogate = Surrogate.from_pretrained(args.model)
    if args.command == "tuning":
        tuning(surrogate, args.people, args.only)
    elif args.command == "speed":
        speed(surrogate)
    else:
        editing(surrogate, args.items, args.only)


if __name__ == "__main__":
    main()
