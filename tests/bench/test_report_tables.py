from dataclasses import replace

import numpy as np
import pytest
from report_rows import FAILED, edit, floor, row, run, tuned

from antidiffusion.bench import estimates, tables
from antidiffusion.bench.estimates import estimate, mean_rank, named_apart, per_item, ranks
from antidiffusion.bench.tables import NOTHING, Table


@pytest.fixture(autouse=True)
def few_items(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Print intervals over two items, so that they can be told by hand, but where the limit itself is tested."""
    if "eight" not in request.fixturenames:
        monkeypatch.setattr(estimates, "FEWEST", 2)


@pytest.fixture
def eight() -> int:
    return estimates.FEWEST


def texts(table: Table) -> dict[str, dict[str, str]]:
    """By recipe and column the texts of a table."""
    return {line[0].text: {c: cell.text for c, cell in zip(table.columns, line, strict=True)} for line in table.lines}


def best(table: Table, column: str) -> list[str]:
    return [line[0].text for line in table.lines if line[table.columns.index(column)].best]


def test_items_are_averaged_over_seeds_first() -> None:
    rows = [edit("advdm", "000", 0.1), edit("advdm", "000", 0.3, seed=1), edit("advdm", "001", 0.8)]
    values = per_item(rows, "ssim_to_clean")
    assert values == pytest.approx({("synth", "000"): 0.2, ("synth", "001"): 0.8})
    found = estimate(values)
    assert found is not None and found.interval is not None
    assert (found.mean, found.count) == (pytest.approx(0.5), 2)
    assert found.interval == pytest.approx((0.2, 0.8))


def test_one_item_a_data_set_has_no_interval() -> None:
    found = estimate({("a", "000"): 1.0, ("b", "000"): 3.0})
    assert found is not None
    assert (found.mean, found.interval) == (2.0, None)
    assert estimate({}) is None


def test_items_are_drawn_within_their_data_set() -> None:
    found = estimate({("a", "0"): 1.0, ("a", "1"): 1.0, ("b", "0"): 5.0, ("b", "1"): 5.0})
    assert found is not None and found.interval == (3.0, 3.0)


def test_protection_says_the_largest_linf_and_means() -> None:
    figures = ({"linf": 6, "psnr": 30.0}, {"linf": 8, "psnr": 32.0})
    rows = [row("advdm", str(i), kind="protection", metrics=each, seconds=1.0 + i) for i, each in enumerate(figures)]
    rows += [row("mist", "0", kind="protection", metrics={"linf": 7, "psnr": 29.0}, seconds=9.0)]
    (table,) = tables.protection(rows)
    assert table.columns == ("recipe", "linf, largest ↓", "psnr ↑", "seconds ↓", "peak_memory_mb")
    assert [cell.text for cell in table.lines[0]] == [
        "advdm",
        "8",
        "31.0 [30.0, 32.0]",
        "1.5 [1.0, 2.0]",
        "800 [800, 800]",
    ]
    assert texts(table)["mist"]["psnr ↑"] == "29.0, n=1"
    assert (best(table, "linf, largest ↓"), best(table, "psnr ↑")) == (["mist"], ["advdm"])
    assert best(table, "peak_memory_mb") == []
    assert tables.protection([edit("advdm", "0", 1)]) == []


def test_attacks_compare_with_the_control() -> None:
    rows = [edit("random-sign", item, value) for item, value in (("0", 0.9), ("1", 0.8))]
    rows += [edit("advdm", item, value) for item, value in (("0", 0.7), ("1", 0.4), ("2", 0.1))]
    rows += [edit("mist", item, value) for item, value in (("0", 0.95), ("1", 0.9))]
    rows += [row("clean", "0", metrics={"success": 1, "face_distance": None})]
    rows += [edit("advdm", "0", 0.0, purifier="jpeg-75")]
    (table,) = tables.attacks(rows)
    assert [line[0].text for line in table.lines] == ["clean", "random-sign", "advdm", "mist"]
    assert table.title == "masactrl, n = 3, 1 seed"
    assert table.columns[1:4] == ("ssim_to_clean ↓", "success ↓", "face_distance ↑")
    ssim = {recipe: line["ssim_to_clean ↓"] for recipe, line in texts(table).items()}
    assert ssim["clean"] == NOTHING
    assert ssim["random-sign"] == "0.850 [0.800, 0.900], n=2"
    assert ssim["advdm"] == "0.400 [0.100, 0.700]"
    assert best(table, "ssim_to_clean ↓") == ["advdm"]
    difference = {recipe: line[table.columns[-1]] for recipe, line in texts(table).items()}
    assert difference["advdm"] == "-0.300 [-0.400, -0.200], n=2"
    assert difference["mist"] == "+0.075 [+0.050, +0.100] worse than random-sign"
    assert difference["clean"] == difference["random-sign"] == ""


def test_the_baseline_is_never_the_best_protection() -> None:
    rows = [tuned(recipe, "0", value) for recipe, value in (("clean", 0.9), ("advdm", 0.5), ("mist", 0.4))]
    (table,) = tables.attacks(rows)
    assert best(table, "distance ↑") == ["advdm"]
    assert texts(table)["advdm"][table.columns[-1]] == NOTHING


def test_other_prompts_stand_after_their_metric_and_unknown_metrics_last() -> None:
    metrics = {"distance_other_prompt": 0.1, "zeal": 1, "ism": 0.9, "fdfr": 0.1}
    (table,) = tables.attacks([tuned(recipe, "0", 0.5, metrics=metrics) for recipe in ("advdm", "mist")])
    assert table.columns[1:5] == ("fdfr ↑", "ism ↓", "zeal", "distance_other_prompt ↑")
    assert "random-sign" in table.columns[5]


def test_ranks_of_known_means() -> None:
    """Means 0.2, 0.2, 0.5 (one item missing), none; the second draw sees the first item alone."""
    nan = np.nan
    scores = np.array([[0.1, 0.2, 0.5, nan], [0.3, 0.2, nan, nan]])
    found = ranks(np.array([[1.0, 1.0], [2.0, 0.0]]), scores)
    np.testing.assert_array_equal(found, [[1.5, 1.5, 3, nan], [1, 2, 3, nan]])
    other = np.array([[4.0, nan, 1.0, nan], [4.0, nan, 1.0, nan]])
    np.testing.assert_array_equal(mean_rank([found, other]), [[2.75, 1.5, 2, nan], [2.5, 2, 2, nan]])


def test_ranking() -> None:
    (table,) = tables.ranking(run())
    assert table.columns == ("recipe", "mean rank", "lora, all protected, n = 3", "masactrl, n = 3")
    assert [[cell.text for cell in line] for line in table.lines] == [
        ["mist", "1.00 [1.00, 1.00]", "1", "1"],
        ["advdm", "2.00 [2.00, 2.00]", "2", "2"],
        ["random-sign", "3.00 [3.00, 3.00]", "3", "3"],
    ]
    assert best(table, "mean rank") == ["mist"]
    assert table.title == "By ssim_to_clean and likeness, n = 6, 1 seed"
    assert table.note.endswith("2 rows left out because the attack fails on the clean picture already.")


def test_ties_and_gaps_in_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "FEWEST", 1)
    rows = [edit(recipe, item, 0.5) for recipe in ("advdm", "mist") for item in ("0", "1")]
    rows += [edit("aspl", "0", 0.9), tuned("mist", "0", 0.2), tuned("aspl", "0", 0.3), tuned("advdm", "0", None)]
    (table,) = tables.ranking(rows)
    assert [[cell.text for cell in (line[0], *line[2:])] for line in table.lines] == [
        ["advdm", NOTHING, "1.5"],
        ["mist", "2", "1.5"],
        ["aspl", "1", "3, n=1"],
    ]
    mean = {recipe: line["mean rank"] for recipe, line in texts(table).items()}
    assert mean["advdm"].startswith("1.50 [") and mean["advdm"].endswith("], 1 of 2 attacks")
    assert mean["mist"].startswith("1.75 [") and mean["aspl"].startswith("2.00 [")


def test_the_interval_of_a_mean_rank() -> None:
    """Each recipe wins on one of two items: over resamples both may be first or last."""
    rows = [edit("advdm", "0", 0.1), edit("advdm", "1", 0.9), edit("mist", "0", 0.2), edit("mist", "1", 0.7)]
    (table,) = tables.ranking(rows)
    assert texts(table)["mist"]["mean rank"] == "1.00 [1.00, 2.00]"
    assert texts(table)["advdm"]["mean rank"] == "2.00 [1.00, 2.00]"


def test_only_the_protectors_model_is_ranked() -> None:
    rows = [edit("advdm", "0", 0.1, attacker="other"), edit("advdm", "0", 0.1, purifier="blur"), row("clean")]
    assert tables.ranking(rows) == []


def test_purifiers_show_mean_and_worst() -> None:
    values = {"none": 0.2, "jpeg-75": 0.6, "blur": 0.4}
    rows = [edit("advdm", "0", value, purifier=name) for name, value in values.items()]
    rows += [edit("mist", "0", 1.0, purifier="blur"), edit("mist", "1", 0.0, purifier="blur", flags=FAILED)]
    (table,) = tables.purifiers(rows)
    assert table.columns == ("recipe", "none", "mean of purifiers", "worst of purifiers", "blur", "jpeg-75")
    advdm, mist = table.lines
    assert [cell.text for cell in advdm] == ["advdm", "0.200", "0.500", "0.600 (jpeg-75)", "0.400", "0.600"]
    assert [cell.text for cell in mist] == ["mist", NOTHING, "1.000 (1 of 2)", "1.000 (blur)", "1.000", NOTHING]
    assert [cell.tone for cell in advdm] == [None, 1.0, 0.625, 0.5, 0.75, 0.5]
    assert mist[4].tone == 0.0


def test_the_worst_likeness_is_the_largest() -> None:
    rows = [tuned("advdm", "0", value, purifier=name) for name, value in (("blur", 0.2), ("jpeg-75", 0.6))]
    (table,) = tables.purifiers(rows)
    assert [cell.text for cell in table.lines[0][1:4]] == [NOTHING, "0.600", "0.800 (blur)"]
    assert table.lines[0][3].tone == 0.0
    assert tables.purifiers([tuned("advdm", "0", 0.2)]) == []


def test_transfer() -> None:
    (table,) = tables.transfer(run())
    assert table.title == "masactrl: ssim_to_clean ↓, n = 3, 1 seed"
    assert table.columns == ("recipe", "by mini", "by other")
    assert texts(table)["advdm"]["by mini"] == "0.800 [0.800, 0.800]"
    assert texts(table)["advdm"]["by other"] == "0.850 [0.850, 0.850]"
    assert list(texts(table)) == ["random-sign", "advdm", "mist"]
    assert len(tables.attacks(run())) == 3
    assert tables.transfer([edit("advdm", "0", 0.5)]) == []
    fewer = [edit("advdm", item, 0.5) for item in "01"] + [edit("advdm", "0", 0.6, attacker="other")]
    assert texts(tables.transfer(fewer)[0])["advdm"]["by other"] == "0.600, n=1"


def test_models_and_budgets_are_not_averaged_over() -> None:
    rows = [edit(recipe, "0", b / 10, budget=b) for recipe in ("random-sign", "advdm") for b in (4, 8)]
    named = named_apart([*rows, row("clean")])
    assert [r.recipe for r in named] == [
        "random-sign (4/255)",
        "random-sign (8/255)",
        "advdm (4/255)",
        "advdm (8/255)",
        "clean",
    ]
    (table,) = tables.attacks(named)
    assert texts(table)["advdm (8/255)"]["ssim_to_clean ↓"].startswith("0.800")
    assert texts(table)["advdm (8/255)"][table.columns[-1]] == "+0.000"
    mixed = named_apart([rows[0], replace(rows[0], surrogate="sd")])
    assert [r.recipe for r in mixed] == ["random-sign (mini)", "random-sign (sd)"]
    rows = run()
    assert named_apart(rows) == rows


def test_head_says_what_was_run_and_what_was_flagged() -> None:
    rows = [*run(), edit("advdm", "009", 0.5, settings={"recipe": {"steps": 9}}, flags=["zero gradient"], key="abc")]
    what, flags = tables.head(rows)
    facts = {line[0].text: line[1].text for line in what.lines}
    assert facts["data sets"] == "people: 3 items, synth: 5 items"
    assert facts["models"] == "mini 0123456789ab in float32, other ffffffffffff in float32"
    assert (facts["budgets"], facts["seeds"], facts["measured with"]) == ("8/255", "0", "faces: dlib")
    assert facts["settings that differ"] == "advdm: 2"
    assert {line[0].text: line[1].text for line in flags.lines} == {"clean attack failed": "2", "zero gradient": "1"}
    assert flags.lines[1][2].text == "masactrl of advdm, synth/009, seed 0 (abc)"
    assert len(tables.head([row("advdm")])) == 1


@pytest.mark.parametrize(("missing", "printed"), [(1, False), (0, True)])
def test_no_interval_is_printed_under_eight_items(missing: int, printed: bool, eight: int) -> None:
    assert eight == 8
    items = eight - missing
    rows = [edit(recipe, str(i), 0.1 * i) for recipe in ("random-sign", "advdm") for i in range(items)]
    rows += [tuned(recipe, str(i), 0.1 * i) for recipe in ("clean", "random-sign", "advdm") for i in range(items)]
    rows += [floor(str(i), 0.9) for i in range(items)]
    found = [*tables.attacks(rows), *tables.ranking(rows)]
    assert len(found) == 3
    for table in found:
        assert any("[" in cell.text for line in table.lines for cell in line) == printed, table.title


def test_edits_that_still_obey_are_ranked_beside_those_that_differ() -> None:
    figures = {"advdm": (0.5, 1.0), "mist": (0.9, 0.0)}
    rows = [
        row(recipe, item, metrics={"ssim_to_clean": differs, "obeys": obeys})
        for recipe, (differs, obeys) in figures.items()
        for item in ("0", "1")
    ]
    differ, obey = tables.ranking(rows)
    assert (differ.title, obey.title) == ("By ssim_to_clean, n = 2, 1 seed", "By obeys, n = 2, 1 seed")
    assert [line[0].text for line in differ.lines] == ["advdm", "mist"]
    assert [line[0].text for line in obey.lines] == ["mist", "advdm"]


def test_likeness_is_a_share_of_the_way_from_the_untuned_model_to_the_unprotected() -> None:
    """Likeness is 1 - distance: untuned 0.2, unprotected 0.6, so 0.4 is half of the way and 0.6 all of it."""
    rows = [tuned("clean", item, 0.4) for item in "01"] + [floor(item, 0.8) for item in "01"]
    rows += [tuned("advdm", item, value) for item, value in zip("01", (0.5, 0.7), strict=True)]
    rows += [tuned("random-sign", item, 0.4) for item in "01"]
    rows += [floor(item, 0.0, attacker="other") for item in "01"]
    rows += [floor(item, 0.0, setting="9 steps, 3 guidance") for item in "01"]
    (table,) = tables.attacks(rows)
    column = "likeness, share of the way from untuned to clean ↓"
    way = {recipe: line[column] for recipe, line in texts(table).items()}
    assert way == {"clean": "", "untuned": "", "random-sign": "100 [100, 100] %", "advdm": "50 [25, 75] %"}
    assert texts(table)["untuned"]["likeness ↓"].startswith("0.200")
    assert best(table, "likeness ↓") == ["advdm"]  # the untuned model protects nobody
    unclear = [*rows[:2], *(floor(item, 0.3) for item in "01"), *rows[4:6]]
    assert texts(tables.attacks(unclear)[0])["advdm"][column] == NOTHING
    assert column not in tables.attacks([row for row in rows if row.kind != "floor"])[0].columns
