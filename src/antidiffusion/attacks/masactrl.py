"""MasaCtrl: redraw a picture from its inversion with the picture's own keys and values in self-attention.

References:
    MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing, Cao et al., 2023,
    arXiv 2304.08465
"""

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.inversion import Phase, check_settings, edit_beside_source
from antidiffusion.models.attention import sharing, watched
from antidiffusion.models.base import Surrogate
from antidiffusion.progress import Progress, silent


@dataclass(frozen=True)
class MasaCtrl:
    """Change what the person does and keep how they look; the call is `base.Attack`'s.

    `prompts.source` may stay empty, as in the paper's edits of photos. The target, guided or not, takes its keys and
    values from the source, which is not guided.

    Arguments:
        first_step: Share of the steps before the source's keys and values are used; the paper's 4 of 50.
        first_layer: Share of the self-attention layers, in the order in which they run, that keep their own; the
            paper's 10 of 16, so that the last six of Stable Diffusion's decoder are controlled.
        guidance: Scale of classifier-free guidance; 1 turns it off.
        steps: DDIM steps in each direction.
    """

    first_step: float = 4 / 50
    first_layer: float = 10 / 16
    guidance: float = 7.5
    steps: int = 50

    def __post_init__(self) -> None:
        check_settings(self.steps, {"first_step": self.first_step, "first_layer": self.first_layer})

    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor:
        layers = surrogate.self_layers()
        layers = layers[round(self.first_layer * len(layers)) :]
        mutual = watched(surrogate, layers, sharing(len(x)))
        phases: list[Phase] = [(round(self.first_step * self.steps), nullcontext()), (self.steps, mutual)]
        return edit_beside_source(
            x,
            prompts,
            surrogate,
            seed,
            steps=self.steps,
            guidance=self.guidance,
            phases=phases,
            progress=progress,
        )
