from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import antidiffusion.attacks.prompt_to_prompt
from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.prompt_to_prompt import (
    PromptToPrompt,
    correspondence,
    inject_cross,
    inject_self,
    reweighted,
)
from antidiffusion.models.attention import Watched, editing
from antidiffusion.models.base import Places, Surrogate
from antidiffusion.models.sampling import denoise, invert, way_down

SOURCE, TARGET = "a portrait of a person", "a portrait of a person wearing a hat"
PROMPTS = Prompts(TARGET, SOURCE)
OFF: Any = {"cross_replace": 0.0, "self_replace": 0.0}
ON: Any = {"cross_replace": 1.0, "self_replace": 1.0}


def plain(x: Tensor, surrogate: Surrogate, prompts: Prompts, steps: int, guidance: float) -> Tensor:
    """Invert with the source and denoise with the target, without any control."""
    times = way_down(surrogate, x.shape[-2], x.shape[-1], steps)
    source, target = surrogate.embed([str(prompts.source)]), surrogate.embed([str(prompts.target)])
    with torch.no_grad():
        z = surrogate.encode(x, Generator().manual_seed(3))
    noise = invert(z, times, source, surrogate)[0]
    return surrogate.decode(denoise(noise, times, target, surrogate, guidance=guidance))


def test_without_injection_it_is_plain(surrogate: Surrogate, x: Tensor) -> None:
    expected = plain(x, surrogate, PROMPTS, 2, 4.0)
    ours = PromptToPrompt(steps=2, guidance=4.0, **OFF)(x, PROMPTS, surrogate, 3)
    assert ours.shape == x.shape
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    for share in ON:
        injected = PromptToPrompt(steps=2, guidance=4.0, **OFF | {share: 1.0})(x, PROMPTS, surrogate, 3)
        assert (injected - expected).abs().max() > 2e-3


