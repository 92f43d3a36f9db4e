"""MasaCtrl: redraw a picture from its inversion with the picture's own keys and values in self-attention.

References:
    MasaCtrl: Tuning-Free Mutual Self-Attention Control for Consistent Image Synthesis and Editing, Cao et al., 2023,
    arXiv 2304.08465
"""

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor

from antidiffusion.attacks.base import Prompts, usual
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
            paper's 10 of 16, so that the last six of Stable Diffusion's decoder are controlled. In a transformer these
            are the joint layers, whose text stays each picture's own.
        guidance: Scale of classifier-free guidance, 1 to turn it off; None for what is usual for the model.
        steps: In each direction; None for what is usual for the model.
    """

    first_step: float = 4 / 50
    first_layer: float = 10 / 16
    guidance: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        check_settings(self.steps, {"first_step": self.first_step, "first_layer": self.first_layer})

    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor:
        steps, guidance = usual(self.steps, self.guidance, surrogate)
        layers = surrogate.self_layers()
        layers = layers[round(self.first_layer * len(layers)) :]
        mutual = watched(surrogate, layers, sharing(len(x)))
        phases: list[Phase] = [(round(self.first_step * steps), nullcontext()), (steps, mutual)]
        return edit_beside_source(
            x,
            prompts,
            surrogate,
            seed,
            steps=steps,
            guidance=guidance,
            phases=phases,
            progress=progress,
        )
