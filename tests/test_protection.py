import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from latent_spaces import write as write_spaces
from PIL import ExifTags, Image, ImageCms

import antidiffusion.card
from antidiffusion.card import HELD_OUT_PROMPT, effect, middle
from antidiffusion.metrics.visibility import JUST_NOTICEABLE
from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import load_latents
from antidiffusion.pictures.canvas import Canvas, view_size
from antidiffusion.pictures.picture import Picture, PictureError
from antidiffusion.protection import Protected, protect
from antidiffusion.recipes import AntiDiffusion, Latents, OfficialAntiDiffusion, RandomSign, Recipe, Trace

CHEAP = AntiDiffusion(steps=1, rounds=0, prompt_steps=0)
WALL = replace(CHEAP, step_size=100)  # one step against the wall
OFFICIAL_WALL = OfficialAntiDiffusion(steps=1, rounds=0, prompt_steps=0, step_size=100, radius=100)
WHOLE = AntiDiffusion(steps=1, rounds=1, prompt_steps=1, tuning_steps=1)  # every stage once
KINDS = {
    "noise": lambda random, shape: random.integers(0, 256, shape),
    "saturated": lambda random, shape: 255 * random.integers(0, 2, shape),
    "dark": lambda random, shape: random.integers(0, 3, shape),
    "flat": lambda random, shape: np.full(shape, random.integers(0, 256, shape[2])),
}


@dataclass(frozen=True)
class Nothing:
    """A recipe that leaves the pictures alone."""

    budget: float = 8

    def __call__(
        self, canvases: Sequence[Canvas], surrogate: Surrogate, generator: torch.Generator, progress: Any
    ) -> Trace:
        return Trace(0, progress)


