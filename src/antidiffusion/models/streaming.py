"""A denoiser whose blocks' weights are held one block at a time, forwards and in the backward pass.

The others wait on disk if the model runs on the processor, and in the host's memory if it runs on an accelerator.
Hooks alone would not do: autograd saves frozen weights by reference, so that a backward pass would read what a hook has
taken away again. A parked weight therefore reads as NaN.
"""

import errno
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from antidiffusion.models.base import Surrogate

Folder = tempfile.TemporaryDirectory[str]


def is_parked(weight: Tensor) -> bool:
    """Say whether a weight is not there: its one number stands at every place."""
    return weight.numel() > 1 and not any(weight.stride())


class Parked:
    """A block's frozen weights, which are there inside `with` blocks only; these nest.

    Arguments:
        block: Part of a model.
        device: Where it runs.
        folder: Where its weights wait, and which is there as long as this; None for the host's memory.

    Raises:
        OSError: If the disk of temporary files is full.
    """

    def __init__(self, block: nn.Module, device: torch.device, folder: Folder | None) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._weights = dict(block.named_parameters())
        self._depth, self._kept, self._folder = 0, False, folder
        self._host: dict[str, Tensor] = {}
        held = {name: weight.data.cpu().contiguous() for name, weight in self._weights.items()}
        if folder is None:
            self._host = held
        else:
            self._file = Path(folder.name, f"{id(block)}.safetensors")
            try:
                save_file(held, self._file)
            except (SafetensorError, OSError) as error:
                raise OSError(
                    errno.ENOSPC, "no room for the weights of a block; set TMPDIR", tempfile.gettempdir()
                ) from error
        self._device = device
        self._release()
        self._hooks = [
            block.register_forward_pre_hook(lambda module, inputs: self.__enter__()),
            block.register_forward_hook(self._ran, always_call=True),
        ]

    def __enter__(self) -> None:
        self._depth += 1
        if self._depth == 1:
            for name, data in self._read().items():
                self._weights[name].data = data.to(self._device)

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._release()

    def _read(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return self._host if self._folder is None else load_file(self._file)  # mapped, not read, until it is used

    def _release(self) -> None:
        for weight in self._weights.values():
            weight.data = torch.full((), torch.nan, dtype=weight.dtype, device=self._device).expand(weight.shape)

    def _ran(self, block: nn.Module, inputs: Any, output: Any) -> None:
        cut = output is None  # by an error, or by someone who has seen enough and will go back from inside the block
        wanted = torch.is_grad_enabled() and (
            cut or any(isinstance(o, Tensor) and o.requires_grad for o in _several(output))
        )
        if wanted and not self._kept and self._depth == 1:
            self._kept = True  # called with gradient and not by `Alone`: a backward pass will read the weights
        else:
            self.__exit__()

    def close(self) -> None:
        """Bring the weights back to stay."""
        for hook in self._hooks:
            hook.remove()
        if not self._depth:
            self.__enter__()
        if self._folder:  # what is mapped would go with its file
            for weight in self._weights.values():
                weight.data = weight.data.clone()


class Alone(torch.autograd.Function):
    """Run a block, keep only what goes in, and run it anew in the backward pass, its weights there each time.

    The arguments are the block, its `Parked`, how many of the others are the block's inputs, these inputs, and then
    those of the block's parameters that ask for gradients.
    """

    @staticmethod
    def forward(ctx: Any, block: nn.Module, parked: Parked, count: int, *arguments: Any) -> Any:
        inputs = arguments[:count]
        ctx.block, ctx.parked, ctx.parameters = block, parked, arguments[count:]
        ctx.tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.inputs = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
        ctx.set_materialize_grads(False)
        ctx.computing = computing(next(value for value in inputs if isinstance(value, Tensor)).device.type)
        with parked:
            return block(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        inputs = list(ctx.inputs)
        for i, value in zip(ctx.tensors, ctx.saved_tensors, strict=True):
            inputs[i] = value.detach().requires_grad_(ctx.needs_input_grad[3 + i])
        wanted = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
        leaves = [*wanted, *(p for p in ctx.parameters if p.requires_grad)]
        with ctx.parked:
            with torch.enable_grad(), ctx.computing():
                outputs = _several(ctx.block(*inputs))
            pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if g is not None and o.requires_grad]
            answers, seeds = zip(*pairs, strict=True)
            found = iter(torch.autograd.grad(answers, leaves, seeds, allow_unused=True))
        given = [next(found) if isinstance(v, Tensor) and v.requires_grad else None for v in inputs]
        return None, None, None, *given, *(next(found) if p.requires_grad else None for p in ctx.parameters)


def _several(output: Any) -> tuple[Any, ...]:
    """Return what a block answers as a tuple: FLUX.2's single blocks answer with one tensor."""
    return output if isinstance(output, tuple) else (output,)


def computing(kind: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that computes in today's precision again, inside a block."""
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    return lambda: torch.autocast(kind, dtype, enabled=enabled)


def stream(surrogate: Surrogate, device: torch.device) -> Callable[[], None]:
    """Park the denoiser's blocks, and recompute their activations in backward passes.

    Done before the model is moved to a device that is smaller than it, blocks never go there together.

    Arguments:
        surrogate: The model; one without blocks is left as it is.
        device: Where it will run.

    Returns:
        Function that brings everything back.

    Raises:
        OSError: If the disk of temporary files is full.
    """
    denoiser, blocks = surrogate.denoiser, surrogate.blocks
    if not blocks or is_streamed(surrogate):
        return lambda: None
    folder = Folder(prefix="antidiffusion-") if device.type == "cpu" else None
    parked: dict[nn.Module, Parked] = {}

    def alone(block: nn.Module, *inputs: Any) -> Any:
        parameters = [parameter for parameter in block.parameters() if parameter.requires_grad]
        return Alone.apply(block, parked[block], len(inputs), *inputs, *parameters)

    def restore() -> None:
        for one in parked.values():
            one.close()
        denoiser.gradient_checkpointing, denoiser._gradient_checkpointing_func = before
        if folder:
            folder.cleanup()

    before = denoiser.gradient_checkpointing, getattr(denoiser, "_gradient_checkpointing_func", None)
    try:
        for block in blocks:
            parked[block] = Parked(block, device, folder)
    except OSError:
        restore()
        raise
    denoiser.enable_gradient_checkpointing(alone)
    return restore


def is_streamed(surrogate: Surrogate) -> bool:
    """Say whether the denoiser's blocks are parked already."""
    return any(is_parked(weight) for block in surrogate.blocks for weight in block.parameters())


@contextmanager
def streamed(surrogate: Surrogate) -> Iterator[None]:
    """Park the denoiser's blocks inside the block, see `stream`."""
    restore = stream(surrogate, surrogate.device)
    try:
        yield
    finally:
        restore()
