from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from safetensors.torch import load_file
from stock import PORTRAIT, PROMPT
from torch import Generator, Tensor

from antidiffusion.attacks.custom_diffusion import FILE, CustomDiffusion
from antidiffusion.models.base import Surrogate


def keys_and_values(unet: Any) -> dict[str, Tensor]:
    state = unet.state_dict()
    return {name: state[name] for name in state if "attn2.to_k" in name or "attn2.to_v" in name}


def test_equals_a_plain_training_loop(sd15, tiny: Surrogate, x: Tensor) -> None:
    pipe = stock.load(sd15.folder)
    pipe.unet.requires_grad_(False)
    parameters = [p for name, p in pipe.unet.named_parameters() if "attn2.to_k" in name or "attn2.to_v" in name]
    with torch.no_grad():
        embedding = stock.embed(pipe, PROMPT)
    generator = Generator().manual_seed(5)
    options: Any = {"steps": 3, "learning_rate": 1e-3}
    theirs = stock.train(pipe, parameters, [(1.0, x, lambda: embedding)], generator, **options)
    with CustomDiffusion(**options, batch_size=1).tuned(x, PROMPT, tiny, 5) as tuned:
        torch.testing.assert_close(torch.tensor(tuned.losses), torch.tensor(theirs), rtol=1e-5, atol=1e-6)
        expected = keys_and_values(pipe.unet)
        for name, value in keys_and_values(tiny.denoiser).items():
            assert (value - expected[name]).abs().mean() < 1e-5


def test_only_what_reads_the_text_is_tuned(tiny: Surrogate, x: Tensor) -> None:
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in tiny.modules]
    with CustomDiffusion(steps=1).tuned(x, PROMPT, tiny, 0):
        pairs = zip(before, tiny.modules, strict=True)
        changed = {n for old, part in pairs for n, value in part.state_dict().items() if not value.equal(old[n])}
    assert changed == keys_and_values(tiny.denoiser).keys()


def test_diffusers_draws_the_same_with_the_file(checkpoint, surrogate: Surrogate, x: Tensor, tmp_path: Path) -> None:
    with CustomDiffusion(steps=1, learning_rate=0.1).tuned(x, PROMPT, surrogate, 0) as tuned:
        ours = tuned.sample(PORTRAIT, 0, steps=2, guidance=1)
        tuned.save(tmp_path)
    pipe = stock.load(checkpoint.folder)
    untuned = stock.draw(pipe, [PORTRAIT], 0)
    pipe.unet.load_attn_procs(tmp_path, weight_name=FILE, _pipeline=pipe)
    assert (stock.draw(pipe, [PORTRAIT], 0) - ours).abs().max() < 1e-3
    assert (ours - untuned).abs().max() > 0.02
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    tuned_weights = sum(value.numel() for value in keys_and_values(surrogate.denoiser).values())
    assert sum(value.numel() for value in load_file(tmp_path / FILE).values()) == tuned_weights


def test_a_new_token_is_learnt_with_the_weights(sd15, tiny: Surrogate, x: Tensor, tmp_path: Path) -> None:
    attack = CustomDiffusion(steps=2, learning_rate=0.1, placeholder="sks")
    with attack.tuned(x, PROMPT, tiny, 0) as tuned:
        ours = tuned.sample([PORTRAIT, PROMPT], 0, steps=2, guidance=1)
        tuned.save(tmp_path)
    pipe = stock.load(sd15.folder)
    pipe.unet.load_attn_procs(tmp_path, weight_name=FILE, _pipeline=pipe)
    pipe.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    theirs = stock.draw(pipe, [text.replace("sks", "<sks>") for text in (PORTRAIT, PROMPT)], 0)
    assert (theirs - ours).abs().max() < 1e-3
    start = pipe.tokenizer("person", add_special_tokens=False).input_ids[0]
    vectors = pipe.text_encoder.get_input_embeddings().weight
    assert (vectors[pipe.tokenizer.convert_tokens_to_ids("<sks>")] - vectors[start]).abs().max() > 0.1


def test_the_prior_is_learnt_beside_the_person(tiny: Surrogate, x: Tensor) -> None:
    options: Any = {"steps": 1, "sampling_steps": 1, "class_pictures": 2}
    losses = []
    for weight in (0.0, 1.0):
        attack = CustomDiffusion(**options, class_prompt=PORTRAIT, prior_weight=weight)
        with attack.tuned(x, PROMPT, tiny, 0) as tuned:
            losses += tuned.losses
    assert 0.1 < losses[0] < losses[1]


@pytest.mark.parametrize("placeholder", ["", "<sks>"])
def test_impossible_placeholders(placeholder: str) -> None:
    with pytest.raises(ValueError, match="expected a placeholder of letters"):
        CustomDiffusion(placeholder=placeholder)
