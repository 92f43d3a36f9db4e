import copy
import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from antidiffusion.models.attention import record_attention
from antidiffusion.models.base import Surrogate
from antidiffusion.models.memory import low_memory
from antidiffusion.models.streaming import Parked, is_parked, is_streamed, streamed
from antidiffusion.models.tuning import constant, denoising, fit, tunable

HOST = pytest.mark.parametrize("host", [False, True], ids=["disk", "host"])
BOTH = pytest.mark.parametrize("joint", ["sd35", "flux-dev"], indirect=True)
ONE = pytest.mark.parametrize("joint", ["flux-dev"], indirect=True)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


@pytest.fixture
def on_host(host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Park in memory, as on an accelerator, or on disk."""
    if host:
        stock = Parked.__init__
        monkeypatch.setattr(Parked, "__init__", lambda self, block, device, folder: stock(self, block, device, None))


def held(joint: Surrogate) -> list[int]:
    """Which blocks have their weights."""
    return [i for i, block in enumerate(joint.blocks) if not any(map(is_parked, block.parameters()))]


@contextmanager
def watched_blocks(joint: Surrogate) -> Iterator[list[list[int]]]:
    """Note at every call of a block which blocks have their weights."""
    seen: list[list[int]] = []
    hooks = [block.register_forward_pre_hook(lambda module, args: seen.append(held(joint))) for block in joint.blocks]
    yield seen
    for hook in hooks:
        hook.remove()


def gradients(joint: Surrogate, x: Tensor) -> list[Tensor]:
    embedding = joint.embed(["a dog"])
    embedding.tokens.requires_grad_()
    leaves = [x.clone().requires_grad_(), embedding.tokens]
    z = joint.posterior(leaves[0]).mean
    loss = joint.denoising_loss(z, normal(*z.shape), torch.tensor([0.3, 0.8]), embedding).sum()
    return list(torch.autograd.grad(loss, leaves))


@BOTH
@HOST
def test_gradients_are_the_same_with_one_block_in_memory(joint: Surrogate, x: Tensor, on_host: None) -> None:
    plain, before = gradients(joint, x), copy.deepcopy(joint.denoiser.state_dict())
    with streamed(joint), watched_blocks(joint) as seen:
        assert held(joint) == [] and is_streamed(joint)
        again = gradients(joint, x)
        assert held(joint) == []
    count = len(joint.blocks)
    assert seen == [[i] for i in [*range(count), *reversed(range(count))]]
    for a, b in zip(plain, again, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6 * a.abs().max().item())
    after = joint.denoiser.state_dict()
    assert not is_streamed(joint) and not joint.denoiser.is_gradient_checkpointing
    assert list(before) == list(after) and all(torch.equal(before[key], after[key]) for key in before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in joint.blocks)


@BOTH
@HOST
def test_answers_without_gradient_hold_one_block_too(joint: Surrogate, on_host: None) -> None:
    z, t, embedding = normal(1, 16, 8, 8), torch.tensor([0.4]), joint.embed(["a dog"])
    with torch.no_grad():
        plain = joint.predict(z, t, embedding)
        with streamed(joint), watched_blocks(joint) as seen:
            again = joint.predict(z, t, embedding)
            assert held(joint) == []
    assert seen == [[i] for i in range(len(joint.blocks))]
    torch.testing.assert_close(plain, again, rtol=0, atol=1e-5)  # the weights' place in memory moves the last bits


@ONE
def test_a_parked_weight_reads_as_nan(joint: Surrogate) -> None:
    with streamed(joint):
        weight = next(joint.blocks[0].parameters())
        assert weight.isnan().all() and weight.untyped_storage().nbytes() == weight.element_size()


def tuned(joint: Surrogate, samples: list[Tensor]) -> tuple[list[float], list[Tensor]]:
    """Three LoRA steps on latents of one or of two sizes."""
    loss = denoising(joint, [constant(z) for z in samples], joint.embed(["a dog"]))
    with tunable(joint, "lora") as (adapters, _):
        options: dict[str, Any] = {"steps": 3, "learning_rate": 1e-2, "generator": Generator().manual_seed(1)}
        losses = list(fit(adapters, loss, **options))
        return losses, [adapter.detach().clone() for adapter in adapters]


@BOTH
@pytest.mark.parametrize("sides", [[8], [8, 6]])
def test_adapters_are_tuned_the_same(joint: Surrogate, sides: list[int]) -> None:
    """Of two sizes, each batch is itself recomputed, and an adapter's gradient is the sum over both."""
    samples = [normal(1, 16, side, side, seed=side) for side in sides]
    losses, adapters = tuned(joint, samples)
    with streamed(joint):
        again, streamed_adapters = tuned(joint, samples)
        assert held(joint) == []
    assert again == pytest.approx(losses, rel=1e-4)
    changed = max(adapter.abs().max().item() for adapter in adapters)
    for a, b in zip(adapters, streamed_adapters, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-2 * changed)
    assert not is_streamed(joint)


@BOTH
def test_recorded_maps_give_the_same_gradient(joint: Surrogate, x: Tensor) -> None:
    """A recorded block runs with its activations kept: its weights stay until the end."""

    def moved() -> Tensor:
        leaf = x.clone().requires_grad_()
        with record_attention(joint, joint.map_layers()) as maps:
            z = joint.posterior(leaf).mean
            joint.predict(z, torch.tensor([0.4, 0.4]), joint.embed(["a dog"]))
        with torch.no_grad():  # another pass between must not take away what the backward pass needs
            joint.predict(z, torch.tensor([0.4, 0.4]), joint.embed(["a cat"]))
        return torch.autograd.grad(maps[0].square().sum(), leaf)[0]

    plain = moved()
    with streamed(joint):
        again = moved()
        assert held(joint) == [0]
        moved()
        assert held(joint) == [0]
    assert plain.any() and torch.allclose(plain, again, rtol=0, atol=1e-6 * plain.abs().max().item())


@ONE
def test_the_precision_of_the_forward_pass_is_that_of_the_backward_pass(joint: Surrogate, x: Tensor) -> None:
    joint.autocast = torch.bfloat16
    try:
        plain = gradients(joint, x)
        with streamed(joint):
            again = gradients(joint, x)
    finally:
        joint.autocast = None
    for a, b in zip(plain, again, strict=True):
        assert torch.cosine_similarity(a.flatten(), b.flatten(), 0) > 0.999


@BOTH
def test_low_memory_streams_and_gives_back(joint: Surrogate, x: Tensor) -> None:
    embedding, before = joint.embed(["a dog"]), joint.sha256
    del vars(joint)["sha256"]
    z = normal(1, 16, 8, 8).requires_grad_()
    with low_memory(joint):
        assert held(joint) == []
        joint.predict(z, torch.tensor([0.5]), embedding).sum().backward()
    assert torch.isfinite(z.grad).all() and joint.sha256 == before


@BOTH
def test_a_model_is_loaded_with_its_blocks_parked_for_good(joint: Surrogate) -> None:
    loaded = Surrogate.from_pretrained(joint.name, low_memory=True)
    assert held(loaded) == [] and loaded.sha256 == joint.sha256
    z, t, embedding = normal(1, 16, 8, 8), torch.tensor([0.4]), joint.embed(["a dog"])
    with torch.no_grad(), low_memory(loaded):
        torch.testing.assert_close(loaded.predict(z, t, embedding), joint.predict(z, t, embedding), rtol=0, atol=1e-5)
    assert held(loaded) == [] and is_streamed(loaded)


@ONE
def test_weights_that_are_parked_are_not_tuned(joint: Surrogate) -> None:
    with streamed(joint):
        with pytest.raises(ValueError, match="weights in memory for full tuning"), tunable(joint, "full"):
            pass
        with tunable(joint, "auto") as (parameters, _):
            assert all(min(parameter.shape) <= 8 for parameter in parameters)  # LoRA's


def test_a_unet_has_no_blocks_to_stream(tiny: Surrogate) -> None:
    with streamed(tiny):
        assert not is_streamed(tiny) and not tiny.denoiser.is_gradient_checkpointing


@ONE
def test_a_full_disk_is_said_and_nothing_is_lost(joint: Surrogate, monkeypatch: pytest.MonkeyPatch) -> None:
    before = joint.sha256
    written: list[Any] = []

    def full(tensors: Any, file: Path) -> None:
        if written:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(save(tensors, file))

    import safetensors.torch

    save: Callable[..., Any] = safetensors.torch.save_file
    monkeypatch.setattr("safetensors.torch.save_file", full)
    del vars(joint)["sha256"]
    with pytest.raises(OSError, match="no room for the weights of a block; set TMPDIR"), streamed(joint):
        pass
    assert joint.sha256 == before and not list(Path(tempfile.gettempdir()).glob("antidiffusion-*/*.safetensors"))
