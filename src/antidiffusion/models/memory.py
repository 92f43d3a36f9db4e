"""Less memory for more time: what is recomputed, parked on disk, or fetched to the device only while it is called."""

import errno
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from antidiffusion.models.base import Surrogate
from antidiffusion.models.latents import LatentSpaces
from antidiffusion.models.streaming import streamed


@contextmanager
def saved(tensors: Sequence[Tensor]) -> Iterator[Callable[[], list[Tensor]]]:
    """Keep a copy of tensors in a temporary file inside the block, where memory is dearer than disk.

    Returns:
        Function that reads the copies back.

    Raises:
        OSError: If the disk of temporary files is full.
    """
    with tempfile.TemporaryFile(prefix="antidiffusion-") as file:
        try:
            torch.save(list(tensors), file)
        except RuntimeError as error:  # torch's word for a failed write
            raise OSError(
                errno.ENOSPC, f"no room for a copy of {len(tensors)} weights; set TMPDIR", tempfile.gettempdir()
            ) from error
        del tensors  # or what the caller parks would stay in memory

        def load() -> list[Tensor]:
            file.seek(0)
            return torch.load(file, weights_only=True)

        yield load


class Parked:
    """Weights on disk, but while their module is called; its hooks are `fetch` and `park`.

    A call whose gradient is wanted leaves its weights in memory until the next one without, since the backward pass
    reads them.

    Arguments:
        parameters: Of the module.
        load: Reads their data, see `saved`.
    """

    def __init__(self, parameters: Sequence[Tensor], load: Callable[[], list[Tensor]]) -> None:
        self.parameters, self.load = parameters, load
        self.away = self.held = False

    def fetch(self, *call: Any) -> None:
        """Have the weights in memory."""
        if self.away:
            for parameter, data in zip(self.parameters, self.load(), strict=True):
                parameter.data = data
        self.away = False

    def park(self, *call: Any) -> None:
        """Free the weights' memory, if nobody needs them."""
        if self.held or torch.is_grad_enabled():
            return
        for parameter in self.parameters:
            parameter.data = parameter.data[:0].clone()
        self.away = True


@contextmanager
def parked(modules: Sequence[Any]) -> Iterator[None]:
    """Keep the weights of modules on disk inside the block, but while one of them is called; those that change need
    `held`.
    """
    with ExitStack() as stack:
        for module in modules:
            parameters = list(module.parameters())
            load = stack.enter_context(saved([parameter.data for parameter in parameters]))
            module.parked = state = Parked(parameters, load)
            stack.callback(delattr, module, "parked")
            stack.callback(state.fetch)
            for hook in (module.register_forward_pre_hook(state.fetch), module.register_forward_hook(state.park)):
                stack.callback(hook.remove)
            with torch.no_grad():
                state.park()
        yield


@contextmanager
def held(modules: Sequence[Any]) -> Iterator[None]:
    """Have the weights of modules in memory inside the block, so that they can be tuned and restored."""
    states = [module.parked for module in modules if hasattr(module, "parked")]
    try:
        for state in states:
            state.fetch()
            state.held = True
        yield
    finally:
        for state in states:
            state.held = False


@contextmanager
def recomputed(layers: Sequence[Any]) -> Iterator[None]:
    """Keep only what goes into each layer inside the block, and compute the rest anew in the backward pass.

    diffusers' switch for the autoencoder recomputes whole levels, whose activations are twice as large.
    """
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def checkpointed(denoiser: Any, wanted: bool) -> Iterator[None]:
    """Recompute the denoiser's activations in the backward pass inside the block, if wanted; a set flag stays set."""
    switch = wanted and not denoiser.is_gradient_checkpointing
    try:
        if switch:
            denoiser.enable_gradient_checkpointing()
        yield
    finally:
        if switch:
            denoiser.disable_gradient_checkpointing()


@contextmanager
def low_memory(surrogate: Surrogate | LatentSpaces) -> Iterator[None]:
    """Protect with less memory and more time inside the block.

    Activations are recomputed in the backward pass, a transformer's blocks are held one at a time, and the text
    encoders and the decoder, which most stages do not need, are on disk, see `parked`.
    """
    from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
    from diffusers.models.resnet import ResnetBlock2D

    if isinstance(surrogate, LatentSpaces):
        blocks = [block for module in surrogate.modules for block in module.modules()]
        with recomputed([block for block in blocks if isinstance(block, AutoencoderTinyBlock)]):
            yield
        return
    residuals = [module for module in surrogate.vae.encoder.modules() if isinstance(module, ResnetBlock2D)]
    with (
        streamed(surrogate),
        checkpointed(surrogate.denoiser, True),
        recomputed(residuals),
        parked([*surrogate.text_encoders, surrogate.vae.decoder]),
    ):
        yield


@contextmanager
def offload(surrogate: Surrogate) -> Iterator[None]:
    """Keep the text encoders and the autoencoder on the CPU inside the block, but while one of them is called.

    For attacks on an accelerator that the denoiser nearly fills. A call whose gradient is wanted leaves its module on
    the denoiser's device until the next one without, since the backward pass reads its weights.
    """
    device, parts = surrogate.device, [*surrogate.text_encoders, *surrogate.vae.children()]

    def fetch(module: Any, inputs: Any) -> None:
        module.to(device)

    def park(module: Any, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            module.to("cpu")

    hooks = []
    try:
        for module in parts:
            module.to("cpu")
            hooks += [module.register_forward_pre_hook(fetch), module.register_forward_hook(park)]
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in parts:
            module.to(device)
