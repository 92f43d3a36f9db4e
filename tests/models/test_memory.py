from dataclasses import replace

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from antidiffusion.models.base import Surrogate
from antidiffusion.models.memory import checkpointed, low_memory, offload, recomputed, saved
from antidiffusion.recipes.anti_diffusion import DenoisingSemantic


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_saved_tensors_come_back_whatever_became_of_them() -> None:
    tensors = [normal(3, 2), normal(4).bfloat16()]
    copies = [tensor.clone() for tensor in tensors]
    with saved(tensors) as load:
        tensors[0].zero_()
        assert all(torch.equal(*pair) for pair in zip(load(), copies, strict=True))
        assert all(torch.equal(*pair) for pair in zip(load(), copies, strict=True))


def test_recomputed_layers_keep_their_input_only() -> None:
    layer, x = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.SiLU(), torch.nn.Linear(64, 1)), normal(5, 4)

    def slope() -> tuple[Tensor, int]:
        kept: list[int] = []
        leaf = x.clone().requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
            value = layer(leaf).sum()
        return torch.autograd.grad(value, leaf)[0], sum(kept)

    layer.requires_grad_(False)
    expected, everything = slope()
    with recomputed([layer]):
        found, less = slope()
    assert torch.equal(found, expected) and less <= x.numel() < everything
    assert "forward" not in vars(layer)


def test_a_set_flag_stays_set(tiny: Surrogate) -> None:
    flags = []
    for wanted in (False, True):
        with checkpointed(tiny.denoiser, wanted):
            flags.append(tiny.denoiser.is_gradient_checkpointing)
            with checkpointed(tiny.denoiser, True):
                flags.append(tiny.denoiser.is_gradient_checkpointing)
            flags.append(tiny.denoiser.is_gradient_checkpointing)
    assert flags == [False, True, False, True, True, True] and not tiny.denoiser.is_gradient_checkpointing


@pytest.mark.parametrize("sdl", ["semantic", "divergence"])
def test_low_memory_changes_memory_only(tiny: Surrogate, x: Tensor, sdl: str) -> None:
    def slope() -> tuple[Tensor, int]:
        kept: list[int] = []
        leaf, generator = x.clone().requires_grad_(), torch.Generator().manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
            loss = DenoisingSemantic(tiny, embedding, sdl=sdl, clean=x)(leaf, generator)
        return torch.autograd.grad(loss.sum(), leaf)[0], sum(kept)

    embedding, before = tiny.embed([""]), tiny.sha256
    expected, everything = slope()
    with low_memory(tiny):
        recomputed, less = slope()
        assert sum(p.numel() for p in (*tiny.text_encoders[0].parameters(), *tiny.vae.decoder.parameters())) == 0
        flags = [getattr(module, "gradient_checkpointing", True) for module in tiny.denoiser.modules()]
    assert all(flags)  # recording attention puts them back
    torch.testing.assert_close(recomputed, expected)
    assert less < everything / 2
    with pytest.raises(RuntimeError, match="stop"), low_memory(tiny):
        assert tiny.denoiser.is_gradient_checkpointing
        raise RuntimeError("stop")
    assert not tiny.denoiser.is_gradient_checkpointing
    assert not any("forward" in vars(module) for module in tiny.vae.modules())
    assert replace(tiny).sha256 == before
    assert torch.equal(tiny.embed([""]).tokens, embedding.tokens)


def test_parked_weights_leave_the_memory(tiny: Surrogate) -> None:
    parked = [*tiny.text_encoders[0].parameters(), *tiny.vae.decoder.parameters()]
    storages = [StorageWeakRef(parameter.untyped_storage()) for parameter in parked]
    with low_memory(tiny):
        assert all(storage.expired() for storage in storages)


def test_one_layer_of_the_encoder_is_recomputed_at_a_time(tiny: Surrogate, x: Tensor) -> None:
    events: list[str] = []
    layers = [module for module in tiny.vae.encoder.modules() if isinstance(module, ResnetBlock2D)]
    for layer in layers:
        layer.conv1.register_forward_hook(lambda *_: events.append("computed"))
        layer.conv1.register_full_backward_hook(lambda *_: events.append("differentiated"))
    leaf = x.clone().requires_grad_()
    with low_memory(tiny):
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


def test_offload_moves_a_module_only_while_it_is_called(surrogate: Surrogate, x: Tensor, places) -> None:
    device, called = surrogate.device, set()
    z, t = normal(2, 4, 8, 8), torch.tensor([3, 800])

    def visit(module: torch.nn.Module, inputs: object) -> None:
        called.add(module)
        assert {part for part, place in places.items() if place == device} == {module} & places.keys()

    with torch.no_grad(), offload(surrogate):
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
    with pytest.raises(RuntimeError, match="stop"), offload(surrogate):
        surrogate.embed_with_gradient(["a hat"])
        assert places[encoder] == device
        surrogate.embed(["a hat"])
        assert places[encoder] == torch.device("cpu")
        raise RuntimeError("stop")
    assert set(places.values()) == {device}
