from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench_plans import PLAN, write_person, write_plan
from PIL import Image

import antidiffusion.bench.instruments
from antidiffusion.attacks import LoRA
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.pictures import fitted, squared
from antidiffusion.attacks.purify import PURIFIERS
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.bench.plan import HALF, Plan, Trial
from antidiffusion.bench.rows import CLEAN, CONTROL, FAILED_ATTACK, Row
from antidiffusion.bench.trials import EXCEEDED, LOSSY, ZERO, Laboratory, Task, with_posterior
from antidiffusion.data.defense_edit import read, synthetic
from antidiffusion.data.people import Person
from antidiffusion.metrics.fidelity import psnr, ssim
from antidiffusion.models.base import Surrogate
from antidiffusion.pictures.picture import Picture

ELSEWHERE = """
recipes.theirs = {{ folder = "elsewhere" }}
[edits]
dataset = "pictures"
attacks.sdedit = {{ steps = 2 }}
"""
TUNING = """
surrogate = "{model}"
[tunings]
dataset = "people"
drawn = 2
settings = ["all protected", "half clean"]
attacks.lora = {{ steps = 1, sampling_steps = 2 }}
"""


class Bench:
    """A plan's trials by what they are, run as they are asked for."""

    def __init__(self, folder: Path, surrogate: Surrogate, text: str | None = None) -> None:
        folder.mkdir(exist_ok=True)
        path = write_plan(folder, "tiny") if text is None else write_plan(folder, "tiny", text)
        self.plan = Plan.read(path)
        self.folder = folder / "run"
        (self.folder / "pictures").mkdir(parents=True)
        self.run = Laboratory(self.plan, self.folder, lambda name: surrogate)

    def __call__(self, kind: str, recipe: str, purifier: str = "none", **others: str) -> Row:
        return self.run(Task(self.trial(kind, recipe, purifier, **others)))

    def trial(self, kind: str, recipe: str, purifier: str = "none", **others: str) -> Trial:
        wanted = {"kind": kind, "recipe": recipe, "purifier": purifier} | others
        return next(t for t in self.plan.trials() if all(getattr(t, key) == value for key, value in wanted.items()))

    def tensor(self, row: Row, number: int = 0) -> torch.Tensor:
        return Picture.read(self.folder / row.pictures[number]).tensor()


def test_a_protection_is_measured_on_the_written_file(tmp_path: Path, tiny: Surrogate) -> None:
    bench = Bench(tmp_path, tiny)
    row = bench("protection", CONTROL)
    original = Picture.read(tmp_path / "pictures" / "item 0" / "example.png").tensor()
    written = bench.tensor(row)
    assert row.metrics["linf"] == round(255 * (written - original).abs().max().item()) == 8
    assert row.metrics["psnr"] == pytest.approx(psnr(written, original).item())
    assert row.metrics["ssim"] == pytest.approx(ssim(written, original).item())
    assert row.metrics["loss_ratio"] > 0
    assert row.flags == []


def test_an_edit_is_the_attack_on_what_was_written(tmp_path: Path, tiny: Surrogate) -> None:
    bench = Bench(tmp_path, tiny)
    protected = Picture.read(bench.folder / bench("protection", CONTROL).pictures[0])
    for purifier in ("none", "bit-depth"):
        clean, row = bench("edit", CLEAN, purifier), bench("edit", CONTROL, purifier)
        x = fitted(protected, tiny)
        washed = x if purifier == "none" else PURIFIERS[purifier](x, tiny, 0)
        edited = SDEdit(steps=2)(washed, Prompts("a person with hat 0"), tiny, 0)
        assert torch.equal(bench.tensor(row), (edited * 255).round() / 255)
        assert row.metrics["ssim_to_clean"] == pytest.approx(ssim(bench.tensor(row), bench.tensor(clean)).item())
        assert row.metrics["psnr_to_clean"] == pytest.approx(psnr(bench.tensor(row), bench.tensor(clean)).item())
        assert row.metrics["success"] is None  # no category: nobody can tell
        assert "ssim_to_clean" not in clean.metrics


