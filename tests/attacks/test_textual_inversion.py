from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from safetensors.torch import load_file
from stock import PORTRAIT, PROMPT
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.textual_inversion import TextualInversion, new_token
from antidiffusion.models.base import Surrogate

NEW, NEW_PORTRAIT = "a photo of <sks> person", "a dslr portrait of <sks> person"


@pytest.fixture
def single(surrogate: Surrogate) -> Surrogate:
    if len(surrogate.text_encoders) > 1:
        pytest.skip("one text encoder only")
    return surrogate


def test_equals_a_plain_training_loop(sd15, tiny: Surrogate, x: Tensor) -> None:
    """A tokenizer and a table with one row more, of which the optimiser has the row that is new."""
    pipe = stock.load(sd15.folder)
    pipe.tokenizer.add_tokens("<sks>")
    with torch.random.fork_rng():
        pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    table = pipe.text_encoder.get_input_embeddings()
    word, token = pipe.tokenizer.convert_tokens_to_ids(["person</w>", "<sks>"])
    vector = table.weight[word].detach().clone()
    known = table.weight.detach()[:token].clone()

    def embedding() -> dict[str, Any]:
        rows = torch.cat([known, vector[None]])
        table.forward = lambda ids: torch.nn.functional.embedding(ids, rows)
        return stock.embed(pipe, NEW)

    options: Any = {"steps": 3, "learning_rate": 1e-2}
    theirs = stock.train(pipe, [vector], [(1.0, x, embedding)], Generator().manual_seed(5), **options)
    with TextualInversion(**options, batch_size=1).tuned(x, PROMPT, tiny, 5) as tuned:
        torch.testing.assert_close(torch.tensor(tuned.losses), torch.tensor(theirs), rtol=1e-5, atol=1e-6)
        ours = tiny.text_encoders[0].get_input_embeddings().vector
        torch.testing.assert_close(ours, vector.detach(), rtol=0, atol=1e-4)


def test_diffusers_draws_the_same_with_the_file(checkpoint, single: Surrogate, x: Tensor, tmp_path: Path) -> None:
    with TextualInversion(steps=1, learning_rate=1.0, batch_size=1).tuned(x, PROMPT, single, 0) as tuned:
        ours = tuned.sample([PORTRAIT, "a red hat"], 0, steps=2, guidance=1)
        spelled = tuned.sample([NEW_PORTRAIT, "a red hat"], 0, steps=2, guidance=1)
        tuned.save(tmp_path)
    assert torch.equal(ours, spelled)
    pipe = stock.load(checkpoint.folder)
    untuned = stock.draw(pipe, [PORTRAIT, "a red hat"], 0)
    pipe.load_textual_inversion(tmp_path)
    theirs = stock.draw(pipe, [NEW_PORTRAIT, "a red hat"], 0)
    assert (theirs - ours).abs().max() < 1e-3
    assert (ours[0] - untuned[0]).abs().max() > 0.01
    assert (ours[1] - untuned[1]).abs().max() < 1e-3  # other words keep their meaning
    assert [file.name for file in tmp_path.iterdir()] == ["learned_embeds.safetensors"]
    state = load_file(tmp_path / "learned_embeds.safetensors")
    assert list(state) == ["<sks>"]
    assert state["<sks>"].shape == (1, single.text_encoders[0].config.hidden_size)


def test_the_token_starts_as_the_word(tiny: Surrogate) -> None:
    texts = ["a person in a hat", "a person, smiling", "tasks of sks1"]
    before = tiny.embed(texts).tokens
    with new_token(tiny, PROMPT, "sks", "person") as (token, vector):
        after = tiny.embed(["a SKS in a hat", "a <sks>, smiling", texts[2]]).tokens
        assert torch.equal(after, before)
        vector += torch.linspace(-1, 1, len(vector))
        moved = tiny.embed(["a sks in a hat"]).tokens
    assert token == "<sks>"
    assert (moved[0, :2] - before[0, :2]).abs().max() == 0  # what comes before it cannot see it
    assert (moved[0, 2:] - before[0, 2:]).abs().max() > 0.1


def test_two_text_encoders_are_refused(surrogate: Surrogate, x: Tensor) -> None:
    attack = TextualInversion(steps=1, sampling_steps=1)
    if len(surrogate.text_encoders) == 1:
        assert attack(x, Prompts(PORTRAIT, PROMPT), surrogate, 0).isfinite().all()
    else:
        with pytest.raises(ValueError, match="expected a model with one text encoder, got 2; use LoRA or DreamBooth"):
            attack(x, Prompts(PORTRAIT, PROMPT), surrogate, 0)


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a photo of a person", {}, r"expected the placeholder 'sks' in the text, got 'a photo of a person'; put"),
        ("a photo of tasks", {}, r"expected the placeholder 'sks' in the text"),
        (PROMPT, {"initializer": "zzyzx qwerty"}, r"expected an initializer of one token, got 'zzyzx qwerty' of \d+"),
        (PROMPT, {"initializer": ""}, r"expected an initializer of one token, got '' of 0; try 'person'"),
    ],
)
def test_impossible_words(tiny: Surrogate, x: Tensor, prompt: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextualInversion(steps=1, **settings)(x, Prompts(PORTRAIT, prompt), tiny, 0)


@pytest.mark.parametrize("placeholder", ["", "a b", "<sks>", "Sks", ".*"])
def test_impossible_placeholders(placeholder: str) -> None:
    with pytest.raises(ValueError, match=r"expected a placeholder of letters a-z and digits, got .*; try 'sks'"):
        TextualInversion(placeholder=placeholder)


def test_a_token_is_new(tiny: Surrogate) -> None:
    with new_token(tiny, PROMPT, "sks", "person"):
        known = pytest.raises(ValueError, match="expected a new token, got <sks>, which the tokenizer knows; take")
        with known, new_token(tiny, PROMPT, "sks", "person"):
            pass
