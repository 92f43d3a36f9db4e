"""Custom Diffusion: tune the keys and values of cross-attention to a few photos of one person.

References:
    Multi-Concept Customization of Text-to-Image Diffusion, Kumari et al., 2023, arXiv 2212.04488
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from antidiffusion.attacks.prior import PriorTuning
from antidiffusion.attacks.textual_inversion import check_placeholder, new_token, save_token
from antidiffusion.attacks.tuned import Task, Training
from antidiffusion.models.base import Surrogate
from antidiffusion.models.tuning import restored

FILE = "pytorch_custom_diffusion_weights.safetensors"


@dataclass(frozen=True)
class CustomDiffusion(PriorTuning):
    """Tune what the UNet reads from the text, in float32; the defaults are the paper's for one concept.

    The paper learns a modifier token, which `placeholder` asks for, and regularises with found pictures of the class;
    `class_prompt` draws them.

    Saves `pytorch_custom_diffusion_weights.safetensors` in diffusers' format, which a stock pipeline loads with
    `pipe.unet.load_attn_procs(folder, weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)`.
    Without `_pipeline`, diffusers 0.42 reads the file and drops it. A token is saved as Textual Inversion saves it.

    Arguments:
        learning_rate: None for the surrogate's `lora_learning_rate`, for Stable Diffusion near the paper's 8e-5.
        placeholder: Word of the prompts that a new token stands for, learnt with the weights; None reads it as it is.
        initializer: Word whose embedding the new token starts from, one token of the tokenizer.
    """

    full_tuning = True

    steps: int = 250
    batch_size: int = 8
    placeholder: str | None = None
    initializer: str = "person"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.placeholder is not None:
            check_placeholder(self.placeholder)

    @contextmanager
    def _training(self, task: Task, surrogate: Surrogate) -> Iterator[Training]:
        if surrogate.joint:
            got = f"got {surrogate.name}, which reads text and picture together"
            raise ValueError(f"expected a UNet, whose layers for the text are tuned, {got}; use LoRA or DreamBooth")
        tokens = dict[str, Tensor]()
        with ExitStack() as stack:
            if self.placeholder is not None:
                learnt = new_token(surrogate, task.prompt, self.placeholder, self.initializer)
                tokens = dict([stack.enter_context(learnt)])
            loss = self._loss(task, surrogate, texts=self.placeholder is not None)
            parameters = list(keys_and_values(surrogate).values())
            stack.enter_context(restored(parameters))
            rate = self.learning_rate or surrogate.lora_learning_rate
            yield Training([*parameters, *tokens.values()], rate, loss, partial(save, surrogate, tokens))


def keys_and_values(surrogate: Surrogate) -> dict[str, Tensor]:
    """Return the projections of the text by name, each `(d_out, d_text)`."""
    ends = ("attn2.to_k.weight", "attn2.to_v.weight")
    return {name: value for name, value in surrogate.denoiser.named_parameters() if name.endswith(ends)}


def save(surrogate: Surrogate, tokens: dict[str, Tensor], folder: Path) -> None:
    """Write the projections under the names of diffusers' attention processors, and new tokens beside them."""
    from safetensors.torch import save_file

    # diffusers takes an empty entry for an attention that keeps its weights, and wants one for every attention.
    state = {name: torch.empty(0) for name in surrogate.denoiser.attn_processors if name.endswith("attn1.processor")}
    for name, value in keys_and_values(surrogate).items():
        attention, projection, _ = name.rsplit(".", 2)
        state[f"{attention}.processor.{projection}_custom_diffusion.weight"] = value.detach().contiguous()
    save_file(state, folder / FILE, {"format": "pt"})
    for token, vector in tokens.items():
        save_token(token, vector, folder)
