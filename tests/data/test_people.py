from pathlib import Path

import pytest
from command_line import draw

from antidiffusion.data.people import read, synthetic
from antidiffusion.metrics.identity import DlibFaces
from antidiffusion.pictures.picture import Picture


def test_the_synthetic_people_are_different_ones_with_faces() -> None:
    people = read(synthetic())
    assert [len(photos) for p in people for photos in (p.reference, p.published, p.others)] == [4] * 30
    faces = DlibFaces()
    distances: dict[bool, list[float]] = {True: [], False: []}
    found = []
    for person in people[:4]:
        for photo in (person.reference[0], person.published[0]):
            (face,) = faces.embed(Picture.read(photo).tensor())
            if face is not None:
                found.append((person.name, face))
    assert len(found) >= 6
    for i, (name, face) in enumerate(found):
        for other, another in found[:i]:
            distances[name == other].append((face - another).norm().item())
    assert max(distances[True]) < sum(distances[False]) / len(distances[False])


def test_read_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected folders NAME/set_A, set_B and set_C, got none"):
        read(tmp_path / "nowhere")
    for name in ("set_A", "set_B", "set_C"):
        (tmp_path / "ann" / name).mkdir(parents=True)
        if name != "set_C":
            draw(tmp_path / "ann" / name / "b.png")
    (tmp_path / "ann" / "set_C" / "notes.txt").write_text("no photo")
    draw(tmp_path / "ann" / "set_C" / ".hidden.png")
    with pytest.raises(ValueError, match=r"expected photos in .*set_C, got none"):
        read(tmp_path)
    draw(tmp_path / "ann" / "set_C" / "c.png")
    draw(tmp_path / "ann" / "set_A" / "a.png")
    (person,) = read(tmp_path)
    assert person.name == "ann"
    assert [photo.name for photo in person.reference] == ["a.png", "b.png"]