@pytest.fixture(autouse=True)
def fewer_held_out_steps(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(antidiffusion.card, "HELD_OUT_STEPS", 2)
        yield


def draw(height: int = 70, width: int = 80, channels: int = 3, kind: str = "noise", seed: int = 0) -> np.ndarray:
    return KINDS[kind](np.random.default_rng(seed), (height, width, channels)).astype(np.uint8)


def picture(**options: Any) -> Picture:
    return Picture(draw(**options))


def decoded(path: Path) -> np.ndarray:
    """The file's values as Pillow alone sees them, always with channels."""
    with Image.open(path) as image:
        return np.atleast_3d(np.asarray(image)).astype(int)


@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.reuse, Phase.generate],  # shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    height=st.integers(64, 300),
    width=st.integers(64, 300),
    mode=st.sampled_from(["L", "RGB", "RGBA", "LA"]),
    kind=st.sampled_from(sorted(KINDS)),
    suffix=st.sampled_from([".png", ".webp", ".tiff"]),
    budget=st.integers(1, 64) | st.floats(1, 64),
    recipe=st.sampled_from([WALL, OFFICIAL_WALL, RandomSign()]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_written_file_is_within_the_budget(
    tmp_path_factory: pytest.TempPathFactory,
    tiny: Surrogate,
    height: int,
    width: int,
    mode: str,
    kind: str,
    suffix: str,
    budget: float,
    recipe: Any,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("property")
    values = draw(height, width, len(mode), kind, seed)
    source, target = folder / "in.png", folder / f"out{suffix}"
    Image.fromarray(values.squeeze()).save(source)
    recipe = replace(recipe, budget=budget)

    (protected,) = protect([source], recipe, surrogate=tiny, seed=seed)
    card = protected.save(target)

    written, clean = decoded(target), values.astype(int)
    colours = {"L": 1, "LA": 1, "RGB": 3, "RGBA": 3}[mode]
    written_colours = written.shape[2] - (written.shape[2] % 2 == 0)
    gap = np.abs(written[..., :written_colours] - clean[..., :colours]).max()
    assert 0 < gap <= budget
    assert card["budget"]["measured"] == gap
    assert written.shape[:2] == (height, width)
    if colours == 1:
        assert (written[..., :written_colours] == written[..., :1]).all()
    if mode.endswith("A"):
        assert (written[..., -1] == clean[..., -1]).all()
    if mode in ("L", "LA") and suffix != ".webp":
        assert written.shape[2] == len(mode)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff"])
def test_metadata_travels(tmp_path: Path, tiny: Surrogate, suffix: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "Somebody"
    exif[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.5)}
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source, target = tmp_path / "in.jpg", tmp_path / f"out{suffix}"
    Image.fromarray(draw()).save(source, exif=exif, icc_profile=icc)

    protect([source], CHEAP, surrogate=tiny)[0].save(target)

    with Image.open(target) as image:
        assert image.info["icc_profile"] == icc
        assert image.getexif()[ExifTags.Base.Artist] == "Somebody"
        assert not image.getexif().get_ifd(ExifTags.IFD.GPSInfo), "where it was taken is left out"


@pytest.mark.parametrize("recipe", [CHEAP, WHOLE, RandomSign()], ids=repr)
def test_the_seed_decides_the_bytes(tmp_path: Path, tiny: Surrogate, recipe: Recipe) -> None:
    files = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        protect([picture()], recipe, surrogate=tiny, seed=seed)[0].save(tmp_path / f"{name}.png")
        files.append((tmp_path / f"{name}.png").read_bytes())
    assert files[0] == files[1] != files[2]


def test_a_picture_alone_and_among_others(tiny: Surrogate) -> None:
    before = {key: value.clone() for key, value in tiny.denoiser.state_dict().items()}
    first, second = picture(seed=1), picture(height=100, seed=2)
    among = protect([first, second], WHOLE, surrogate=tiny)
    (alone,) = protect([second], WHOLE, surrogate=tiny)
    assert (among[1].picture.pixels == alone.picture.pixels).all()
    assert all(torch.equal(before[key], value) for key, value in tiny.denoiser.state_dict().items())


def test_together_is_joint(tiny: Surrogate) -> None:
    pictures = [picture(seed=1), picture(height=100, seed=2)]
    apart = protect(pictures, WHOLE, surrogate=tiny)
    joint = protect(pictures, WHOLE, surrogate=tiny, together=True)
    assert [p.card["picture"]["protected_together"] for p in apart + joint] == [1, 1, 2, 2]
    assert [p.picture.pixels.shape for p in joint] == [p.pixels.shape for p in pictures]
    assert all((a.picture.pixels != b.picture.pixels).any() for a, b in zip(apart, joint, strict=True))


def test_the_card_is_truthful(tmp_path: Path, tiny: Surrogate) -> None:
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    Image.fromarray(draw(90, 130)).save(source)
    recipe = replace(WHOLE, budget=5, step_size=3)
    (protected,) = protect([source], recipe, surrogate=tiny, seed=7)
    card = protected.save(target)

    assert json.loads((tmp_path / "out.png.json").read_text()) == card
    sections = ["file", "recipe", "seed", "model", "picture", "budget", "fidelity", "effect", "cost", "versions"]
    assert list(card) == sections
    assert card["file"] == "out.png"
    assert card["seed"] == 7
    assert card["recipe"] == {"name": "anti-diffusion"} | asdict(recipe)
    assert card["model"] == {"name": tiny.name, "sha256": tiny.sha256, "dtype": "float32"}
    assert card["versions"]["torch"] == torch.__version__
    assert card["cost"]["seconds"] > 0
    assert card["cost"]["peak_memory_mb"] > 50

    clean, written = decoded(source), decoded(target)
    assert card["budget"]["measured"] == np.abs(clean - written).max()
    assert card["budget"]["requested"] == 5
    decibel = 10 * math.log10(255**2 / np.square(clean - written).mean())
    assert card["fidelity"]["psnr"] == pytest.approx(decibel, abs=1e-3)
    assert 0 < card["fidelity"]["ssim"] < 1
    assert 0 < card["fidelity"]["delta_e"] < card["fidelity"]["delta_e_95"] < card["fidelity"]["delta_e_99"]
    assert card["fidelity"]["visible"] == (card["fidelity"]["delta_e_95"] > JUST_NOTICEABLE)

    size = view_size(90, 130, tiny.size, tiny.multiple)
    assert card["picture"] == {
        "width": 130,
        "height": 90,
        "seen_by_the_model": [size[1], size[0]],
        "protected_together": 1,
        "notes": [],
    }
    views = [Canvas(values.astype(np.uint8), size).clean_view for values in (clean, written)]
    assert card["effect"] == effect(tiny, *views, seed=7)


def test_the_card_repeats_what_reading_lost(tmp_path: Path, tiny: Surrogate) -> None:
    Image.fromarray(draw(channels=1).squeeze().astype(np.int32) * 257).convert("I;16").save(tmp_path / "in.png")
    (protected,) = protect([tmp_path / "in.png"], RandomSign(), surrogate=tiny)
    assert any("16 bits" in note for note in protected.card["picture"]["notes"])


def test_the_model_is_named_as_it_was_before_tuning(tiny: Surrogate) -> None:
    tiny.__dict__.pop("sha256", None)
    clean = tiny.sha256
    tiny.__dict__.pop("sha256", None)
    (protected,) = protect([picture()], WHOLE, surrogate=tiny)
    assert protected.card["model"]["sha256"] == clean


def test_a_card_is_json_even_when_nothing_changed(tmp_path: Path, tiny: Surrogate) -> None:
    (protected,) = protect([picture()], Nothing(), surrogate=tiny)
    protected.save(tmp_path / "out.png")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    card = json.loads((tmp_path / "out.png.json").read_text(), parse_constant=refuse)
    assert card["fidelity"]["psnr"] is None
    assert card["budget"]["measured"] == 0
    assert card["recipe"]["name"] == "Nothing"


def test_progress_reaches_its_total(tiny: Surrogate) -> None:
    calls: list[tuple[str, int, int]] = []
    (protected,) = protect([picture()], WHOLE, surrogate=tiny, progress=lambda *call: calls.append(call))
    totals = {total for _, _, total in calls}
    assert [done for _, done, _ in calls] == list(range(1, totals.pop() + 1))
    assert not totals
    assert sum(map(len, protected.losses.values())) == len(calls)


@pytest.mark.parametrize("side", [None, 128])
def test_side_is_what_the_model_sees(tiny: Surrogate, side: int | None) -> None:
    (protected,) = protect([picture(height=64, width=256)], RandomSign(), surrogate=tiny, side=side)
    assert protected.card["picture"]["seen_by_the_model"] == ([128, 64] if side is None else [256, 64])


def test_identical_pictures_have_no_effect(tiny: Surrogate, x: torch.Tensor) -> None:
    same = effect(tiny, x[:1], x[:1].clone(), seed=0)
    assert same["prompt"] == HELD_OUT_PROMPT
    assert same["denoising_loss_ratio"] == 1
    assert same["attention_mass_moved"] == 0
    assert same["begin_token_share_before"] == same["begin_token_share_after"]


def test_effect_is_symmetric_and_seeded(tiny: Surrogate, x: torch.Tensor) -> None:
    there, back = effect(tiny, x[:1], x[1:], seed=0), effect(tiny, x[1:], x[:1], seed=0)
    assert there["denoising_loss_before"] == back["denoising_loss_after"]
    assert there["denoising_loss_ratio"] == pytest.approx(1 / back["denoising_loss_ratio"])
    assert there["denoising_loss_ratio"] != 1
    assert 0 < there["attention_mass_moved"] == back["attention_mass_moved"] < 1
    assert 0 < there["begin_token_share_before"] < 1
    assert effect(tiny, x[:1], x[1:], seed=0) == there
    assert effect(tiny, x[:1], x[1:], seed=1) != there


def broken(protected: Protected, levels: int) -> Protected:
    """The same with one channel of one pixel `levels` away from the original."""
    pixels = protected.original.pixels.copy()
    pixels[5, 5, 1] = pixels[5, 5, 1] - levels if pixels[5, 5, 1] > 127 else pixels[5, 5, 1] + levels
    return replace(protected, picture=protected.picture.with_pixels(pixels))


def test_a_file_beyond_the_budget_is_refused_and_removed(tmp_path: Path, tiny: Surrogate) -> None:
    (protected,) = protect([picture()], RandomSign(8), surrogate=tiny)
    assert broken(protected, 8).save(tmp_path / "edge.png")["budget"]["measured"] == 8
    with pytest.raises(RuntimeError, match=r"within 8/255 of the original, got 9/255"):
        broken(protected, 9).save(tmp_path / "out.png")
    assert {path.name for path in tmp_path.iterdir()} == {"edge.png", "edge.png.json"}


@pytest.mark.parametrize("taken", ["out.png", "out.png.json"])
def test_save_never_overwrites(tmp_path: Path, tiny: Surrogate, taken: str) -> None:
    (protected,) = protect([picture()], RandomSign(), surrogate=tiny)
    (tmp_path / taken).write_text("mine")
    with pytest.raises(PictureError, match="existing"):
        protected.save(tmp_path / "out.png")
    assert [path.name for path in tmp_path.iterdir()] == [taken]
    assert (tmp_path / taken).read_text() == "mine"
    protected.save(tmp_path / "out.png", overwrite=True)
    assert json.loads((tmp_path / "out.png.json").read_text())["file"] == "out.png"


def test_no_picture_without_its_card(tmp_path: Path, tiny: Surrogate) -> None:
    (protected,) = protect([picture()], RandomSign(), surrogate=tiny)
    (tmp_path / "out.png.json").mkdir()
    with pytest.raises(PictureError, match="expected a file's name, got a directory's"):
        protected.save(tmp_path / "out.png", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out.png.json"]


@pytest.mark.parametrize("budget", [0, 0.5, 64.5, -1, math.nan])
def test_impossible_budgets(tiny: Surrogate, budget: float) -> None:
    with pytest.raises(ValueError, match="expected a budget from 1 to 64"):
        protect([picture()], RandomSign(budget), surrogate=tiny)


def test_unknown_recipe(tiny: Surrogate) -> None:
    with pytest.raises(ValueError, match=r"expected a recipe of anti-diffusion, .* got 'magic'"):
        protect([picture()], "magic", surrogate=tiny)


def test_one_picture_is_not_a_list(tiny: Surrogate) -> None:
    with pytest.raises(ValueError, match="expected a list"):
        protect("photo.jpg", RandomSign(), surrogate=tiny)


@pytest.mark.parametrize(("height", "width"), [(64, 2000), (2000, 64)])
def test_panoramas(tmp_path: Path, tiny: Surrogate, height: int, width: int) -> None:
    card = protect([picture(height=height, width=width)], CHEAP, surrogate=tiny)[0].save(tmp_path / "out.png")
    assert decoded(tmp_path / "out.png").shape == (height, width, 3)
    assert 0 < card["budget"]["measured"] <= 8


@pytest.mark.slow
def test_twelve_megapixels(tmp_path: Path, tiny: Surrogate) -> None:
    y, x = np.mgrid[:3000, :4000]
    pixels = np.stack([x // 16, y // 12, (x + y) // 28], -1).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    (tmp_path / "in.jpg").write_bytes(buffer.getvalue())
    (protected,) = protect([tmp_path / "in.jpg"], replace(CHEAP, step_size=8), surrogate=tiny)
    card = protected.save(tmp_path / "out.png")
    gap = np.abs(decoded(tmp_path / "out.png") - decoded(tmp_path / "in.jpg")).max()
    assert card["budget"]["measured"] == gap == 8


def test_latent_spaces_suffice_for_some_recipes_only(tmp_path: Path) -> None:
    spaces = load_latents(str(write_spaces(tmp_path / "spaces", {"a": 4, "b": 16})), device=torch.device("cpu"))
    picture = Picture(draw())
    (protected,) = protect([picture], Latents(steps=8), surrogate=spaces, side=64, low_memory=True)
    card = protected.save(tmp_path / "b.png")
    assert 0 < card["budget"]["measured"] <= 8
    moved, noise = card["effect"]["latent_shift"], card["effect"]["latent_shift_of_random_signs"]
    assert moved.keys() == noise.keys() == {"a", "b"}
    assert all(moved[name] > noise[name] > 0 for name in moved)
    with pytest.raises(ValueError, match=r"a whole model for the recipe aspl, .* a recipe of random-sign, latents"):
        protect([picture], "aspl", surrogate=spaces)


def test_visibility_is_of_the_middle() -> None:
    x = torch.arange(1200.0).expand(1, 3, 50, 1200)
    assert middle(x)[0, 0, 0].tolist() == list(range(88, 1112))
    assert middle(x).shape == (1, 3, 50, 1024)
