"""The trainer of the embedded model, every stage for a step or two at toy size, on pictures drawn here."""

import io
import itertools
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from antidiffusion import Surrogate
from train_mini import results
from train_mini.__main__ import parser, settings_of
from train_mini.data import CHUNK, Store, create, draw, draw_all, missing
from train_mini.degrade import Degrade, attack
from train_mini.encoder import train_encoder
from train_mini.everything import END, SHARES, allowance, everything
from train_mini.loop import DECAY, Average, Budget, DivergedError, Machine, Training, falling, load_weights, run
from train_mini.measure import measure
from train_mini.package import load_vae, package
from train_mini.pictures import dead_leaves, letters
from train_mini.pools import Pool
from train_mini.results import follow, publish, restore
from train_mini.settings import DataSettings, Settings, UnetSettings, shared, tiny
from train_mini.unet import tokenise

CPU = Machine(torch.device("cpu"))
STAGES = ("encoder", "decoder", "mini", "second")
CAPTIONS = ("a portrait of a woman with long red hair, on a blue background", "a bald man wearing glasses")


@pytest.fixture(scope="module")
def settings() -> Settings:
    whole, words = tiny(), {"mini": 240, "second": 220}
    models = {name: replace(model, batch=4, vocabulary=words[name]) for name, model in whole.models.items()}
    pictures = DataSettings(held=8, portraits=16, textures=16, text=8)
    batch = {"portraits": 2, "textures": 1, "text": 1}
    encoder, decoder = replace(whole.encoder, batch=batch), replace(whole.decoder, batch=batch)
    return replace(whole, data=pictures, channels=(8, 8, 16, 16), encoder=encoder, decoder=decoder, models=models)


