"""A denoiser's attention recorded, changed or shared on the layers asked for; every other layer keeps fused attention.

diffusers' processors of every family end in one call of fused attention, after their norms and rotary embeddings. A
watched layer runs its own processor and answers that call, so that nothing of a processor is written anew.

References:
    Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al., 2022, arXiv 2208.01626
    MasaCtrl: Tuning-Free Mutual Self-Attention Control, Cao et al., 2023, arXiv 2304.08465
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from antidiffusion.models.base import Places, Surrogate


class Attend(Protocol):
    """Mixes values at keys, both `(B, heads, L, d)`, for queries `(B, heads, N, d)`; the answer is shaped as these."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places) -> Tensor: ...


def fused(query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places) -> Tensor:
    """Mix as a layer that nobody watches does."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Return the softmax over keys, `(B, heads, N, L)` float32."""
    return (query @ key.transpose(-1, -2) * scale).float().softmax(-1)


def recording(maps: list[Tensor], positions: int | None = None) -> Attend:
    """Keep what the picture reads of the text.

    Arguments:
        maps: List that every call appends `(B, heads, N, L)` float32 to, for N positions of the picture and L tokens.
            Where the softmax is joint, rows sum to less than 1: the rest is on the picture.
        positions: Record only layers with this number N; None records any. A layer that is not recorded runs fused.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places) -> Tensor:
        if positions not in (None, query[:, :, places.queries].shape[2]):
            return fused(query, key, value, scale, places)
        mass = probabilities(query, key, scale)
        maps.append(mass[:, :, places.queries, places.text])
        return mass.to(value.dtype) @ value

    return attend


def editing(edit: Callable[[Tensor], Tensor], *, text: bool, most: int | None = None) -> Attend:
    """Change what the picture reads of the text, or of itself.

    Arguments:
        edit: From probabilities `(B, heads, N, L)` float32, rows summing to 1, to those that mix the values. Where the
            softmax is joint a row keeps its share between text and picture.
        text: Whether text is read, or the picture.
        most: Change only layers with at most this number N of positions of the picture; the others run fused.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places) -> Tensor:
        queries, keys = places.queries, places.text if text else places.picture
        if most is not None and query[:, :, queries].shape[2] > most:
            return fused(query, key, value, scale, places)
        mass = probabilities(query, key, scale)
        block = mass[:, :, queries, keys]
        if block.shape == mass.shape:
            mass = edit(block)
        else:
            share = block.sum(-1, keepdim=True)
            mass = mass.clone()
            mass[:, :, queries, keys] = edit(block / share.clamp(min=1e-12)) * share
        return mass.to(value.dtype) @ value

    return attend


def sharing(count: int) -> Attend:
    """Give a whole batch the picture's keys and values of its first entries, fused.

    Arguments:
        count: Entry i attends to the picture that entry i modulo `count` attends to; the batch is a multiple of it.
    """

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, places: Places) -> Tensor:
        groups, (key, value) = len(query) // count, (key.clone(), value.clone())
        for tensor in (key, value):
            tensor[:, :, places.picture] = tensor[:count, :, places.picture].repeat(groups, 1, 1, 1)
        return fused(query, key, value, scale, places)

    return attend


class _Answering(TorchFunctionMode):
    """Answers fused attention inside the block."""

    def __init__(self, answer: Callable[..., Tensor]) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (self.answer if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


class Watched:
    """Attention processor of diffusers that runs another and answers its fused attention.

    Arguments:
        stock: The processor.
        attend: The answer.
        places: From the number of keys to where picture and text stand.
    """

    def __init__(self, stock: Any, attend: Attend, places: Callable[[int], Places]) -> None:
        self.stock, self.attend, self.places = stock, attend, places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def answer(
            query: Tensor,
            key: Tensor,
            value: Tensor,
            attn_mask: Tensor | None = None,
            dropout_p: float = 0.0,
            is_causal: bool = False,
            scale: float | None = None,
            **other: Any,
        ) -> Tensor:
            if attn_mask is not None or is_causal:
                raise ValueError("expected attention without a mask, got a mask; watch another layer")
            return self.attend(query, key, value, scale or query.shape[-1] ** -0.5, self.places(key.shape[2]))

        with _Answering(answer):
            return self.stock(*args, **kwargs)


@contextmanager
def watched(surrogate: Surrogate, layers: Collection[str], attend: Attend) -> Iterator[None]:
    """Let layers mix their values otherwise inside the block; in nested blocks the innermost says how.

    Arguments:
        surrogate: The model.
        layers: Names as `cross_layers`, `self_layers` and `map_layers` give them.
        attend: What they do; all other layers keep fused attention.
    """
    denoiser, text = surrogate.denoiser, 0

    def told(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal text  # layers that see one sequence are not told how much of it is text
        text = kwargs["encoder_hidden_states"].shape[1]

    def placed(layer: str) -> Callable[[int], Places]:
        return lambda total: surrogate.places(layer, text, total)

    before = denoiser.attn_processors
    inner = {name: own.stock if isinstance(own, Watched) else own for name, own in before.items()}
    after = before | {name: Watched(inner[name], attend, placed(name)) for name in layers}
    hook = denoiser.register_forward_pre_hook(told, with_kwargs=True)
    denoiser.set_attn_processor(after)
    try:
        with _kept(denoiser, layers):
            yield
    finally:
        hook.remove()
        denoiser.set_attn_processor(before)


@contextmanager
def _kept(denoiser: Any, layers: Collection[str]) -> Iterator[None]:
    """Keep the activations of what holds one of the layers: recomputed, it would run when its processors are back."""
    names = {layer.removesuffix(".processor") for layer in layers}
    holders = {module for name, module in denoiser.named_modules() if name in names}
    changed = [module for module in denoiser.modules() if getattr(module, "gradient_checkpointing", False)]
    stock = {module: module._gradient_checkpointing_func for module in changed}

    def otherwise(recompute: Callable[..., Any]) -> Callable[..., Any]:
        def run(block: Any, *args: Any, **kwargs: Any) -> Any:
            inside = block.modules() if isinstance(block, torch.nn.Module) else ()
            if holders.intersection(inside):
                return block(*args, **kwargs)
            return recompute(block, *args, **kwargs)

        return run

    for module in changed:
        module._gradient_checkpointing_func = otherwise(stock[module])
    try:
        yield
    finally:
        for module in changed:
            module._gradient_checkpointing_func = stock[module]


@contextmanager
def record_attention(
    surrogate: Surrogate, layers: Sequence[str], positions: int | None = None
) -> Iterator[list[Tensor]]:
    """Record what the picture reads of the text in `layers` inside the block.

    Arguments:
        surrogate: The model.
        layers: Names as `cross_layers` and `map_layers` give them.
        positions: Record only layers with this number of the picture's positions, see `recording`.

    Returns:
        List that fills with one `(B, heads, N, L)` float32 map per recorded layer and forward pass.

    Raises:
        ValueError: If text is not read in a layer.
    """
    if strangers := sorted(set(layers) - set(surrogate.cross_layers())):
        raise ValueError(f"expected cross-attention layers, got {', '.join(strangers)}; take some of cross_layers()")
    maps: list[Tensor] = []
    with watched(surrogate, layers, recording(maps, positions)):
        yield maps


def mean_map(maps: list[Tensor]) -> Tensor:
    """Average maps `(B, heads, N, L)` over heads and layers: `(B, N, L)`."""
    if not maps:
        raise ValueError("expected at least one attention map, got none; name layers that the model has")
    return torch.stack([layer.mean(1) for layer in maps]).mean(0)
