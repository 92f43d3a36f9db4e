"""Prompt-to-Prompt: redraw a picture from its inversion with the attention maps of the words it shares with the edit.

References:
    Prompt-to-Prompt Image Editing with Cross Attention Control, Hertz et al., 2022, arXiv 2208.01626
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import SequenceMatcher

import torch
from torch import Tensor

from antidiffusion.attacks.base import Prompts, one_or_each, usual
from antidiffusion.attacks.inversion import check_settings, edit_beside_source
from antidiffusion.models.attention import (
    Attend,
    editing,
    watched,
)
from antidiffusion.models.base import Surrogate, Word
from antidiffusion.progress import Progress, silent


@dataclass(frozen=True)
class PromptToPrompt:
    """Change words of `prompts.source`, which says what the pictures show; the call is `base.Attack`'s.

    Words that both texts have keep the source's cross-attention maps (the paper's refinement). Where as many words
    stand in the place of others, each takes the map of the one it replaces (word swap). Added words keep their own.
    Only a UNet reads words apart from the picture: other models are refused.

    Arguments:
        cross_replace: Share of the steps in which cross-attention maps come from the source and are reweighted.
        self_replace: Share of the steps in which self-attention maps come from the source, in the layers of at most
            half the latent's side.
        reweight: Words of the target and what their attention is multiplied by, such as `(("smiling", 2.0),)`.
        guidance: Scale of classifier-free guidance, 1 to turn it off; None for what is usual for the model.
        steps: In each direction; None for what is usual for the model.
    """

    cross_replace: float = 0.8
    self_replace: float = 0.4
    reweight: tuple[tuple[str, float], ...] = ()
    guidance: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        check_settings(self.steps, {"cross_replace": self.cross_replace, "self_replace": self.self_replace})

    def __call__(
        self, x: Tensor, prompts: Prompts, surrogate: Surrogate, seed: int, *, progress: Progress = silent
    ) -> Tensor:
        steps, guidance = usual(self.steps, self.guidance, surrogate)
        count, window = len(x), surrogate.tokenizers[0].model_max_length
        sources, targets = (
            [surrogate.words(text) for text in one_or_each(texts, count)] for texts in (prompts.source, prompts.target)
        )
        if not all(sources):
            raise ValueError("expected a source text that says what the picture shows, got none; set Prompts.source")
        pairs = zip(sources * (count // len(sources)), targets * (count // len(targets)), strict=True)
        mapping = torch.stack([correspondence(*pair, window) for pair in pairs]).to(x)
        factors = reweighted(targets, self.reweight, window).to(x)
        coarse = surrogate.positions(x.shape[-2], x.shape[-1]) // 4
        controls = [
            (self.cross_replace, surrogate.cross_layers(), inject_cross(mapping, factors)),
            (self.self_replace, surrogate.self_layers(), inject_self(count, coarse)),
        ]
        ends = [(round(share * steps), layers, attend) for share, layers, attend in controls]

        @contextmanager
        def controlled(until: int) -> Iterator[None]:
            with ExitStack() as stack:
                for end, layers, attend in ends:
                    if until <= end:
                        stack.enter_context(watched(surrogate, layers, attend))
                yield

        return edit_beside_source(
            x,
            prompts,
            surrogate,
            seed,
            steps=steps,
            guidance=guidance,
            phases=[(until, controlled(until)) for until in sorted({steps, *(end for end, *_ in ends)})],
            progress=progress,
        )


def inject_cross(mapping: Tensor, factors: Tensor) -> Attend:
    """Give targets the cross-attention maps of their sources.

    Arguments:
        mapping: See `correspondence`, `(B, L, L)`; a target's token that it maps nothing to keeps its own map.
        factors: What the targets' attention to each token is multiplied by, `(B, L)` or `(1, L)`.

    Returns:
        What the layers do with the batch of `edit_beside_source`.
    """
    count = len(mapping)
    mapping, factors = mapping[:, None], factors[:, None, None]
    own = (mapping.sum(-2, keepdim=True) == 0).to(mapping)

    def edit(maps: Tensor) -> Tensor:
        source, target, unguided = maps[:count], maps[count : 2 * count], maps[2 * count :]
        return torch.cat([source, (source @ mapping + target * own) * factors, unguided])

    return editing(edit, text=True)


def inject_self(count: int, coarse: int) -> Attend:
    """Give targets the self-attention maps of their sources, in layers of at most `coarse` positions."""

    def edit(maps: Tensor) -> Tensor:
        return torch.cat([maps[:count], maps[:count], maps[2 * count :]])

    return editing(edit, text=False, most=coarse)


def correspondence(source: Sequence[Word], target: Sequence[Word], window: int) -> Tensor:
    """Say which of the source's tokens each of the target's takes its attention from.

    Words are aligned; a word takes the attention of its counterpart token by token, or the sum in equal parts if
    they have different numbers of tokens. Begin and end of text, and padding at the same position, correspond.

    Arguments:
        source, target: As `Surrogate.words` returns them.
        window: L, the positions of an embedding.

    Returns:
        Weights `(L, L)` float32 from the source's tokens (rows) to the target's (columns).
    """
    mapping = torch.zeros(window, window)
    ends = [text[-1][1].stop if text else 1 for text in (source, target)]
    mapping[0, 0] = mapping[ends[0], ends[1]] = 1
    padding = torch.arange(max(ends) + 1, window)
    mapping[padding, padding] = 1
    matcher = SequenceMatcher(None, [word for word, _ in source], [word for word, _ in target], autojunk=False)
    for _, first, last, start, stop in matcher.get_opcodes():
        if last - first == stop - start:  # equal, or as many other words
            for (_, old), (_, new) in zip(source[first:last], target[start:stop], strict=True):
                for number, column in enumerate(new):
                    if len(old) == len(new):
                        mapping[old[number], column] = 1
                    else:
                        mapping[old.start : old.stop, column] = 1 / len(new)
    return mapping


def reweighted(targets: Sequence[Sequence[Word]], weights: Sequence[tuple[str, float]], window: int) -> Tensor:
    """Return what attention to each token is multiplied by, `(B, L)` float32 for B texts.

    Raises:
        ValueError: If no text has one of the words.
    """
    factors = torch.ones(len(targets), window)
    for wanted, factor in weights:
        places = [
            (row, positions) for row, text in enumerate(targets) for word, positions in text if word == wanted.lower()
        ]
        if not places:
            raise ValueError(f"expected words of the target in reweight, got {wanted!r}; name a word that it has")
        for row, positions in places:
            factors[row, positions.start : positions.stop] = factor
    return factors
