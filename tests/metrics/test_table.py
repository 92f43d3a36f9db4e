import random

from antidiffusion.metrics.table import METRICS, OPTIONAL, OTHER_PROMPT, PRIMARY, heading, known, place


def test_columns_stand_in_the_order_of_the_table() -> None:
    names = [*METRICS, *(name + OTHER_PROMPT for name in METRICS)]
    shuffled = random.Random(0).sample(names, len(names))
    assert sorted(shuffled, key=place) == names
    assert sorted(["zeal", "ism" + OTHER_PROMPT, "ism"], key=place) == ["ism", "zeal", "ism" + OTHER_PROMPT]


def test_headings_say_what_is_better_and_of_unknown_figures_nothing() -> None:
    assert [heading(name) for name in ("psnr", "ism", "linf", "zeal")] == ["psnr ↑", "ism ↓", "linf, largest ↓", "zeal"]
    assert heading("ism" + OTHER_PROMPT) == "ism_other_prompt ↓"
    assert known("ism" + OTHER_PROMPT) == METRICS["ism"] and known("zeal").better == 0


def test_every_kind_of_attack_is_ranked_and_every_backend_is_named() -> None:
    assert {kind: METRICS[name].ranks for kind, name in PRIMARY.items()} == {"edit": "edit", "tuning": "tuning"}
    assert all(METRICS[name].better for name in PRIMARY.values())
    assert {metric.backend for metric in METRICS.values()} <= {"", "faces", "attributes", *OPTIONAL}
