import copy
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from antidiffusion.objectives.semantic import DenoisingSemantic
from conftest import ARCHITECTURES, Checkpoint, build_pipeline
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef

from antidiffusion.models.base import SUPPORTED, Embedding, NoiseSchedule, Surrogate
from antidiffusion.models.kinds import Kind, classify
from antidiffusion.models.weights import Location

WINDOW = 32
ANGLES = torch.linspace(0.01, 1.55, 50)
UNIT = torch.linspace(0.01, 0.99, 50)


def schedule(prediction: str) -> NoiseSchedule:
    if prediction == "flow_prediction":
        return NoiseSchedule(1 - UNIT, UNIT, prediction)
    return NoiseSchedule(ANGLES.cos(), ANGLES.sin(), prediction)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def width(surrogate: Surrogate) -> int:
    return surrogate.denoiser.config.cross_attention_dim


def test_both_layouts_hold_the_same_model(checkpoint: Checkpoint, surrogate: Surrogate) -> None:
    single = Surrogate.from_pretrained(str(checkpoint.file), config=str(checkpoint.folder))
    assert single.sha256 == surrogate.sha256
    assert single.size == surrogate.size == 64 and single.schedule.prediction == surrogate.schedule.prediction
    z, t = normal(2, 4, 8, 8), torch.tensor([3, 800])
    answers = [model.predict(z, t, model.embed(["a photo of a person"])) for model in (surrogate, single)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-5)  # the weights' place in memory moves the last bits


