"""Textual Inversion: learn the embedding of one new token from a few photos of one person.

References:
    An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual Inversion, Gal et al., 2022,
    arXiv 2208.01618
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from antidiffusion.attacks.tuned import Task, Training, Tuning
from antidiffusion.models.base import Surrogate
from antidiffusion.models.tuning import described, drawn


@dataclass(frozen=True)
class TextualInversion(Tuning):
    """Learn one vector, float32 on a model of any precision; the defaults are the paper's.

    Inside the block the model reads the word `placeholder` of any prompt as the new token. Saves
    `learned_embeds.safetensors` for diffusers' `load_textual_inversion`; there, prompts say `<sks>` for "sks".

    Arguments:
        learning_rate: None for the paper's 5e-3.
        placeholder: Word of the prompts that the new token stands for.
        initializer: Word whose embedding the new token starts from, one token of the tokenizer.
    """

    steps: int = 5000
    batch_size: int = 4
    placeholder: str = "sks"
    initializer: str = "person"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_placeholder(self.placeholder)

    @contextmanager
    def _training(self, task: Task, surrogate: Surrogate) -> Iterator[Training]:
        loss = described(surrogate, [drawn(task.posterior, self.batch_size)], task.prompt)
        with new_token(surrogate, task.prompt, self.placeholder, self.initializer) as (token, vector):
            yield Training([vector], self.learning_rate or 5e-3, loss, partial(save_token, token, vector))


def check_placeholder(word: str) -> None:
    """Raise ValueError for a word that cannot become a new token."""
    if not re.fullmatch(r"[a-z0-9]+", word):
        raise ValueError(f"expected a placeholder of letters a-z and digits, got {word!r}; try 'sks'")


def save_token(token: str, vector: Tensor, folder: Path) -> None:
    """Write a token's embedding `(d,)` for diffusers' `load_textual_inversion`."""
    from safetensors.torch import save_file

    save_file({token: vector.detach()[None]}, folder / "learned_embeds.safetensors", {"format": "pt"})


class _Tokenizer:
    """A tokenizer that reads a word as a token that was added."""

    def __init__(self, tokenizer: Any, word: str, token: str) -> None:
        self._tokenizer, self._token = tokenizer, token
        self._word = re.compile(rf"(?<![\w<]){word}(?![\w>])", re.IGNORECASE)

    def __call__(self, texts: str | Sequence[str], **options: Any) -> Any:
        if isinstance(texts, str):
            return self._tokenizer(self.replace(texts), **options)
        return self._tokenizer([self.replace(text) for text in texts], **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while it is copied, it has no tokenizer yet
            raise AttributeError(name)
        return getattr(self._tokenizer, name)

    def replace(self, text: str) -> str:
        return self._word.sub(self._token, text)


class _Embeddings(torch.nn.Module):
    """A table of token embeddings with one vector of its own, `(d,)`, for one token."""

    def __init__(self, table: torch.nn.Embedding, token_id: int, vector: Tensor) -> None:
        super().__init__()
        self.table, self.token_id, self.vector = table, token_id, vector

    @property
    def weight(self) -> Tensor:
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        new = ids == self.token_id
        known = self.table(ids.masked_fill(new, 0))
        return torch.where(new[..., None], self.vector.to(known), known)


@contextmanager
def new_token(surrogate: Surrogate, prompt: str, word: str, initializer: str) -> Iterator[tuple[str, Tensor]]:
    """Let the surrogate read a word as a new token inside the block.

    Arguments:
        surrogate: The model; tokenizer and weights are afterwards what they were.
        prompt: A text that must hold the word.
        word: The word.
        initializer: Word whose embedding the new token starts from.

    Returns:
        The token as it is saved, and its embedding `(d,)` float32.

    Raises:
        ValueError: If the model has several text encoders, the prompt lacks the word, or a word does not fit.
    """
    if (found := len(surrogate.text_encoders)) != 1:
        raise ValueError(f"expected a model with one text encoder, got {found}; use LoRA or DreamBooth")
    tokenizer, encoder, token = surrogate.tokenizers[0], surrogate.text_encoders[0], f"<{word}>"
    start = tokenizer(initializer, add_special_tokens=False).input_ids
    if len(start) != 1:
        raise ValueError(f"expected an initializer of one token, got {initializer!r} of {len(start)}; try 'person'")
    extended = copy.deepcopy(tokenizer)
    if not extended.add_tokens(token):
        raise ValueError(f"expected a new token, got {token}, which the tokenizer knows; take another placeholder")
    wrapped = _Tokenizer(extended, word, token)
    if token not in wrapped.replace(prompt):
        raise ValueError(f"expected the placeholder {word!r} in the text, got {prompt!r}; put it where the person is")
    table = encoder.get_input_embeddings()
    vector = table.weight[start[0]].detach().float().clone()
    try:
        encoder.set_input_embeddings(_Embeddings(table, extended.convert_tokens_to_ids(token), vector))
        surrogate.tokenizers[0] = wrapped
        yield token, vector
    finally:
        encoder.set_input_embeddings(table)
        surrogate.tokenizers[0] = tokenizer
