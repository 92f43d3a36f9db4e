"""Count work and memory of protecting against Stable Diffusion 3 and FLUX.1 at full shape: joint.json.

Nothing is computed: every stage's single step runs on the meta device through the code that protects pictures, in
bfloat16, for one picture. Work is what `flops.py` counts. Memory is the most bytes of tensors alive at a time, by the
life of their storages; fused attention keeps its queries, keys, values and answer, and workspaces of kernels are not
seen. Weights are added as they are held: all of them, or with `--low-memory` what the stage needs: one block of the
transformer, the encoder of the autoencoder, and the text encoders and the decoder only where they are used.

    python benchmarks/joint.py
"""

import gc
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flops
import shapes
import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakIdKeyDictionary

from antidiffusion.models.attention import record_attention
from antidiffusion.models.base import Surrogate
from antidiffusion.models.memory import recomputed
from antidiffusion.models.streaming import streamed
from antidiffusion.recipes import PERTURBATION, RECIPES, TUNING

RESULTS = Path(__file__).parent / "results" / "joint.json"
SIDES = (1024, 512)
GB = 1e9
EMBEDDING, CARD = "embedding", "one answer for the card"
STAGES = (PERTURBATION, TUNING)


class Fused(torch.autograd.Function):
    """Attention as a fused kernel keeps it: its arguments, its answer, and one number a row; counts its operations."""

    flop = 0

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        answer = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, answer, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.flop = 4 * query.numel() * key.shape[-2]  # two products; four in the backward pass, as `flops` counts
        Fused.flop += ctx.flop
        return answer

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        Fused.flop += 2 * ctx.flop
        return tuple(torch.empty_like(argument) for argument in ctx.saved_tensors[:3])


def fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """Attend as `Fused`, unless somebody watches."""
    if has_torch_function((query,)):
        return handle_torch_function(fused, (query,), query, key, value, **options)
    return Fused.apply(query, key, value)


class Alive(TorchDispatchMode):
    """Follow the bytes of the tensors that are made inside and still alive.

    Arguments:
        weights: Tensors that are counted apart.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen = WeakIdKeyDictionary({tensor.untyped_storage(): 0 for tensor in weights})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen[storage] = size = storage.nbytes()
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, size)
        return output

    def _freed(self, size: int) -> None:
        self.now -= size


def alive(weights: Iterable[Tensor], work: Callable[[], Any]) -> float:
    """Return the GB of tensors alive at most while `work` runs."""
    stock, Fused.flop = F.scaled_dot_product_attention, 0
    gc.collect()
    F.scaled_dot_product_attention = fused
    try:
        with Alive(weights) as mode:
            work()
    finally:
        F.scaled_dot_product_attention = stock
    return mode.peak / GB


def both(weights: Iterable[Tensor], work: Callable[[], Any]) -> tuple[float, float]:
    """Return the GB alive and the TFLOP."""
    with FlopCounterMode(display=False) as counter:
        most = alive(weights, work)
    return most, (counter.get_total_flops() + Fused.flop) / 1e12


def size(module: nn.Module | None) -> float:
    """Return the GB of a module's weights and buffers."""
    if module is None:
        return 0.0
    return sum(value.numel() * value.element_size() for value in module.state_dict().values()) / GB


@contextmanager
def lean(surrogate: Surrogate) -> Iterator[None]:
    """Protect with low memory, of which parking on disk is left out: on the meta device nothing moves."""
    residuals = [module for module in surrogate.vae.encoder.modules() if isinstance(module, ResnetBlock2D)]
    moving, Tensor.cpu = Tensor.cpu, lambda tensor: tensor  # type: ignore[method-assign]
    try:
        with streamed(surrogate), recomputed(residuals):
            yield
    finally:
        Tensor.cpu = moving  # type: ignore[method-assign]


def stages(surrogate: Surrogate) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield what is done before the recipe, one step of its stages, and what is done for the card."""
    side = surrogate.size
    z = torch.zeros(1, surrogate.channels, side // surrogate.factor, side // surrogate.factor, device="meta")
    t, embedding = torch.zeros(1, device="meta"), surrogate.embed([""])

    @torch.no_grad()
    def card() -> None:
        with record_attention(surrogate, surrogate.map_layers()):
            surrogate.predict(z, t, embedding)

    yield EMBEDDING, lambda: surrogate.embed([""])
    yield from ((s, work) for s, work in flops.our_works(surrogate, RECIPES["anti-diffusion"]) if s in STAGES)
    yield CARD, card


def row(version: str, side: int) -> dict[str, Any]:
    """Count one model at one size."""
    surrogate = shapes.build_transformer(version, side)
    parts = [tensor.data for module in surrogate.modules for tensor in (*module.parameters(), *module.buffers())]
    plain = {stage: both(parts, work) for stage, work in stages(surrogate)}
    with lean(surrogate):
        low = {stage: alive(parts, work) for stage, work in stages(surrogate)}
    block = max(map(size, surrogate.blocks))
    weights = {
        "transformer": size(surrogate.denoiser),
        "largest block": block,
        "outside the blocks": size(surrogate.denoiser) - sum(map(size, surrogate.blocks)),
        "text encoders": sum(map(size, surrogate.text_encoders)),
        "autoencoder": size(surrogate.vae),
    }
    everything = weights["transformer"] + weights["text encoders"] + weights["autoencoder"]
    held = weights["outside the blocks"] + block + size(surrogate.vae.encoder)
    whole = held + weights["text encoders"] + size(surrogate.vae.decoder)  # before the recipe, and for the card
    needed = {stage: value + (whole if stage in (EMBEDDING, CARD) else held) for stage, value in low.items()}
    return {
        "tflop": rounded({stage: work for stage, (_, work) in plain.items()}),
        "weights_gb": rounded(weights),
        "alive_gb": rounded({stage: gb for stage, (gb, _) in plain.items()}),
        "alive_low_memory_gb": rounded(low),
        "needed_gb": round(everything + max(gb for gb, _ in plain.values()), 1),
        "needed_low_memory_gb": rounded(needed),
    }


def rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def main() -> None:
    flops.check_attention()
    document: dict[str, Any] = {
        "counted": "one picture, bfloat16, on the meta device; nothing was computed",
        "torch": torch.__version__,
        "rows": {},
    }
    for version, (name, *_) in shapes.TRANSFORMERS.items():
        for side in SIDES:
            document["rows"][f"{name}, {side} px"] = values = row(version, side)
            print(f"{name}, {side} px", json.dumps(values), flush=True)
            RESULTS.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
