import pytest
import torch
from conftest import write_joint
from diffusers import FluxPipeline

from antidiffusion.models.base import Surrogate
from antidiffusion.models.flux import Flux, FluxSchnell, build, packed, picture_ids, unpacked

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return Surrogate.from_pretrained(str(write_joint("flux-dev", tmp_path_factory.mktemp("dev"))))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return Surrogate.from_pretrained(str(write_joint("flux-schnell", tmp_path_factory.mktemp("schnell"))))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_packing_is_diffusers_and_comes_back() -> None:
    z = normal(2, 16, 6, 8)
    assert torch.equal(packed(z), FluxPipeline._pack_latents(z, 2, 16, 6, 8))
    assert torch.equal(unpacked(packed(z), 6, 8), z)
    ids = FluxPipeline._prepare_latent_image_ids(1, 3, 4, "cpu", torch.float32)
    assert torch.equal(picture_ids(3, 4, torch.device("cpu")), ids)


def test_the_text_stands_before_the_picture(dev: Surrogate) -> None:
    for layer in dev.cross_layers():
        assert dev.places(layer, 512, 528) == (slice(512, 528), slice(0, 512), slice(512, 528))
    assert any(layer.startswith("single_") for layer in dev.cross_layers())
    assert dev.map_layers() == ["transformer_blocks.0.attn.processor"]


def test_schnell_is_told_by_its_configurations(dev: Surrogate, schnell: Surrogate) -> None:
    assert (type(dev), dev.guidance, dev.steps) == (Flux, 3.5, 28)
    assert (type(schnell), schnell.guidance, schnell.steps) == (FluxSchnell, 1, 4)
    parts = {"vae": schnell.vae, "denoiser": schnell.denoiser, "text_encoders": [], "tokenizers": [], "size": 64}
    undistilled = build({"use_dynamic_shifting": True}, name="made from schnell", **parts)
    assert type(undistilled) is Flux


def test_a_distilled_model_is_told_its_guidance_and_asked_once(dev: Surrogate, schnell: Surrogate) -> None:
    z, t, asked = normal(2, 16, 8, 8), torch.tensor(0.5), []
    for model, guidance, sizes in ((dev, 7.0, [2]), (dev, torch.tensor([1.0, 7.0]), [2]), (schnell, 2.0, [4])):
        hook = model.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: asked.append(len(kwargs["hidden_states"])), with_kwargs=True
        )
        model.guided(model.embed([PROMPT]), guidance, 2)(z, t)
        hook.remove()
        assert asked == sizes
        asked.clear()
    embedding = dev.embed([PROMPT])
    one, seven = (dev.guided(embedding, guidance, 2)(z, t) for guidance in (1.0, 7.0))
    each = dev.guided(embedding, torch.tensor([1.0, 7.0]), 2)(z, t)
    torch.testing.assert_close(each, torch.stack([one[0], seven[1]]))
    assert (one - seven).abs().max() > 1e-3
    torch.testing.assert_close(dev.predict(z, t.expand(2), embedding), dev.guided(embedding, 3.5, 2)(z, t))


def test_what_is_not_told_its_guidance_is_led_away_from_the_empty_prompt(schnell: Surrogate) -> None:
    z, t, embedding = normal(1, 16, 8, 8), torch.tensor(0.5), schnell.embed([PROMPT])
    told, empty = (schnell.predict(z, t[None], e) for e in (embedding, schnell.unconditional()))
    torch.testing.assert_close(schnell.guided(embedding, 3.0, 1)(z, t), empty + 3 * (told - empty))
    assert embedding.guidance is None