def test_the_users_own_metrics(tmp_path: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch) -> None:
    """The models are tested on their own; here, what they are given and where their figures go."""
    asked: list[object] = []

    def lpips(weights: Path) -> Any:
        asked.append(weights)
        return lambda x, y: (x - y).abs().mean((1, 2, 3))

    def clip(model: str) -> Any:
        asked.append(model)
        return lambda x, texts: torch.tensor([float(len(texts[0]))])

    monkeypatch.setattr(antidiffusion.bench.instruments, "LPIPS", lpips)
    monkeypatch.setattr(antidiffusion.bench.instruments, "ClipScore", clip)
    (tmp_path / "alex.safetensors").touch()
    text = PLAN + '[metrics]\nlpips = "alex.safetensors"\nclip = "someone/clip"\n'
    bench = Bench(tmp_path, tiny, text)
    protected, clean, edited = bench("protection", CONTROL), bench("edit", CLEAN), bench("edit", CONTROL)
    original = Picture.read(tmp_path / "pictures" / "item 0" / "example.png").tensor()
    apart = [
        (a - b).abs().mean().item()
        for a, b in ((bench.tensor(protected), original), (bench.tensor(edited), bench.tensor(clean)))
    ]
    assert [protected.metrics["lpips"], edited.metrics["lpips_to_clean"]] == pytest.approx(apart)
    assert edited.metrics["clip_score"] == clean.metrics["clip_score"] == len("a person with hat 0")
    assert asked == [tmp_path / "alex.safetensors", "someone/clip"]
    assert edited.backends == {
        "faces": "dlib",
        "attributes": "mini's classifier",
        "lpips": "alex.safetensors",
        "clip": "clip",
    }


def test_pictures_made_elsewhere_are_flagged(tmp_path: Path, tiny: Surrogate) -> None:
    bench = Bench(tmp_path, tiny, ELSEWHERE)
    with pytest.raises(ValueError, match=r"expected one picture item 0\.\* in .*elsewhere, got 0"):
        bench("protection", "theirs")
    original = np.asarray(Image.open(tmp_path / "pictures" / "item 0" / "example.png"))
    (tmp_path / "elsewhere").mkdir()
    moved = np.clip(original.astype(int) + 9, 0, 255).astype(np.uint8)
    for pixels, name, flags in (
        (original, "item 0.png", [ZERO]),
        (moved, "item 0.png", [EXCEEDED]),
        (original, "item 0.jpg", [EXCEEDED, LOSSY]),
    ):
        Image.fromarray(pixels).save(tmp_path / "elsewhere" / name)
        assert bench("protection", "theirs").flags == flags
        (tmp_path / "elsewhere" / name).unlink()
    Image.fromarray(original[:, :-1]).save(tmp_path / "elsewhere" / "item 0.png")
    with pytest.raises(ValueError, match="of the original's size"):
        bench("protection", "theirs")


def test_success_is_what_the_classifier_sees_and_did_not_see_before(tmp_path: Path, tiny: Surrogate) -> None:
    bench = Bench(tmp_path, tiny).run.instruments
    items = [item for item in read(synthetic()) if item.category in ("background", "clothing")][:8]
    for item in items:
        source, truth = (Picture.read(file).tensor() for file in (item.picture, item.edited) if file)
        assert bench.success(item, source, source) == 0
        assert bench.success(item, truth, truth) is None
    seen = [bench.success(i, *(Picture.read(f).tensor() for f in (i.edited, i.picture) if f)) for i in items]
    assert sum(value or 0 for value in seen) >= 7
    assert bench.success(replace(items[0], category="", value=""), source, source) is None


