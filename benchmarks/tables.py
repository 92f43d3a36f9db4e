"""Print the committed results as the Markdown tables of benchmarks/README.md, and the comparison's of README.md.

python benchmarks/tables.py
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from antidiffusion.bench.estimates import per_item, sound, unpurified
from antidiffusion.bench.rows import CLEAN, CONTROL, Row, read_rows
from antidiffusion.bench.tables import ranking
from antidiffusion.metrics.table import PRIMARY

RESULTS = Path(__file__).parent / "results"
LEADING = ("anti-diffusion", "anti-diffusion, quick", "aspl", "simac", "fsmg", "advdm", "official", CONTROL, CLEAN)
EDITS = ("diffedit", "inpaint", "masactrl", "sdedit")
ENCODERS = {"mini": "as shipped, 128 px", "mini_160": "160 px", "mini_192": "192 px", "mini_longer": "trained longer"}
RANK = "mean rank, and its 95 % interval from eight items on"
TIMED = "p01"  # the person for whose photos the comparison states the seconds


def read(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mean(rows: Iterable[Row], metric: str, digits: int = 3) -> str:
    values = per_item(rows, metric)
    return f"{fmean(values.values()):.{digits}f}" if values else "1"  # the clean picture's edit agrees with itself


def ranked(rows: list[Row], attacks: Iterable[str]) -> list[tuple[list[Row], list[str]]]:
    """Return, of every recipe by rank, its rows, and its name, mean rank and figures without failing attacks."""
    found = []
    for name, rank in ((line[0].text, line[1].text) for line in ranking(rows)[0].lines):
        own = [row for row in rows if row.recipe == name]
        groups = [[row for row in sound(unpurified(own)) if row.attack == attack] for attack in attacks]
        found.append((own, [name, rank, *(mean(group, PRIMARY[group[0].kind]) for group in groups)]))
    return found


def counted(rows: Iterable[Row], attacks: Iterable[str]) -> list[str]:
    """Return attacks with the number of items whose attack does what is asked unprotected, as headings."""
    kept = sound(unpurified(rows))
    return [f"{attack}, n = {len({row.unit for row in kept if row.attack == attack})}" for attack in attacks]


def comparison() -> str:
    """README.md's."""
    attacks = (*EDITS, "dreambooth", "lora")
    lines = []
    rows = read_rows(RESULTS / "default" / "rows.jsonl")
    for own, line in ranked(rows, attacks):
        published = [row for row in own if row.kind == "protection"]
        portraits = [row for row in published if row.dataset == "defense-edit-synth"]
        timed = [row for row in published if row.item == TIMED]
        lines.append([*line, mean(portraits, "psnr", 1), mean(timed, "seconds", 0)])
    return table(["recipe", RANK, *counted(rows, attacks), "PSNR", "s"], lines)


def replication() -> str:
    """Other pictures, people and seed; last, DreamBooth over the people of both runs."""
    rows, attacks = read_rows(RESULTS / "replication" / "rows.jsonl"), (*EDITS, "dreambooth")
    first = [row for row in read_rows(RESULTS / "default" / "rows.jsonl") if row.attack == "dreambooth"]
    lines = []
    for own, line in ranked(rows, attacks):
        both = [row for row in (*first, *own) if row.attack == "dreambooth" and row.recipe == line[0]]
        lines.append([*line, mean(both, "likeness")])
    people = len({row.item for row in (*first, *rows) if row.attack == "dreambooth"})
    return table(["recipe", RANK, *counted(rows, attacks), f"dreambooth, both runs, n = {people}"], lines)


def transfer() -> str:
    """Means over all items, also those whose attack fails on the clean picture."""
    rows = unpurified(read_rows(RESULTS / "transfer" / "rows.jsonl"))
    pairs = [
        (attack, who) for attack in ("diffedit", "inpaint", "masactrl", "dreambooth") for who in ("mini", "second")
    ]
    lines = []
    for name in LEADING:
        own = [[row for row in rows if (row.recipe, row.attack, row.attacker) == (name, *pair)] for pair in pairs]
        lines.append([name, *(mean(group, PRIMARY[group[0].kind]) for group in own)])
    items = {attack: len({row.unit for row in rows if row.attack == attack}) for attack, _ in pairs}
    return table(["recipe", *(f"{attack} by {who}, n = {items[attack]}" for attack, who in pairs)], lines)


def half_clean() -> str:
    rows = read_rows(RESULTS / "half_clean" / "rows.jsonl")
    settings = ("all protected", "half clean")
    lines = [
        [name, *(mean([r for r in rows if (r.recipe, r.setting) == (name, one)], "likeness") for one in settings)]
        for name in LEADING
    ]
    people = len({row.unit for row in rows if row.attack})
    return table(["recipe", *(f"{setting}, n = {people}" for setting in settings)], lines)


