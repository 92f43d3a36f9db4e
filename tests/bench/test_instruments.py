import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from antidiffusion.bench.instruments import KEPT, Instruments
from antidiffusion.data.defense_edit import Item, read, synthetic
from antidiffusion.pictures.picture import Picture


@pytest.fixture(scope="module")
def instruments() -> Instruments:
    return Instruments({})


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return [item for item in read(synthetic()) if item.category in ("background", "clothing")][:8]


def tensor(path: Path | None) -> Tensor:
    assert path
    return Picture.read(path).tensor()


def test_an_edit_obeys_that_does_what_was_asked_to_the_person_and_nothing_else(
    instruments: Instruments, items: list[Item]
) -> None:
    obeyed = []
    for item in items:
        source, truth, mask = tensor(item.picture), tensor(item.edited), tensor(item.mask)[:, :1].round()
        done = instruments.edit(item, truth, source, mask)
        obeyed.append(done["obeys"])
        if not done["obeys"]:
            continue
        assert done["success"] == 1 and (done["kept_outside"] or 0) > KEPT
        elsewhere = mask * truth + (1 - mask) * torch.rand(truth.shape, generator=torch.Generator().manual_seed(0))
        spoilt = instruments.edit(item, elsewhere, source, mask)
        assert (spoilt["kept_outside"] or 0) < KEPT and spoilt["obeys"] == 0
        assert instruments.edit(item, source, source, mask)["obeys"] == 0
        other = tensor(next(i for i in items if i.picture != item.picture).edited)
        assert instruments.edit(item, other, source, None)["obeys"] == 0  # another person
    assert sum(value or 0 for value in obeyed) >= 6


def test_nothing_is_said_where_nobody_can_say(instruments: Instruments, items: list[Item]) -> None:
    grey = torch.full((1, 3, 64, 64), 0.5)
    found = instruments.edit(Item("x", Path(), "a hat"), grey, grey, torch.ones(1, 1, 64, 64))
    assert {name: found[name] for name in ("success", "obeys", "kept_outside", "face_lost", "face_distance")} == (
        dict.fromkeys(("success", "obeys", "kept_outside", "face_lost", "face_distance"))
    )


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        ({"lpips": "nowhere.safetensors"}, "got no file nowhere.safetensors"),
        ({"clip": "nowhere"}, "expected a CLIPModel in safetensors on this machine, got 'nowhere'"),
        ({"arcface": "nowhere.onnx"}, "expected an ONNX file of ArcFace, got none at nowhere.onnx"),
    ],
)
def test_what_a_plan_names_and_nobody_has_is_said_before_the_work(given: dict[str, str], fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        Instruments(given).check()


def test_a_missing_package_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ValueError, match=r"expected the packages dlib-bin .*pip install 'antidiffusion\[eval\]'"):
        Instruments({}).check()