def test_parts_are_loaded_without_garbage_collection(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    collected: list[bool] = []

    def noting(location: Location) -> Kind:
        collected.append(gc.isenabled())
        return classify(location)

    monkeypatch.setattr("antidiffusion.models.loading.classify", noting)
    Surrogate.from_pretrained(str(checkpoint.folder))
    assert collected == [False] and gc.isenabled()


def test_the_folder_holds_the_model_that_was_saved(checkpoint: Checkpoint, surrogate: Surrogate) -> None:
    pipeline = build_pipeline(checkpoint.name)
    assert surrogate.schedule.prediction == ARCHITECTURES[checkpoint.name][2]
    for module, name in zip(surrogate.modules, ("vae", "unet", "text_encoder", "text_encoder_2"), strict=False):
        saved, loaded = getattr(pipeline, name).state_dict(), module.state_dict()
        assert saved.keys() == loaded.keys() and all(torch.equal(saved[key], loaded[key]) for key in saved)
    for model, value in pipeline.components.items():
        if model.startswith("text_encoder"):
            assert any(type(value) is type(module) for module in surrogate.text_encoders)


def test_prompts_are_embedded_as_diffusers_does(checkpoint: Checkpoint, surrogate: Surrogate) -> None:
    prompts = ["a photo of a person", "", "person " * 200]
    ours = surrogate.embed(prompts)
    tokens, _, *rest = build_pipeline(checkpoint.name).encode_prompt(
        prompts, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert ours.tokens.shape == (3, WINDOW, width(surrogate)) and not torch.equal(ours.tokens[0], ours.tokens[1])
    torch.testing.assert_close(ours.tokens, tokens)
    assert (ours.pooled is None) == (checkpoint.name != "sdxl")
    if ours.pooled is not None:
        assert ours.pooled.shape == (3, 64)
        torch.testing.assert_close(ours.pooled, rest[0])
    assert torch.equal(ours[1:2].tokens, ours.tokens[1:2])


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (192, 64)])
def test_shapes(surrogate: Surrogate, generator: torch.Generator, height: int, width: int) -> None:
    assert height % surrogate.multiple == 0 and surrogate.factor == 8
    x = torch.rand(2, 3, height, width, generator=generator)
    z = surrogate.encode(x, generator)
    assert z.shape == (2, 4, height // 8, width // 8)
    decoded = surrogate.decode(z)
    assert decoded.shape == x.shape and decoded.min() >= 0 and decoded.max() <= 1 and not decoded.requires_grad
    answer = surrogate.predict(z, torch.tensor([0, 999]), surrogate.embed([""]))
    assert answer.shape == z.shape and answer.isfinite().all()
    alone = surrogate.predict(z[1:], torch.tensor([999]), surrogate.embed([""]))
    torch.testing.assert_close(answer[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_protection_step(checkpoint: Checkpoint, generator: torch.Generator, dtype: torch.dtype) -> None:
    surrogate = Surrogate.from_pretrained(str(checkpoint.folder), dtype=dtype)
    upcast = dtype == torch.float16 and checkpoint.name == "sdxl"
    assert surrogate.dtype == dtype and {p.dtype for p in surrogate.denoiser.parameters()} == {dtype}
    assert {p.dtype for p in surrogate.vae.parameters()} == {torch.float32 if upcast else dtype}
    assert {p.dtype for encoder in surrogate.text_encoders for p in encoder.parameters()} == {dtype}
    assert not any(p.requires_grad or module.training for module in surrogate.modules for p in module.parameters())
    shape = (1, 3, 64, 64) if dtype == torch.float16 else (2, 3, 64, 128)  # float16 is slow on CPUs
    x = torch.rand(shape, generator=generator).requires_grad_()
    losses = DenoisingSemantic(surrogate, surrogate.embed([""]))(x, generator)
    (slope,) = torch.autograd.grad(losses.sum(), x)
    assert losses.shape == (len(x),) and losses.dtype == torch.float32 and losses.isfinite().all()
    assert slope.isfinite().all() and (slope.flatten(1).norm(dim=1) > 0).all()
    z = surrogate.encode(x.detach(), generator)
    assert z.dtype == surrogate.decode(z).dtype == surrogate.embed(["a"]).tokens.dtype == torch.float32


def test_half_precision_s_gradient_points_the_same_way(checkpoint: Checkpoint, x: torch.Tensor) -> None:
    slopes = []
    for dtype in (torch.float32, torch.bfloat16):
        surrogate = Surrogate.from_pretrained(str(checkpoint.folder), dtype=dtype)
        leaf, generator = x.clone().requires_grad_(), torch.Generator().manual_seed(0)
        loss = DenoisingSemantic(surrogate, surrogate.embed([""]), weight=0)(leaf, generator)
        slopes.append(torch.autograd.grad(loss.sum(), leaf)[0].flatten())
    assert torch.cosine_similarity(*slopes, dim=0) > 0.8


def test_autocast_computes_in_half_precision_with_float32_weights(checkpoint: Checkpoint, x: torch.Tensor) -> None:
    slopes = []
    for autocast in (None, torch.bfloat16):
        surrogate = Surrogate.from_pretrained(str(checkpoint.folder), autocast=autocast)
        seen = set[torch.dtype]()
        for part in (surrogate.vae.encoder.conv_in, surrogate.denoiser.conv_in, surrogate.vae.decoder.conv_in):
            part.register_forward_hook(lambda part, given, answer, seen=seen: seen.add(answer.dtype))
        leaf, generator = x.clone().requires_grad_(), torch.Generator().manual_seed(0)
        loss = DenoisingSemantic(surrogate, surrogate.embed([""]), weight=0)(leaf, generator)
        slopes.append(torch.autograd.grad(loss.sum(), leaf)[0].flatten())
        assert surrogate.decode(surrogate.encode(x, generator)).dtype == loss.dtype == torch.float32
        assert surrogate.dtype == torch.float32 and seen == {autocast or torch.float32}
    assert torch.cosine_similarity(*slopes, dim=0) > 0.8
    assert surrogate.precision == "float32 with autocast to bfloat16"


@pytest.mark.parametrize("prediction", SUPPORTED)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_exact_target_gives_back_latent_and_noise(prediction: str, seed: int) -> None:
    model = schedule(prediction)
    z, n = normal(5, 4, 2, 3, seed=seed).double(), normal(5, 4, 2, 3, seed=seed + 1).double()
    t = torch.randint(50, (5,), generator=torch.Generator().manual_seed(seed))
    z_t, target = model.add_noise(z, n, t), model.target(z, n, t)
    a, b = (table[t].double().view(-1, 1, 1, 1) for table in (model.signal, model.noise))
    torch.testing.assert_close(z_t, a * z + b * n)
    found = {
        "epsilon": lambda: ((z_t - b * target) / a, target),
        "v_prediction": lambda: (a * z_t - b * target, b * z_t + a * target),
        "flow_prediction": lambda: (z_t - b * target, z_t + a * target),
        "sample": lambda: (target, (z_t - a * target) / b),
    }[prediction]()
    torch.testing.assert_close(found, (z, n), rtol=1e-4, atol=1e-4)


def test_an_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a prediction type of epsilon, .*, got 'score'"):
        schedule("score")


def test_the_schedule_is_the_scheduler_s(surrogate: Surrogate) -> None:
    z, n, t = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([0, 400, 999])
    torch.testing.assert_close(surrogate.schedule.add_noise(z, n, t), surrogate.scheduler.add_noise(z, n, t))
    velocity = replace(surrogate.schedule, prediction="v_prediction").target(z, n, t)
    torch.testing.assert_close(velocity, surrogate.scheduler.get_velocity(z, n, t))


@pytest.mark.parametrize("prediction", SUPPORTED)
def test_the_loss_of_an_exact_answer_is_zero(tiny: Surrogate, prediction: str, generator: torch.Generator) -> None:
    exact = copy.copy(tiny)
    exact.schedule = replace(tiny.schedule, prediction=prediction)
    z = normal(2, 4, 8, 8)
    n, t = exact.draw(z, generator)
    asked = []
    exact.predict = lambda z_t, t, embedding: asked.append(z_t) or exact.schedule.target(z, n, t)
    assert torch.equal(exact.denoising_loss(z, n, t, tiny.embed([""])), torch.zeros(2))
    assert torch.equal(asked[0], exact.schedule.add_noise(z, n, t))
    exact.predict = lambda z_t, t, embedding: exact.schedule.target(z, n, t) + torch.tensor([1, 2]).view(2, 1, 1, 1)
    torch.testing.assert_close(exact.denoising_loss(z, n, t, tiny.embed([""])), torch.tensor([1.0, 4.0]))


def test_draws_follow_the_generator(tiny: Surrogate) -> None:
    z = torch.zeros(4000, 1, 1, 1)
    (n, t), again, other = (tiny.draw(z, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(n, again[0]) and torch.equal(t, again[1]) and not torch.equal(t, other[1])
    assert t.dtype == torch.int64 and 0 <= t.min() < 10 and 990 <= t.max() < 1000
    assert abs(n.mean()) < 0.1 and abs(n.std() - 1) < 0.05


def test_latents_are_scaled_posterior_samples(tiny: Surrogate, x: torch.Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        distribution, posterior = tiny.vae.encode(2 * x - 1).latent_dist, tiny.posterior(x)
        z = torch.stack([tiny.encode(x, generator) for _ in range(50)])
    factor = tiny.vae.config.scaling_factor
    torch.testing.assert_close(posterior.mean, factor * distribution.mean)
    torch.testing.assert_close(posterior.std, factor * distribution.std)
    deviations = (z - posterior.mean) / posterior.std
    assert abs(deviations.mean()) < 0.02 and abs(deviations.std() - 1) < 0.02


def test_the_mini_model_gives_a_picture_back(mini: Surrogate, pixels, generator: torch.Generator) -> None:
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(F.avg_pool2d(x, 8), (128, 192), mode="bilinear")  # without its texture
    error = (mini.decode(mini.encode(x, generator)) - x).square().mean()
    assert error < x.var() / 2
    assert mini.size == 128 and mini.multiple == 32


def test_the_hash_tells_models_and_precisions_apart(mini: Surrogate, tiny: Surrogate, sd15: Checkpoint) -> None:
    changed = replace(tiny, denoiser=copy.deepcopy(tiny.denoiser))
    assert changed.sha256 == tiny.sha256
    nudged = replace(tiny, denoiser=copy.deepcopy(tiny.denoiser))
    nudged.denoiser.conv_in.bias[0] += 1e-3
    half = Surrogate.from_pretrained(str(sd15.folder), dtype=torch.bfloat16)
    assert len({mini.sha256, tiny.sha256, nudged.sha256, half.sha256}) == 4


@pytest.mark.parametrize("sdl", ["semantic", "divergence"])
def test_low_memory_changes_memory_only(tiny: Surrogate, x: torch.Tensor, sdl: str) -> None:
    def slope() -> tuple[torch.Tensor, int]:
        kept: list[int] = []
        leaf, generator = x.clone().requires_grad_(), torch.Generator().manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
            loss = DenoisingSemantic(tiny, embedding, sdl=sdl, clean=x)(leaf, generator)
        return torch.autograd.grad(loss.sum(), leaf)[0], sum(kept)

    embedding, before = tiny.embed([""]), tiny.sha256
    expected, everything = slope()
    with tiny.low_memory():
        recomputed, less = slope()
        assert sum(p.numel() for p in (*tiny.text_encoders[0].parameters(), *tiny.vae.decoder.parameters())) == 0
        flags = [getattr(module, "gradient_checkpointing", True) for module in tiny.denoiser.modules()]
    assert all(flags)  # recording attention puts them back
    torch.testing.assert_close(recomputed, expected)
    assert less < everything / 2
    with pytest.raises(RuntimeError, match="stop"), tiny.low_memory():
        assert tiny.denoiser.is_gradient_checkpointing
        raise RuntimeError("stop")
    assert not tiny.denoiser.is_gradient_checkpointing
    assert not any("forward" in vars(module) for module in tiny.vae.modules())
    assert replace(tiny).sha256 == before
    assert torch.equal(tiny.embed([""]).tokens, embedding.tokens)


def test_parked_weights_leave_the_memory(tiny: Surrogate) -> None:
    parked = [*tiny.text_encoders[0].parameters(), *tiny.vae.decoder.parameters()]
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in parked]
    with tiny.low_memory():
        assert all(storage.expired() for storage in storages)


def test_one_layer_of_the_encoder_is_recomputed_at_a_time(tiny: Surrogate, x: torch.Tensor) -> None:
    events: list[str] = []
    layers = [module for module in tiny.vae.encoder.modules() if isinstance(module, ResnetBlock2D)]
    for layer in layers:
        layer.conv1.register_forward_hook(lambda *_: events.append("computed"))
        layer.conv1.register_full_backward_hook(lambda *_: events.append("differentiated"))
    leaf = x.clone().requires_grad_()
    with tiny.low_memory():
        loss = tiny.posterior(leaf).mean.sum()
        events.clear()
        loss.backward()
    assert events == ["computed", "differentiated"] * len(layers)


@pytest.fixture
def places(surrogate: Surrogate, monkeypatch: pytest.MonkeyPatch) -> dict[torch.nn.Module, torch.device]:
    """Where the text encoders and the parts of the autoencoder would be if there were a second device."""
    device = torch.device("cpu", 0)  # tells itself from "cpu", and torch computes on it
    found = dict.fromkeys((*surrogate.text_encoders, *surrogate.vae.children()), device)

    def to(module: torch.nn.Module, place: torch.device | str) -> torch.nn.Module:
        found[module] = torch.device(place)
        return module

    monkeypatch.setattr(Surrogate, "device", property(lambda self: device))
    monkeypatch.setattr(torch.nn.Module, "to", to)
    return found


def test_offload_moves_a_module_only_while_it_is_called(surrogate: Surrogate, x: torch.Tensor, places) -> None:
    device, called = surrogate.device, set()
    z, t = normal(2, 4, 8, 8), torch.tensor([3, 800])

    def visit(module: torch.nn.Module, inputs: object) -> None:
        called.add(module)
        assert {part for part, place in places.items() if place == device} == {module} & places.keys()

    with torch.no_grad(), surrogate.offload():
        hooks = [module.register_forward_pre_hook(visit) for module in (surrogate.denoiser, *places)]
        embedding = surrogate.embed(["a hat"])
        surrogate.decode(surrogate.posterior(x).mean)
        surrogate.predict(z, t, embedding)
        assert set(places.values()) == {torch.device("cpu")}
    assert called == {surrogate.denoiser, *places}
    assert set(places.values()) == {device}
    for hook in hooks:
        hook.remove()
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in places)


def test_an_offloaded_module_stays_for_its_backward_pass(surrogate: Surrogate, places) -> None:
    device, encoder = surrogate.device, surrogate.text_encoders[0]
    with pytest.raises(RuntimeError, match="stop"), surrogate.offload():
        surrogate.embed_with_gradient(["a hat"])
        assert places[encoder] == device
        surrogate.embed(["a hat"])
        assert places[encoder] == torch.device("cpu")
        raise RuntimeError("stop")
    assert set(places.values()) == {device}


def test_a_tuned_embedding_reaches_the_answer(surrogate: Surrogate) -> None:
    embedding = surrogate.embed([""])
    tokens = embedding.tokens.requires_grad_()
    answer = surrogate.predict(normal(2, 4, 8, 8), torch.tensor([3, 800]), Embedding(tokens, embedding.pooled))
    (slope,) = torch.autograd.grad(answer.square().sum(), tokens)
    assert slope.shape == (1, WINDOW, width(surrogate)) and slope.norm() > 0


def test_a_long_prompt_is_cut_with_a_warning_that_names_the_rest(surrogate: Surrogate) -> None:
    room = surrogate.tokenizers[0].model_max_length - 2
    prompt = " ".join(["red"] * room)
    assert len(surrogate.tokenizers[0](prompt).input_ids) == room + 2  # one token a word: as long as fits
    fits = surrogate.embed([prompt])
    with pytest.warns(UserWarning, match=rf"at most {room} tokens, got \d+; cut off: 'green hat'"):
        cut = surrogate.embed([f"{prompt} green hat"])
    assert torch.equal(fits.tokens, cut.tokens)


def test_convolutions_are_channels_last(tiny: Surrogate) -> None:
    for module in (tiny.denoiser, tiny.vae):
        weights = [weight for weight in module.parameters() if weight.ndim == 4]
        assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)
