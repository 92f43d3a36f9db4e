"""Defense-Edit-Synth: which edits are drawn, their words and their masks; the rendered set is tested as data."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from portraits.edits import CHANGES, Edit, captions, touched
from portraits.identity import Identity, sample_identity
from portraits.sampling import held_out_generator
from portraits.scene import Scene, sample_scene

Drawn = tuple[Identity, Scene, Edit]


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    found = []
    for index in range(120):
        rng = held_out_generator(2000 + index)
        person = sample_identity(rng)
        scene = sample_scene(rng, person)
        edit = CHANGES[index % len(CHANGES)](rng, person, scene)
        if edit:
            found.append((person, scene, edit))
    return found


FIELDS = {
    "hair": {"hair_colour"},
    "background": {"background"},
    "clothing": {"cloth_colour"},
    "glasses": {"glasses"},
    "expression": {"expression", "actions"},
    "age": {"age", "phenotype"},
}


def test_an_edit_changes_its_attribute_and_no_other(drawn: list[Drawn]) -> None:
    seen = set()
    for person, scene, edit in drawn:
        before = vars(person) | {f"scene {key}": value for key, value in vars(scene).items()}
        after = vars(edit.after[0]) | {f"scene {key}": value for key, value in vars(edit.after[1]).items()}
        changed = {key.removeprefix("scene ") for key in before if before[key] != after[key]}
        assert changed == FIELDS[edit.category], edit.category
        seen.add(edit.category)
    assert seen == set(FIELDS)


def test_captions_differ_in_few_words_and_name_the_new_value(drawn: list[Drawn]) -> None:
    close = 0
    for person, scene, edit in drawn:
        texts = captions((person, scene), edit.after, edit.value)
        assert texts is not None
        source, target = (text.split() for text in texts)
        assert edit.value.split()[-1] in texts[1]
        close += len(set(source) ^ set(target)) <= 4
    assert close / len(drawn) > 0.9


def test_a_mask_covers_the_change_with_a_margin_and_no_grain() -> None:
    rng = np.random.default_rng(0)
    before = rng.integers(100, 104, (64, 64, 3)).astype(np.uint8)
    after = before.copy()
    after[20:30, 30:44] += 50
    after[5, 5] += 50  # a speck
    mask = touched(before, after)
    assert mask[20:30, 30:44].min() == mask[18:32, 32:42].min() == 255
    mask = mask.copy()
    mask[18:32, 28:46] = 0
    assert mask.max() == 0
    assert touched(before, before).max() == 0
