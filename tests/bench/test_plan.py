from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from bench_plans import write_plan
from command_line import draw

import antidiffusion.bench
from antidiffusion.bench.estimates import FEWEST
from antidiffusion.bench.instruments import Instruments
from antidiffusion.bench.plan import ALL, HALF, Folder, Plan, Trial
from antidiffusion.bench.rows import CLEAN, CONTROL
from antidiffusion.metrics.table import OPTIONAL
from antidiffusion.recipes import AdvDM, AntiDiffusion

OUTSIDE = """
recipes.theirs = {{ folder = "elsewhere" }}
recipes.advdm = {{ steps = 1, budget = 4, note = "1 step, the paper's 40" }}
[edits]
dataset = "pictures"
attacks.sdedit = {{ steps = 2 }}
"""
SHIPPED = Path(antidiffusion.bench.__file__).parent


@pytest.mark.parametrize("name", ["default", "smoke"])
def test_the_shipped_plans_compare_with_the_clean_pictures_and_the_control(name: str) -> None:
    plan = Plan.read(SHIPPED / f"{name}.toml")
    trials = list(plan.trials())
    assert len({plan.key(trial) for trial in trials}) == len(trials)
    assert {recipe.budget for recipe in plan.recipes.values() if not isinstance(recipe, Folder)} == {8}
    attacked = Counter(trial.recipe for trial in trials if trial.kind in ("edit", "tuning"))
    assert {CLEAN, CONTROL, "anti-diffusion"} <= set(attacked)
    assert len(set(attacked.values())) == 1
    kinds = ["protection", "floor", "edit", "tuning"]
    places = [
        (min(2, kinds.index(trial.kind)), trial.recipe != CLEAN) for trial in trials if trial.kind != "protection"
    ]
    assert places == sorted(places) and {trial.kind for trial in trials} == set(kinds)
    assert {plan.floor(trial) for trial in trials if trial.kind == "tuning"} <= set(trials)


def test_trials_are_the_product_of_what_is_asked(tmp_path: Path) -> None:
    text = """
    surrogate = "a"
    attackers = ["a", "b"]
    seeds = [1, 2]
    purifiers = ["blur", "jpeg-50"]
    purified = ["masactrl"]
    recipes.advdm = { steps = 7 }
    recipes.ours = { recipe = "anti-diffusion", sdl_weight = 0 }
    recipes.theirs = { folder = "elsewhere" }
    [edits]
    dataset = "pictures"
    attacks = { sdedit = {}, masactrl = { guidance = 3.0 } }
    [tunings]
    people = 1
    settings = ["all protected", "half clean"]
    attacks.lora = { steps = 9 }
    """
    path = write_plan(tmp_path, "", text.replace("{", "{{").replace("}", "}}"))
    plan = Plan.read(path)
    counts = Counter((trial.kind, trial.attack, trial.recipe == CLEAN) for trial in plan.trials())
    seeds, attackers, items, recipes, washed = 2, 2, 2, 4, 3
    assert counts == {
        ("protection", "", False): seeds * recipes * (items + 1),
        ("edit", "sdedit", True): seeds * attackers * items,
        ("edit", "masactrl", True): seeds * attackers * items * washed,
        ("floor", "", True): seeds * attackers,
        ("tuning", "lora", True): seeds * attackers * 2,
        ("edit", "sdedit", False): seeds * attackers * items * recipes,
        ("edit", "masactrl", False): seeds * attackers * items * recipes * washed,
        ("tuning", "lora", False): seeds * attackers * 2 * recipes,
    }
    assert plan.recipes["advdm"] == replace(AdvDM(), budget=8, steps=7)
    assert plan.recipes["ours"] == AntiDiffusion(budget=8, sdl_weight=0)
    assert plan.recipes["theirs"] == Folder(tmp_path / "elsewhere")
    assert plan.tunings and plan.tunings.attacks["lora"].steps == 9
    assert {trial.setting for trial in plan.trials() if trial.kind == "tuning"} == {ALL, HALF}


def test_a_key_follows_everything_that_decides_the_result(tmp_path: Path) -> None:
    path = write_plan(tmp_path, "a")

    def keys() -> set[str]:
        plan = Plan.read(path)
        return {plan.key(trial) for trial in plan.trials() if trial.recipe == "advdm" and trial.item == "item 0"}

    first = keys()
    assert keys() == first
    for old, new in (('"a"', '"b"'), ("steps = 1", "steps = 3"), ("purifiers", "budget = 4\npurifiers")):
        text = path.read_text()
        path.write_text(text.replace(old, new))
        assert not keys() & first, new
        path.write_text(text)
    (tmp_path / "pictures" / "item 0" / "prompt.txt").write_text("another prompt")
    assert not keys() & first