def precision() -> str:
    """Float32 is the file of the shipped model's name. Half-precision protections were attacked in float32 only."""
    files = {"float32": "mini", "bfloat16": "bfloat16", "mixed": "mixed"}
    rows = {kind: read_rows(RESULTS / "precision" / f"{file}.jsonl") for kind, file in files.items()}
    attacks = [(kind, attacker) for kind in ("edit", "tuning") for attacker in ("mini", "mixed")]
    lines = []
    for name in dict.fromkeys(row.recipe for row in rows["float32"]):
        for kind, every in rows.items():
            own = [row for row in every if row.recipe == name and row.attack]
            groups = [[row for row in own if (row.kind, row.attacker) == attack] for attack in attacks]
            if own and (kind == "float32" or name not in (CLEAN, CONTROL)):
                lines.append(
                    [name, kind, *(mean(sound(group), PRIMARY[group[0].kind]) if group else "" for group in groups)]
                )
    return table(["recipe", "protected in", *(f"{kind} by {attacker}" for kind, attacker in attacks)], lines)


def detectability() -> str:
    """A lower limit: better detectors exist."""
    found = read("detectability")
    judged = found["pictures"] - found["pictures"] // 2
    lines = []
    for name, row in found["auroc"].items():
        decibel = "" if row["psnr"] is None else f"{row['psnr']:.1f}"
        lines.append([name, ", ".join(f"{value:.3f}" for value in row["by detector"]), decibel])
    return table(["recipe", f"AUROC of three detectors, n = {judged}", "PSNR"], lines)


def flops() -> str:
    counted = read("flops")
    rows = [[name, f"{row['tflop']:.1f}", f"{row['released_over_this']:.2f}"] for name, row in counted["rows"].items()]
    others = counted["other models, 512 x 512 and 1024 x 1024"]
    rows += [[name, f"{row['tflop']:.1f}", ""] for name, row in others.items()]
    return table(["recipe, SD 2.1-base at 512 px", "TFLOP", "released code / this"], rows)


def forecast() -> str:
    rows = [
        [name, *map(str, row["seconds"]), *(f"{row[f'{key} off by']:+.1%}" for key in ("seconds", "peak_memory_mb"))]
        for name, row in read("forecast")["said, then measured"].items()
    ]
    return table(["run", "s, said", "s, taken", "off by", "peak memory off by"], rows)


def memory() -> str:
    rows = []
    for row in read("memory"):
        lean = "yes" if row["low_memory"] else "no"
        weights, peak = (f"{row[key] * 2**30 / 1e9:.1f} GB" for key in ("weights_gib", "peak_gib"))
        rows.append([row["model"], row["dtype"], row["tuning"], lean, weights, peak])
    return table(["Stable Diffusion", "dtype", "tuning", "--low-memory", "weights", "peak"], rows)


def mini() -> str:
    rows = [
        [
            f"{radius}/255",
            *(f"{row[f'{kind}_shift']:.1%}" for kind in ("attack", "random")),
            *(f"{row[f'{kind}_edit_ssim']:.3f}" for kind in ("attack", "random")),
        ]
        for radius, row in read("mini")["sensitivity"].items()
    ]
    return table(
        ["budget", "latent shift, attack", "random", "edit SSIM (strength 0.4), attack", "random"],
        rows,
    )


def encoder() -> str:
    """At other sizes, and of an autoencoder that was trained longer: fidelity beside sensitivity to the attack."""
    rows = []
    for name, label in ENCODERS.items():
        found = read(name)
        figures = [found["sensitivity"][radius] for radius in ("8", "16")]
        cells = [f"{row['attack_shift']:.1%}, {row['attack_edit_ssim']:.3f}" for row in figures]
        rows.append([label, f"{found['vae_psnr']:.1f}", *cells])
    return table(["autoencoder", "PSNR, dB", "8/255: latent shift, edit SSIM", "16/255"], rows)


def engine() -> str:
    rows = []
    for model, runs in read("engine")["compare"].items():
        for name, row in runs.items() if isinstance(runs, dict) and "seconds" in next(iter(runs.values())) else ():
            ratios = [f"{row[f'{key} / reference']:.2f}" for key in ("seconds", "working_mb")]
            cells = [f"{row['seconds']:.1f}", ratios[0], f"{row['working_mb']} MB", ratios[1]]
            rows.append([model, *name.rsplit(", ", 1), *cells])
    return table(["model", "recipe", "precision", "s", "of the reference", "working memory", "of the reference"], rows)


if __name__ == "__main__":
    protection, cost = (comparison, replication, transfer, half_clean, precision), (engine, flops, memory, forecast)
    betrayed = (detectability,) if (RESULTS / "detectability.json").exists() else ()
    for make in (*protection, *betrayed, *cost, mini, encoder):
        print(f"### {make.__name__}\n\n{make()}")
