import pytest
import torch
import torch.nn.functional as F
from conftest import ARCHITECTURES, Checkpoint, build_pipeline
from torch import Generator, Tensor

from antidiffusion.models.base import Embedding, Surrogate

WINDOW = 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def width(surrogate: Surrogate) -> int:
    return surrogate.denoiser.config.cross_attention_dim


def test_what_a_unet_is(surrogate: Surrogate) -> None:
    assert (surrogate.joint, surrogate.guidance, surrogate.steps, surrogate.part) == (False, 7.5, 50, "unet")
    assert surrogate.positions(64, 128) == 8 * 16
    assert [tuple(feature.weight.shape[:1]) for feature in surrogate.features()] == [(32,)] * 3
    parts = ["unet", "text_encoder", "text_encoder_2"][: 1 + len(surrogate.text_encoders)]
    assert list(surrogate.tunable(texts=True)) == parts and list(surrogate.tunable()) == ["unet"]
    components = surrogate.pipeline().components
    assert all(components[name] is module for name, (module, _) in surrogate.tunable(texts=True).items())


def test_both_layouts_hold_the_same_model(checkpoint: Checkpoint, surrogate: Surrogate) -> None:
    single = Surrogate.from_pretrained(str(checkpoint.file), config=str(checkpoint.folder))
    assert single.sha256 == surrogate.sha256
    assert single.size == surrogate.size == 64 and single.schedule.prediction == surrogate.schedule.prediction
    z, t = normal(2, 4, 8, 8), torch.tensor([3, 800])
    answers = [model.predict(z, t, model.embed(["a photo of a person"])) for model in (surrogate, single)]
    torch.testing.assert_close(*answers, rtol=0, atol=1e-5)  # the weights' place in memory moves the last bits


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
def test_shapes(surrogate: Surrogate, generator: Generator, height: int, width: int) -> None:
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


def test_the_mini_model_gives_a_picture_back(mini: Surrogate, pixels, generator: Generator) -> None:
    x = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    x = F.interpolate(F.avg_pool2d(x, 8), (128, 192), mode="bilinear")  # without its texture
    error = (mini.decode(mini.encode(x, generator)) - x).square().mean()
    assert error < x.var() / 2
    assert mini.size == 128 and mini.multiple == 32


def test_a_tuned_embedding_reaches_the_answer(surrogate: Surrogate) -> None:
    embedding = surrogate.embed([""])
    tokens = embedding.tokens.requires_grad_()
    answer = surrogate.predict(normal(2, 4, 8, 8), torch.tensor([3, 800]), Embedding(tokens, embedding.pooled))
    (slope,) = torch.autograd.grad(answer.square().sum(), tokens)
    assert slope.shape == (1, WINDOW, width(surrogate)) and slope.norm() > 0