def test_a_note_changes_no_key_and_another_picture_of_another_program_does(tmp_path: Path) -> None:
    path = write_plan(tmp_path, "a", OUTSIDE)
    (tmp_path / "elsewhere").mkdir()

    def trial(plan: Plan, recipe: str, kind: str = "protection") -> Trial:
        return next(t for t in plan.trials() if (t.recipe, t.kind, t.item) == (recipe, kind, "item 0"))

    def key(recipe: str, kind: str) -> str:
        plan = Plan.read(path)
        return plan.key(trial(plan, recipe, kind))

    before = {kind: key("theirs", kind) for kind in ("protection", "edit")}
    draw(tmp_path / "elsewhere" / "item 0.png")
    after = {kind: key("theirs", kind) for kind in ("protection", "edit")}
    assert all(before[kind] != after[kind] for kind in before)
    draw(tmp_path / "elsewhere" / "item 0.png", 1)
    assert all(key("theirs", kind) not in (before[kind], after[kind]) for kind in before)
    ours = key("advdm", "protection")
    path.write_text(path.read_text().replace("the paper's 40", "40 of the paper"))
    plan = Plan.read(path)
    assert key("advdm", "protection") == ours
    assert plan.note(trial(plan, "advdm")) == {"note": "1 step, 40 of the paper"}
    assert plan.note(trial(plan, "advdm", "edit")) == plan.note(trial(plan, "theirs")) == {}
    assert [plan.budget_of(trial(plan, name)) for name in ("advdm", "theirs")] == [4, 8]
    assert plan.budget_of(trial(plan, CLEAN, "edit")) is None


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("[recipes]", "[recipes", "expected TOML, got Expected"),
        ("purifiers", "purifier", "expected .*purifiers.* in the plan, got purifier"),
        ("bit-depth", "soap", "expected purifiers of jpeg-95.*, got 'soap'"),
        ("advdm", "advd", "expected recipes of anti-diffusion.*, got 'advd'"),
        ("advdm", "clean", "got 'clean'; the clean pictures are always run"),
        ("steps = 1", "stepz = 1", "expected budget, .* in advdm, got stepz"),
        ("sdedit", "sdedits", "expected edits of sdedit.*, got 'sdedits'"),
        ("steps = 2", "strength = 7", "expected a strength in"),
        ("sdedit", "inpaint", "expected a mask of every item for inpaint"),
        ('dataset = "pictures"', 'dataset = "nowhere"', "expected folders with a picture and prompt.txt"),
        ('dataset = "pictures"', "first = 200", "expected to choose some items, got a set of 102, first = 200"),
        ("[recipes]", "budget = 99\n[recipes]", "expected a budget from 1 to 64"),
        (
            'dataset = "pictures"',
            "items = 0",
            "expected to choose some items, got a set of 102, first = 0 and items = 0",
        ),
        ('["bit-depth"]', '"bit-depth"', "expected a list of purifiers, got 'bit-depth'; put it in brackets"),
        ("[recipes]", 'posterior = "mode"\n[recipes]', "expected posterior of sample, mean, got 'mode'"),
        ("[recipes]", 'seeds = ["1"]\n[recipes]', "expected seeds as int, got '1'"),
        ("[recipes]", 'budget = "8"\n[recipes]', "expected budget as float, got '8'"),
        ("steps = 1", "steps = 1.5", "expected steps as int, got 1.5"),
        ("steps = 1", "prompt = 3", "expected prompt as str, got 3"),
        ("steps = 2", "guidance = true", "expected guidance as float . None, got True"),
        ("[edits]", "[other]", "got other; leave it out"),
        ("[edits]", "[edits.attacks]", "expected edits of sdedit, .*, got 'dataset'"),
    ],
)
def test_mistakes(tmp_path: Path, old: str, new: str, fragment: str) -> None:
    path = write_plan(tmp_path, "a")
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=rf"plan\.toml.*{fragment}"):
        Plan.read(path)


def write_users_folders(folder: Path, people: int) -> None:
    """Write what the plans for real models say must lie beside them, but for the models."""
    for number in range(people):
        edit = folder / "edits" / f"{number}"
        edit.mkdir(parents=True)
        draw(edit / "example.png", number)
        (edit / "prompt.txt").write_text("a person with a hat")
        for name in ("set_A", "set_B", "set_C"):
            photos = folder / "faces" / f"{number}" / name
            photos.mkdir(parents=True)
            draw(photos / "0.png", number)


@pytest.mark.parametrize("name", ["sd21", "sdxl", "flux"])
def test_plans_for_real_models_are_read_and_are_as_long_as_they_say(name: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "benchmarks" / "plans" / f"{name}.toml").read_text()
    write_users_folders(tmp_path, 8)
    (tmp_path / "plan.toml").write_text(text)
    plan = Plan.read(tmp_path / "plan.toml")
    kinds = Counter(trial.kind for trial in plan.trials())
    counts = [kinds[kind] for kind in ("protection", "floor", "edit", "tuning")]
    assert "Work: {} protections, {} floors, {} edits and {} tunings".format(*counts) in text
    assert plan.metrics.keys() == set(OPTIONAL) and plan.tunings and len(plan.tunings.people) >= FEWEST
    assert all(plan.budget_of(trial) in (None, 7) for trial in plan.trials())
    with pytest.raises(ValueError, match=r"expected .*, got "):
        Instruments(plan.metrics).check()


def test_another_data_set(tmp_path: Path) -> None:
    path = write_plan(tmp_path, "a")
    other = tmp_path / "other"
    other.mkdir()
    write_plan(other, "a", items=3)
    plan = Plan.read(path, other / "pictures")
    assert plan.edits and len(plan.edits.items) == 3
