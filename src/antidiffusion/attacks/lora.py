"""LoRA: tune low-rank adapters of attention to a few photos of one person.

References:
    LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2022, arXiv 2106.09685
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from antidiffusion.attacks.prior import PriorTuning
from antidiffusion.attacks.tuned import Task, Training, at_least_one
from antidiffusion.models.base import Surrogate
from antidiffusion.models.tuning import ADAPTER, adapted


@dataclass(frozen=True)
class LoRA(PriorTuning):
    """Tune adapters in float32 on a denoiser of any precision; the defaults are those of diffusers' DreamBooth script.

    There is no loss scaling: a float16 denoiser loses gradients below 6e-8, the smallest float16; take bfloat16.

    Saves `pytorch_lora_weights.safetensors` for `load_lora` and diffusers' `load_lora_weights`.

    Arguments:
        learning_rate: None for the surrogate's `lora_learning_rate`.
        rank: Of the adapters, 4 to 16 in practice.
        text_encoder: Give the text encoders adapters too.
    """

    steps: int = 500
    rank: int = 4
    text_encoder: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one("rank", self.rank)

    @contextmanager
    def _training(self, task: Task, surrogate: Surrogate) -> Iterator[Training]:
        loss = self._loss(task, surrogate, texts=self.text_encoder)
        seed = task.generator.initial_seed()
        with adapted(surrogate, self.rank, seed, text_encoders=self.text_encoder) as adapters:
            rate = self.learning_rate or surrogate.lora_learning_rate
            yield Training(adapters, rate, loss, partial(save, surrogate))


def save(surrogate: Surrogate, folder: Path) -> None:
    """Write the adapters inside `tuning.adapted`'s block."""
    from peft.utils import get_peft_model_state_dict

    layers = {
        f"{name}_lora_layers": get_peft_model_state_dict(module, adapter_name=ADAPTER, save_embedding_layers=False)
        for name, (module, _) in surrogate.tunable(texts=True).items()
        if getattr(module, "peft_config", None)
    }
    surrogate.pipeline().save_lora_weights(folder, **layers)


@contextmanager
def load_lora(surrogate: Surrogate, folder: str | Path) -> Iterator[None]:
    """Put adapters on the surrogate inside the block, for example to draw with `sampling.sample`.

    Arguments:
        surrogate: The model; its weights are afterwards what they were.
        folder: Folder with `pytorch_lora_weights.safetensors`, or another `.safetensors` file, in a format that
            diffusers knows; adapters of text encoders are loaded too.

    Raises:
        ValueError: If there is no such file, it does not fit the model, or the denoiser has adapters already.
    """
    from safetensors import SafetensorError

    if present := getattr(surrogate.denoiser, "peft_config", None):
        raise ValueError(f"expected a {surrogate.part} without adapters, got {', '.join(present)}; take them off first")
    wrapped = surrogate.pipeline()
    try:
        try:
            wrapped.load_lora_weights(str(folder), use_safetensors=True, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"expected a LoRA of this model in {folder}, got an error: {reason}") from error
        if not wrapped.get_list_adapters():
            raise ValueError(f"expected a LoRA of this model in {folder}, got none of its layers; name another file")
        for module in surrogate.modules:
            module.requires_grad_(False)
        yield
    finally:
        wrapped.unload_lora_weights()