@pytest.fixture(scope="module")
def data(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pictures of a toy run; leaves stand in for portraits, which need assets."""
    folder = tmp_path_factory.mktemp("data")
    create(folder, settings.data)
    for kind, count in settings.data.counts().items():
        store = Store(folder, kind, "r+")
        for index in range(count):
            store.pictures[index] = letters(index) if kind == "text" else dead_leaves(index + 1000 * (kind == "held"))
            store.captions[index] = CAPTIONS[index % 2].encode() if kind in ("held", "portraits") else b""
        store.done[:] = 1
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        blocks = {"num_encoder_blocks": (1, 1, 1, 1), "num_decoder_blocks": (1, 1, 1, 1)}
        widths = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
        AutoencoderTiny(**widths, **blocks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole_run(
    settings: Settings, data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A whole run in six seconds of training; it draws nothing, as everything is there."""
    folder = tmp_path_factory.mktemp("run")
    failed = everything(settings, folder, data, teacher, CPU, 0.1, lambda *stage: [sys.executable, "-c", ""])
    assert not failed
    return folder


def prepare(stage: str, settings: Settings, data: Path, teacher: Path, folder: Path) -> Training:
    """Build a stage; those after the encoder get the weights of one that was not trained."""
    from train_mini.decoder import train_decoder
    from train_mini.unet import train_unet

    if stage == "encoder":
        return train_encoder(settings, data, teacher, CPU)
    if not (folder / "encoder.safetensors").exists():
        run(train_encoder(settings, data, teacher, CPU), folder, CPU, Budget(steps=1))
    if stage == "decoder":
        return train_decoder(settings, data, folder, CPU)
    return train_unet(settings, stage, data, folder, CPU)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_lowers_the_loss(stage: str, settings: Settings, data: Path, teacher: Path, tmp_path: Path) -> None:
    training = prepare(stage, settings, data, teacher, tmp_path)
    for optimizer in training.optimizers.values():
        optimizer.param_groups[0]["lr"].fill_(1e-3)
    state, losses = training.generator.get_state(), []
    for _ in range(3):
        training.generator.set_state(state)  # the same pictures, the same noise
        losses.append(training.step()["loss"].item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("stage", STAGES[:3])
def test_an_interrupted_run_ends_where_a_whole_one_does(
    stage: str, settings: Settings, data: Path, teacher: Path, tmp_path: Path
) -> None:
    weights = []
    for stop in (None, 2):
        folder = tmp_path / str(stop)
        if stop and stage == "mini":  # the library that learns words decides by chance between pairs as frequent
            shutil.copytree(tmp_path / "None" / "mini-tokenizer", folder / "mini-tokenizer")
        training = prepare(stage, settings, data, teacher, folder)
        if stop:
            calls, step = itertools.count(), training.step

            def dying(step=step, calls=calls):
                if next(calls) == 2:
                    raise KeyboardInterrupt
                return step()

            with pytest.raises(KeyboardInterrupt):
                run(replace(training, step=dying), folder, CPU, Budget(steps=3), every=0)
            training = prepare(stage, settings, data, teacher, folder)
        assert run(training, folder, CPU, Budget(steps=3), every=0) == 3
        weights.append(list(training.model.parameters()) + training.average.value)
        rows = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
        assert rows[-1]["steps"] == 3
        assert math.isfinite(rows[-1]["loss"])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_weights_alone_start_a_run(settings: Settings, data: Path, teacher: Path, tmp_path: Path) -> None:
    first = prepare("encoder", settings, data, teacher, tmp_path)
    run(first, tmp_path, CPU, Budget(steps=2))
    (tmp_path / "encoder.pt").unlink()
    second = prepare("encoder", settings, data, teacher, tmp_path)
    assert run(second, tmp_path, CPU, Budget(steps=0)) == 0
    for name, value in load_file(tmp_path / "encoder.safetensors").items():
        assert torch.equal(second.model.get_parameter(name), value.float())
    with pytest.raises(FileNotFoundError, match="run stage decoder first"):
        load_weights(tmp_path / "decoder.safetensors", first.model)
    wide = prepare("encoder", replace(settings, channels=(8, 8, 16)), data, teacher, tmp_path / "wide")
    with pytest.raises(ValueError, match="use one setting"):
        load_weights(tmp_path / "encoder.safetensors", wide.model)


class Toy(torch.nn.Module):
    """A weight whose steps add one; `bad` are the calls whose loss is not finite."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.bad, self.calls, self.rates = bad, 0, []

    def prepared(self) -> Training:
        from train_mini.loop import adam

        optimizer = adam(self, (0.9, 0.99))
        average = Average(self)

        def step() -> dict[str, torch.Tensor]:
            self.calls += 1
            self.rates.append(optimizer.param_groups[0]["lr"].item())
            with torch.no_grad():
                self.weight += math.nan if self.calls in self.bad else 1
            average.update()
            return {"loss": self.weight.detach()[0]}

        parts = {"optimizers": {"adam": optimizer}, "rates": {"adam": 1.0}, "average": average}
        places = {"generator": torch.Generator(), "progress": torch.zeros(())}
        return Training(name="toy", model=self, step=step, warmup=1, samples=1, **parts, **places)


def test_nan_goes_back_to_the_checkpoint_at_half_the_rate(tmp_path: Path) -> None:
    toy = Toy(bad=(4,))
    assert run(toy.prepared(), tmp_path, CPU, Budget(steps=6), every=0) == 6
    assert toy.weight.item() == 6
    # The fourth call is step 4, which is taken again: both at progress 3/6.
    assert toy.rates[4] == pytest.approx(toy.rates[3] / 2)
    assert "back to step 3" in (tmp_path / "toy.jsonl").read_text()
    with pytest.raises(DivergedError, match="four tries"):
        run(Toy(bad=tuple(range(1, 100))).prepared(), tmp_path / "always", CPU, Budget(steps=6), every=0)


def test_the_clock_stops_a_stage_and_counts_over_all_its_runs(tmp_path: Path) -> None:
    toy = Toy()
    ticking = itertools.count(100.0)
    assert run(toy.prepared(), tmp_path, CPU, Budget(seconds=10), clock=lambda: next(ticking)) == 10
    assert run(Toy().prepared(), tmp_path, CPU, Budget(seconds=10), clock=lambda: next(ticking)) == 10
    longer = Toy()
    assert run(longer.prepared(), tmp_path, CPU, Budget(seconds=15), clock=lambda: next(ticking)) == 15
    assert longer.calls == 5


def test_the_rate_warms_up_holds_and_falls() -> None:
    assert falling(0.0, 0, 100) == pytest.approx(0.01)
    assert falling(0.3, 500, 100) == 1
    late = [falling(progress, 500, 100) for progress in (0.4, 0.6, 0.8, 1.0)]
    assert late == sorted(late, reverse=True)
    assert late[-1] == pytest.approx(0.003)


def test_the_average_warms_up() -> None:
    module = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    average, expected = Average(module), module.weight.item()
    for n in range(30):
        module.weight.fill_(n)
        average.update()
        decay = min(DECAY, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
    assert average.value[0].item() == pytest.approx(expected, rel=1e-5)
    average.updates.fill_(1e6)
    before = average.value[0].item()
    average.update()
    assert average.value[0].item() - before == pytest.approx((1 - DECAY) * (29 - before), rel=1e-2)


def test_the_stages_share_the_time() -> None:
    elapsed = 30.0
    for stage in SHARES:
        seconds = allowance(stage, 750, elapsed, 0)
        assert seconds == pytest.approx(750 * SHARES[stage])
        # A stage that was killed half way gets the same in all.
        assert allowance(stage, 750, elapsed + seconds / 2, seconds / 2) == pytest.approx(seconds)
        elapsed += seconds
    assert elapsed <= (1 - END) * 750 + 1e-6
    late = {stage: allowance(stage, 750, 400, 0) for stage in SHARES}
    assert late["encoder"] / SHARES["encoder"] < 0.5 * 750
    assert allowance("second", 750, 2000, 0) == 0


def test_pictures_that_are_still_drawn(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="stage data"):
        Store(tmp_path, "textures")
    create(tmp_path, settings.data)
    pool = Pool(tmp_path, "textures", torch.device("cpu"))
    draw(tmp_path, tmp_path, "textures", 1)
    assert pool.count == 0
    pool.refresh()
    assert pool.count == CHUNK
    assert Store(tmp_path, "textures").rows().tolist() == list(range(CHUNK, 2 * CHUNK))
    drawn = pool.draw(60, torch.Generator().manual_seed(0))
    assert (drawn.min(), drawn.max()) > (-1.01, -1.01)
    known = [torch.from_numpy(dead_leaves(i)).permute(2, 0, 1) / 127.5 - 1 for i in range(CHUNK, 2 * CHUNK)]
    seen = {i for x in drawn for i, y in enumerate(known) if torch.equal(x, y) or torch.equal(x, y.flip(-1))}
    assert seen == set(range(CHUNK))
    draw(tmp_path, tmp_path, "textures", 0)
    pool.refresh()
    assert pool.count == 2 * CHUNK
    with pytest.raises(ValueError, match="another folder"):
        create(tmp_path, replace(settings.data, textures=17))


def test_held_out_people_are_drawn_first_and_all_kinds_side_by_side(tmp_path: Path) -> None:
    many = DataSettings(held=16, portraits=80, textures=40, text=8)
    create(tmp_path, many)
    draw(tmp_path, tmp_path, "text", 0)
    order = missing(tmp_path, many)
    assert order[:2] == [("held", 0), ("held", 1)]
    assert len(order) == 2 + 10 + 5
    kinds = [kind for kind, _ in order[2:]]
    assert [kinds[:3].count("portraits"), kinds[:6].count("portraits"), kinds[:9].count("portraits")] == [2, 4, 6]
    with pytest.raises(FileNotFoundError, match="python -m portraits assets"):
        draw_all(tmp_path / "assets", tmp_path, many, 1, print)


def test_leaves_have_a_power_law_and_letters_differ() -> None:
    pictures = np.stack([dead_leaves(index) for index in range(12)]).astype(float).mean(-1)
    power = np.abs(np.fft.fft2(pictures - pictures.mean((1, 2), keepdims=True))) ** 2
    radius = np.hypot(*np.meshgrid(*[np.fft.fftfreq(128) * 128] * 2))
    bands = [power[:, (radius >= low) & (radius < 2 * low)].mean() for low in (2, 4, 8, 16, 32)]
    slopes = np.diff(np.log2(bands))
    assert ((slopes < -0.7) & (slopes > -4)).all()  # photos: about -2
    assert not np.array_equal(letters(0), letters(1))
    assert np.array_equal(letters(1), letters(1))


def test_jpeg_is_near_that_of_a_library() -> None:
    pixels = np.stack([dead_leaves(index) for index in range(2)])
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    degrade = Degrade((0.02, 0.1))
    degrade.uniform = lambda x, *_: torch.full((len(x), 1, 1, 1), 50.0)
    ours = degrade.jpeg(x, torch.Generator()).clamp(-1, 1)
    theirs = []
    for picture in pixels:
        file = io.BytesIO()
        Image.fromarray(picture).save(file, "JPEG", quality=50, subsampling=2)
        theirs.append(np.asarray(Image.open(file)))
    theirs = torch.from_numpy(np.stack(theirs)).permute(0, 3, 1, 2) / 127.5 - 1
    assert (ours - theirs).square().mean() < 0.15 * (x - theirs).square().mean()


def test_degrade_changes_seven_of_eight() -> None:
    x = torch.from_numpy(np.stack([dead_leaves(index) for index in range(16)])).permute(0, 3, 1, 2) / 127.5 - 1
    y = Degrade((0.02, 0.1))(x, torch.Generator().manual_seed(0))
    order = [index for way in range(8) for index in range(16)[way::8]]
    change = (y - x[order]).abs().amax((1, 2, 3))
    assert y.abs().max() <= 1
    assert (change[:2] == 0).all()
    assert (change[2:] > 0.01).all()


def test_attacks_stay_in_the_ball_and_climb(generator: torch.Generator) -> None:
    x = torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1
    direction = torch.randn(x.shape, generator=generator)
    radius = torch.tensor([0.05, 0.1]).view(2, 1, 1, 1)
    gains = []
    for steps in (0, 4):
        y = attack(lambda y: (direction * y).sum(), x, radius, steps, generator)
        assert ((y - x).abs() <= radius + 1e-6).all()
        assert y.abs().max() <= 1
        gains.append((direction * (y - x)).sum().item())
    assert gains[1] > abs(gains[0]) + 1


def test_a_whole_run_measures_itself(whole_run: Path, settings: Settings) -> None:
    result = json.loads((whole_run / "measure.json").read_text())
    assert result["models"] == ["mini", "second"]
    for kind in ("portraits", "textures", "text"):
        assert result["fidelity"][kind]["r2"] <= 1
        for radius, row in result["sensitivity"][kind].items():
            assert int(radius) in settings.measure.radii
            assert row["teacher"]["on_teacher"] > row["random"]["on_teacher"] > 0
            assert row["carried_to_teacher"] == row["student"]["on_teacher"] / row["teacher"]["on_teacher"]
    assert result["mini"]["samples"] == settings.measure.samples
    assert 0 <= result["second"]["attributes_all"] <= 1
    assert Image.open(whole_run / "mini.png").size == (128 * settings.measure.samples, 128)
    assert (whole_run / results.FINISHED).exists()


@pytest.mark.parametrize("name", ["mini", "second"])
def test_the_package_loads_everywhere(name: str, whole_run: Path, settings: Settings) -> None:
    folder = whole_run / "models" / name
    own: UnetSettings = settings.models[name]
    surrogate = Surrogate.from_pretrained(str(folder))
    assert (surrogate.size, surrogate.learning_rate) == (128, 5e-5)
    assert surrogate.schedule.prediction == own.prediction
    keys = load_file(folder / "text_encoder" / "model.safetensors")
    assert all(key.startswith("text_model.") for key in keys)  # what transformers 4.57 asks for
    assert {value.dtype for value in keys.values()} == {torch.float16}
    trained = load_file(whole_run / f"{name}.safetensors")
    embedding = "embeddings.token_embedding.weight"
    assert torch.equal(keys[f"text_model.{embedding}"], next(v for k, v in trained.items() if k.endswith(embedding)))
    prompt = {"prompt": CAPTIONS[0], "num_inference_steps": 2, "output_type": "np"}
    for options in ({}, {"torch_dtype": torch.float16}):
        pipeline = StableDiffusionPipeline.from_pretrained(folder, **options)
        pipeline.set_progress_bar_config(disable=True)
        dtypes = {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype}
        assert dtypes == {options.get("torch_dtype", torch.float32)}
        assert np.isfinite(pipeline(**prompt).images).all()


def test_the_package_in_float32(whole_run: Path, settings: Settings, tmp_path: Path) -> None:
    package(settings, "mini", whole_run, tmp_path / "model", torch.float32)
    weights = load_file(tmp_path / "model" / "vae" / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    with pytest.raises(FileNotFoundError, match="stage package first"):
        measure(settings.measure, tmp_path, ["second"], tmp_path, tmp_path, CPU, tmp_path / "measure.json")


def test_the_two_models_have_different_words(whole_run: Path, settings: Settings) -> None:
    first, second = (
        Surrogate.from_pretrained(str(whole_run / "models" / name)).tokenizers[0] for name in settings.models
    )
    assert len(first) != len(second) or first.get_vocab() != second.get_vocab()
    assert tokenise(first, [CAPTIONS[0]]).shape == (1, 48)


def test_results_come_back_whole(
    whole_run: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PIECE", 2**20)
    assert follow(whole_run, tmp_path / "out", 60, 1, lambda: True)
    assert len(list((tmp_path / "out").glob("weights.tar.*"))) > 1
    restore(tmp_path / "out", tmp_path / "run")
    package(settings, "second", tmp_path / "run", tmp_path / "model", torch.float16)
    old, new = (
        Surrogate.from_pretrained(str(folder)) for folder in (whole_run / "models" / "second", tmp_path / "model")
    )
    assert old.sha256 == new.sha256
    with pytest.raises(FileNotFoundError, match="follow"):
        restore(tmp_path, tmp_path / "run")


def test_a_dead_run_is_not_finished(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert not follow(tmp_path / "run", tmp_path / "out", 60, 1, lambda: False)
    publish(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == b""


def test_a_failed_stage_is_tried_elsewhere_and_the_others_go_on(
    settings: Settings, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    def command(stage: str, minutes: float) -> list[str]:
        ran.append(stage)
        return [sys.executable, "-c", f"import sys; sys.exit({int(stage != 'data')})"]

    failed = everything(settings, tmp_path, data, tmp_path / "no teacher", CPU, 0.05, command)
    assert ran[0] == "data"
    assert set(SHARES) | {"measure"} <= set(ran)
    assert failed == [*SHARES, "package mini", "package second", "measure"]
    assert "expected an AutoencoderTiny" in (tmp_path / "all.jsonl").read_text()


def test_the_command_line_changes_one_model_or_stage() -> None:
    whole = Settings()
    words = ["unet", "--out", "x", "--name", "second", "--channels", "32,64", "--prediction", "epsilon", "--seed", "7"]
    changed = settings_of(parser().parse_args(words))
    assert changed.models["mini"] == whole.models["mini"]
    assert changed.models["second"].channels == (32, 64)
    assert (changed.models["second"].prediction, changed.models["second"].seed) == ("epsilon", 7)
    small = settings_of(parser().parse_args(["encoder", "--out", "x", "--batch", "16"])).encoder
    assert sum(small.batch.values()) == 16
    assert small.attacked == 6  # 18 of 40, and a multiple of three
    assert shared({"a": 9, "b": 1}, 2) == {"a": 1, "b": 1}
    with pytest.raises(ValueError, match="one of each kind, got 1"):
        shared({"a": 9, "b": 1}, 1)
    with pytest.raises(SystemExit, match="expected a model of mini, second"):
        settings_of(parser().parse_args(["unet", "--out", "x", "--name", "third"]))


def test_the_autoencoder_is_in_stable_diffusions_scale(whole_run: Path, settings: Settings) -> None:
    vae = load_vae(settings, whole_run)
    assert vae.config.scaling_factor == 0.18215
    assert not vae.config.force_upcast


def test_a_missing_option_is_a_sentence(tmp_path: Path) -> None:
    tools = Path(__file__).parents[2] / "tools"
    words = [sys.executable, "-m", "train_mini", "data", "--out", str(tmp_path)]
    done = subprocess.run(words, cwd=tools, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "expected --assets with stage data, got none"