def test_tuning_compares_with_the_reference_and_the_untuned_model(
    tmp_path: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_person(tmp_path)
    bench = Bench(tmp_path, tiny, TUNING)
    tuned_to: list[torch.Tensor] = []
    real = LoRA.tuned

    def spy(self: LoRA, x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        tuned_to.append(x)
        return real(self, x, *arguments, **options)

    monkeypatch.setattr(LoRA, "tuned", spy)
    protected = bench("protection", CONTROL)
    assert len(protected.pictures) == 4
    row, half = bench("tuning", CONTROL), bench("tuning", CONTROL, setting=HALF)
    floor, clean = bench("floor", CLEAN), bench("tuning", CLEAN)
    person = bench.plan.item(bench.trial("tuning", CLEAN))
    assert isinstance(person, Person)
    files = [bench.folder / name for name in protected.pictures]
    for x, expected in zip(tuned_to, (files, [*files[:2], *person.others[:2]], list(person.published)), strict=True):
        assert torch.equal(x, torch.cat([squared(Picture.read(file), tiny) for file in expected]))
    for measured in (row, half, clean, floor):  # an untrained model draws no face
        assert (measured.metrics["fdfr"], measured.metrics["distance"]) == (1, None)
        assert len(measured.pictures) == 4
    assert clean.flags == [FAILED_ATTACK]
    assert row.flags == []
    inherited = bench.run(Task(bench.trial("tuning", CONTROL), (FAILED_ATTACK,)))
    assert inherited.flags == [FAILED_ATTACK]


def test_unprotected_tuning_counts_only_clear_of_the_untuned_model_and_of_strangers(
    tmp_path: Path, tiny: Surrogate, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_person(tmp_path)
    bench = Bench(tmp_path, tiny, TUNING)
    assert bench.plan.floor(bench.trial("tuning", CLEAN)) == bench.trial("floor", CLEAN)
    bench("floor", CLEAN)
    for likeness, margin, flags in ((0.5, 0.2, []), (0.3, 0.2, [FAILED_ATTACK]), (0.5, 0.1, [FAILED_ATTACK])):
        said = iter([(likeness, margin), (0.3, 0.1)])  # tuned, then the floor's

        def judged(*arguments: object, said: Any = said) -> dict[str, float]:
            return dict(zip(("likeness", "margin"), next(said), strict=True))

        monkeypatch.setattr(bench.run, "_drawn", judged)
        assert bench("tuning", CLEAN).flags == flags


def test_the_autoencoders_share_of_a_difference(tmp_path: Path, tiny: Surrogate) -> None:
    bench = Bench(tmp_path, tiny)
    protected, _, row = bench("protection", CONTROL), bench("edit", CLEAN), bench("edit", CONTROL)
    pictures = bench.tensor(protected), Picture.read(tmp_path / "pictures" / "item 0" / "example.png").tensor()
    found = [fitted(Picture((x[0].permute(1, 2, 0) * 255).byte().numpy()), tiny) for x in pictures]
    decoded = [tiny.decode(tiny.posterior(x).mean) for x in found]
    assert row.metrics["ssim_autoencoder"] == pytest.approx(ssim(*decoded).item(), abs=1e-5)
    bench("edit", CLEAN, "bit-depth")
    assert "ssim_autoencoder" not in bench("edit", CONTROL, "bit-depth").metrics


def test_attackers_may_take_the_posteriors_mean(tmp_path: Path, tiny: Surrogate) -> None:
    sampled, mean = Bench(tmp_path, tiny), Bench(tmp_path / "mean", tiny, 'posterior = "mean"\n' + PLAN)
    rows = [bench("edit", CLEAN) for bench in (sampled, mean)]
    assert rows[0].key != rows[1].key and rows[1].settings["posterior"] == "mean"
    assert "posterior" not in rows[0].settings
    x = fitted(Picture.read(tmp_path / "pictures" / "item 0" / "example.png"), tiny)
    changed = with_posterior(tiny, "mean")
    for seed in (0, 1):
        assert torch.equal(changed.encode(x, torch.Generator().manual_seed(seed)), tiny.posterior(x).mean)
    edited = SDEdit(steps=2)(x, Prompts("a person with hat 0"), changed, 0)
    assert torch.equal(mean.tensor(rows[1]), (edited * 255).round() / 255)
    assert not torch.equal(sampled.tensor(rows[0]), mean.tensor(rows[1]))
    assert with_posterior(tiny, "sample") is tiny