def test_the_source_s_own_text_draws_the_source(surrogate: Surrogate, x: Tensor) -> None:
    prompts = Prompts(SOURCE, SOURCE)
    expected = plain(x, surrogate, prompts, 2, 1.0)
    ours = PromptToPrompt(steps=2, guidance=1.0, **ON)(x, prompts, surrogate, 3)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_shares_of_the_steps(tiny: Surrogate, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    edits: dict[str, list[tuple[int, ...]]] = {"cross": [], "self": []}

    def counted(edit: Any, *, text: bool, most: int | None = None) -> Any:
        def spied(maps: Tensor) -> Tensor:
            edits["cross" if text else "self"].append((len(maps), maps.shape[2]))
            return edit(maps)

        return editing(spied, text=text, most=most)

    monkeypatch.setattr(antidiffusion.attacks.prompt_to_prompt, "editing", counted)
    PromptToPrompt(steps=5)(x, PROMPTS, tiny, 0)
    assert {batch for found in edits.values() for batch, _ in found} == {6}
    assert len(edits["cross"]) == 4 * 16  # 0.8 of 5 steps, all layers
    assert len(edits["self"]) == 2 * 11  # 0.4 of 5 steps, all but the finest five
    assert {positions for _, positions in edits["self"]} == {1, 4, 16}


def mixed(attend: Any, maps: Tensor) -> Tensor:
    """Return the probabilities that an attention makes of others, `(B, heads, N, 3)`: values are the unit vectors."""
    eye = torch.eye(3).expand(*maps.shape[:2], 3, 3)
    return attend(maps.log(), eye, eye, 1.0, Places(slice(None), slice(None), slice(None)))


def test_injection_changes_only_the_target() -> None:
    maps = torch.rand(3 * 2, 4, 5, 3, generator=Generator().manual_seed(0)).softmax(-1)
    mapping = torch.tensor([[[1.0, 0, 0], [0, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0], [0, 0, 1]]])
    factors = torch.tensor([[1.0, 2, 1], [1, 1, 3]])
    found = mixed(inject_cross(mapping, factors), maps)
    torch.testing.assert_close((found[:2], found[4:]), (maps[:2], maps[4:]))
    expected = [maps[0, ..., 0], 2 * maps[0, ..., 2], maps[2, ..., 2]]
    torch.testing.assert_close(found[2], torch.stack(expected, -1))
    torch.testing.assert_close(found[3], torch.stack([maps[3, ..., 0], maps[3, ..., 1], 3 * maps[1, ..., 2]], -1))
    for count in (6, 4):  # with guidance and without
        expected = torch.cat([maps[:2], maps[:2], maps[4:]])[:count]
        torch.testing.assert_close(mixed(inject_self(2, 5), maps[:count]), expected)
        torch.testing.assert_close(mixed(inject_self(2, 4), maps[:count]), maps[:count])  # finer than coarse


@pytest.mark.parametrize("text", ["A photo,of  Zanzibar!? (1999)", "x" * 40, "don't  'quote' semi;colon", "", " . "])
def test_words_cover_the_tokens(tiny: Surrogate, text: str) -> None:
    tokenizer = tiny.tokenizers[0]
    found = tiny.words(text)
    room = tokenizer.model_max_length - 1
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert [place for _, positions in found for place in positions] == list(range(1, min(1 + len(ids), room)))
    assert "".join(word for word, _ in found) == "".join(text.lower().split())


def test_a_comma_is_a_word_of_its_own(tiny: Surrogate) -> None:
    found = tiny.words("a person, smiling")
    assert [word for word, _ in found] == ["a", "person", ",", "smiling"]


def test_a_name_added_to_the_tokenizer_is_one_word(tiny: Surrogate) -> None:
    model, tokenizer = copy(tiny), deepcopy(tiny.tokenizers[0])
    tokenizer.add_tokens(["<a.b>"])
    model.tokenizers = [tokenizer]
    assert model.words("see <a.b> here")[1][0] == "<a.b>"
    assert sum(len(positions) for _, positions in model.words("<a.b>")) == 1


def named(*lengths: tuple[str, int]) -> list[tuple[str, range]]:
    ends = [1 + sum(length for _, length in lengths[: number + 1]) for number in range(len(lengths))]
    return [(word, range(end - length, end)) for (word, length), end in zip(lengths, ends, strict=True)]


def test_refinement_keeps_the_shared_words() -> None:
    source = named(("a", 1), ("cat", 2))
    target = named(("a", 1), ("red", 1), ("cat", 2), ("sits", 1))
    mapping = correspondence(source, target, 10)
    expected = torch.zeros(10, 10)
    for old, new in [(0, 0), (1, 1), (2, 3), (3, 4), (4, 6), (7, 7), (8, 8), (9, 9)]:
        expected[old, new] = 1
    assert torch.equal(mapping, expected)


def test_a_swapped_word_takes_the_other_s_place() -> None:
    mapping = correspondence(named(("a", 1), ("cat", 2), ("sits", 1)), named(("a", 1), ("elephant", 3), ("sits", 1)), 9)
    assert (mapping[2:4, 2:5] == 1 / 3).all() and mapping[4, 5] == 1 and mapping[5, 6] == 1
    assert mapping.sum() == pytest.approx(1 + 1 + 2 + 1 + 1 + 2)
    same = correspondence(named(("big", 1), ("cat", 2)), named(("tall", 1), ("dog", 2)), 9)
    assert torch.equal(same, torch.eye(9))


def test_other_numbers_of_words_keep_their_own_maps() -> None:
    mapping = correspondence(named(("cat", 1)), named(("red", 1), ("dog", 1)), 6)
    assert mapping[:, 1:3].sum() == 0 and mapping[2, 3] == 1


def test_the_same_text_corresponds_to_itself(tiny: Surrogate) -> None:
    for text in ("", TARGET, "very " * 40):
        found = tiny.words(text)
        assert torch.equal(correspondence(found, found, 32), torch.eye(32))


def test_reweighting(tiny: Surrogate, x: Tensor) -> None:
    texts = [tiny.words(text) for text in (TARGET, SOURCE)]
    factors = reweighted(texts, [("HAT", 3.0), ("person", 0.5)], 32)
    assert {place: value for place, value in enumerate(factors[0].tolist()) if value != 1} == {
        **dict.fromkeys(texts[0][4][1], 0.5),
        **dict.fromkeys(texts[0][7][1], 3.0),
    }
    edits = [PromptToPrompt(steps=2, reweight=w)(x, PROMPTS, tiny, 0) for w in ((), (("hat", 1.0),), (("hat", 9.0),))]
    assert torch.equal(edits[0], edits[1]) and (edits[2] - edits[0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="expected words of the target in reweight, got 'dog'; name a word"):
        PromptToPrompt(reweight=(("dog", 2.0),))(x, PROMPTS, tiny, 0)


def test_the_seed_decides_and_a_batch_does_not(tiny: Surrogate) -> None:
    x = torch.rand(2, 3, 64, 128, generator=Generator().manual_seed(0))
    edit, prompts = PromptToPrompt(steps=2), Prompts([TARGET, "a red hat"], [SOURCE, "a blue hat"])
    first, same, other = (edit(x, prompts, tiny, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first.shape == x.shape and first.min() >= 0 and first.max() <= 1
    torch.testing.assert_close(edit(x[:1], PROMPTS, tiny, 1), first[:1], rtol=1e-3, atol=1e-3)


def test_processors_come_back_after_an_error(tiny: Surrogate, x: Tensor) -> None:
    before = tiny.denoiser.attn_processors

    def stop(stage: str, done: int, total: int) -> None:
        if done == 3:
            assert sum(isinstance(value, Watched) for value in tiny.denoiser.attn_processors.values()) == 32
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        PromptToPrompt(steps=2, **ON)(x, PROMPTS, tiny, 0, progress=stop)
    assert all(value is before[name] for name, value in tiny.denoiser.attn_processors.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "expected at least 1 step, got 0"),
        ({"cross_replace": 1.1}, r"expected cross_replace in \[0, 1\], got 1.1"),
        ({"self_replace": -1}, r"expected self_replace in \[0, 1\], got -1"),
    ],
)
def test_impossible_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PromptToPrompt(**options)


def test_impossible_calls(tiny: Surrogate, x: Tensor) -> None:
    with pytest.raises(ValueError, match="expected a source text that says what the picture shows, got none"):
        PromptToPrompt()(x, Prompts(TARGET), tiny, 0)
    with pytest.raises(ValueError, match="one for each of 2 pictures, got 3"):
        PromptToPrompt()(x, Prompts([TARGET] * 3, SOURCE), tiny, 0)
    with pytest.raises(ValueError, match="multiples of 64, got 100 x 64; resize"):
        PromptToPrompt()(torch.rand(1, 3, 64, 100), PROMPTS, tiny, 0)
