import pytest
from report_rows import edit, row, tuned

from antidiffusion.bench.comparisons import YARDSTICK, as_papers, equal_visibility, lengths
from antidiffusion.bench.estimates import named_apart
from antidiffusion.bench.rows import Row


def budgets() -> list[Row]:
    """Ours at 4 and 8, mist at 8 and 16, the control at 8; ours is seen least and mist most."""
    rows = []
    for name, budget, visible, differs in (
        ("ours, 4", 4.0, 1.0, 0.8),
        ("ours, 8", 8.0, 3.0, 0.6),
        ("mist, 8", 8.0, 2.5, 0.7),
        ("mist, 16", 16.0, 5.0, 0.5),
        ("random-sign", 8.0, 2.0, 0.95),
    ):
        settings = {"recipe": {"class": name.split(",")[0], "steps": 5, "budget": budget}}
        values = {"budget": budget, "settings": settings}
        rows.append(row(name, "0", kind="protection", metrics={"delta_e": visible}, **values))
        rows.append(edit(name, "0", differs, **values))
    return rows


def test_where_all_are_as_visible_as_the_control() -> None:
    (table,) = equal_visibility(budgets())
    assert table.title == "edit at equal delta_e, 2.000 as the control's, n = 1, 1 seed"
    assert table.columns == ("recipe at its budgets", "delta_e", "ssim_to_clean ↓")
    assert sorted(tuple(cell.text for cell in line) for line in table.lines) == [
        ("mist, 16, mist, 8", "2.500 to 5.000", "—"),  # no budget of it is as little visible
        ("ours, 4, ours, 8", "1.000 to 3.000", "0.700"),
    ]
    assert equal_visibility(named_apart(budgets()))[0].lines[0][2] == table.lines[0][2]


def test_one_budget_says_nothing_of_equal_visibility() -> None:
    assert equal_visibility([row for row in budgets() if row.budget == 8]) == []
    assert equal_visibility([row for row in budgets() if row.recipe != "random-sign"]) == []
    assert equal_visibility([edit("mist", "0", 0.5)]) == []


def test_lpips_is_taken_where_all_have_it() -> None:
    rows = [replaced(row, lpips=row.metrics["delta_e"]) if row.kind == "protection" else row for row in budgets()]
    assert "equal lpips, 2.000" in equal_visibility(rows)[0].title


def replaced(old: Row, **metrics: float | None) -> Row:
    values = {name: getattr(old, name) for name in ("kind", "metrics", "budget", "settings")}
    return row(old.recipe, old.item, **values | {"metrics": old.metrics | metrics})


def test_shortened_recipes_and_notes_are_said() -> None:
    settings = {"recipe": {"class": "ASPL", "rounds": 25}}
    rows = [row("aspl", str(i), kind="protection", settings=settings) for i in range(2)]
    rows += [row("whole", kind="protection", settings={"recipe": {"class": "ASPL", "rounds": 50}})]
    rows += [row("noted", kind="protection", settings={"recipe": {"class": "Mist"}, "note": "our reading"})]
    (table,) = lengths(rows)
    assert {line[0].text: line[1].text for line in table.lines} == {
        "aspl": "rounds 25 instead of 50",
        "noted": "our reading",
    }
    assert lengths([rows[2], edit("aspl", "0", 0.5, settings=settings)]) == []


def test_published_lengths_are_those_of_settings_that_exist() -> None:
    from antidiffusion import recipes
    from antidiffusion.bench.comparisons import PUBLISHED

    for name, settings in PUBLISHED.items():
        assert all(getattr(getattr(recipes, name)(), setting) <= value for setting, value in settings.items())


def test_the_papers_kind_of_table_stands_beside_what_others_report() -> None:
    backends = {"faces": "ArcFace w.onnx"}
    metrics = {"fdfr": 0.25, "ism": 0.5, "kid": 0.125, "likeness": 0.4}
    rows = [tuned("advdm", item, 0.5, metrics=metrics, backends=backends) for item in "01"]
    ours, theirs = as_papers([*rows, tuned("advdm", "0", 0.5, metrics=metrics, backends=backends, purifier="blur")])
    assert ours.title == "lora, n = 2, 1 seed"
    assert ours.columns == ("recipe", "detection rate ↓", "ism ↓", "kid ↑")
    assert [cell.text for cell in ours.lines[0]] == ["advdm", "0.750", "0.500", "0.125"]
    assert len(theirs.lines) == len(YARDSTICK) and "2511.19910" in theirs.note
    assert all(0 <= rate <= 1 and -1 <= ism <= 1 for _, _, rate, ism, _ in YARDSTICK)
    assert as_papers([tuned("advdm", "0", 0.5, metrics=metrics)]) == []  # dlib's scores are on another scale


@pytest.mark.parametrize("section", [lengths, equal_visibility, as_papers])
def test_no_rows_no_table(section: object) -> None:
    assert callable(section) and section([]) == []
