from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from stock import PORTRAIT, PROMPT
from torch import Generator, Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.lora import LoRA, load_lora
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import sample

FILE = "pytorch_lora_weights.safetensors"


def drawn(surrogate: Surrogate, seed: int = 0) -> Tensor:
    return sample([PORTRAIT], surrogate, Generator().manual_seed(seed), steps=2, guidance=1, size=(64, 64))


def made_by_diffusers(folder: Path, pipe: Any) -> None:
    """Save random adapters of another rank, scale and choice of layers, for the text encoder too."""
    layers: dict[str, Any] = {}
    for part, targets in (("unet", ["to_k", "to_v"]), ("text_encoder", ["q_proj", "out_proj"])):
        module = getattr(pipe, part)
        module.add_adapter(LoraConfig(r=6, lora_alpha=12, init_lora_weights=False, target_modules=targets))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
        layers[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    pipe.save_lora_weights(folder, **layers)


def test_equals_a_plain_training_loop(checkpoint, surrogate: Surrogate, x: Tensor) -> None:
    pipe = stock.load(checkpoint.folder)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        pipe.unet.requires_grad_(False)
        adapted = get_peft_model(pipe.unet, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    with torch.no_grad():
        embedding = stock.embed(pipe, PROMPT)
    generator = Generator().manual_seed(5)
    options: Any = {"steps": 3, "learning_rate": 1e-2}
    theirs = stock.train(pipe, parameters, [(1.0, x, lambda: embedding)], generator, **options)
    with LoRA(**options).tuned(x, PROMPT, surrogate, 5) as tuned:
        torch.testing.assert_close(
            torch.tensor(tuned.losses), torch.tensor(theirs), rtol=1e-4, atol=1e-6
        )  # convolutions sum in an order of the processor


def test_diffusers_draws_the_same_with_the_file(checkpoint, surrogate: Surrogate, x: Tensor, tmp_path: Path) -> None:
    untuned = drawn(surrogate)
    with LoRA(steps=2, learning_rate=3e-2).tuned(x, PROMPT, surrogate, 0) as tuned:
        ours = tuned.sample(PORTRAIT, 0, steps=2, guidance=1)
        tuned.save(tmp_path / "new" / "lora")
    pipe = stock.load(checkpoint.folder)
    pipe.load_lora_weights(tmp_path / "new" / "lora")
    assert (stock.draw(pipe, [PORTRAIT], 0) - ours).abs().max() < 1e-3
    assert (ours - untuned).abs().max() > 0.02
    assert [file.name for file in (tmp_path / "new" / "lora").iterdir()] == [FILE]
    with load_lora(surrogate, tmp_path / "new" / "lora"):
        torch.testing.assert_close(drawn(surrogate), ours, rtol=0, atol=1e-5)


def test_draws_the_same_as_diffusers_with_its_file(sd15, tiny: Surrogate, tmp_path: Path) -> None:
    untuned, before = drawn(tiny), [list(module.state_dict()) for module in tiny.modules]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made_by_diffusers(tmp_path, stock.load(sd15.folder))
    pipe = stock.load(sd15.folder)
    pipe.load_lora_weights(tmp_path)
    theirs = stock.draw(pipe, [PORTRAIT], 0)
    for path in (tmp_path, tmp_path / FILE):
        with load_lora(tiny, path):
            ours = drawn(tiny)
            assert not any(p.requires_grad for module in tiny.modules for p in module.parameters())
        assert (ours - theirs).abs().max() < 1e-3
        assert (ours - untuned).abs().max() > 0.02
    assert [list(module.state_dict()) for module in tiny.modules] == before
    assert torch.equal(drawn(tiny), untuned)


def test_text_encoders_are_adapted_if_wanted(checkpoint, surrogate: Surrogate, x: Tensor, tmp_path: Path) -> None:
    before = [{name: value.clone() for name, value in part.state_dict().items()} for part in surrogate.modules]
    attack = LoRA(steps=2, learning_rate=3e-2, text_encoder=True)
    with attack.tuned(x, PROMPT, surrogate, 0) as tuned:
        ours = tuned.sample(PORTRAIT, 0, steps=2, guidance=1)
        tuned.save(tmp_path)
    parts = {name.split(".")[0] for name in load_file(tmp_path / FILE)}
    assert parts == {"unet", "text_encoder", *(["text_encoder_2"] if len(surrogate.text_encoders) == 2 else [])}
    pipe = stock.load(checkpoint.folder)
    pipe.load_lora_weights(tmp_path)
    assert (stock.draw(pipe, [PORTRAIT], 0) - ours).abs().max() < 1e-3
    with load_lora(surrogate, tmp_path):
        torch.testing.assert_close(drawn(surrogate), ours, rtol=0, atol=1e-5)
    for old, part in zip(before, surrogate.modules, strict=True):
        state = part.state_dict()
        assert state.keys() == old.keys()
        assert all(state[name].equal(value) for name, value in old.items())


@pytest.mark.parametrize("rank", [4, 16])
def test_the_rank_is_the_adapters(tiny: Surrogate, x: Tensor, tmp_path: Path, rank: int) -> None:
    with LoRA(steps=1, rank=rank).tuned(x, PROMPT, tiny, 0) as tuned:
        tuned.save(tmp_path)
    state = load_file(tmp_path / FILE)
    assert len(state) == 2 * 4 * 32  # A and B of q, k, v and out in 2 attentions of 16 transformer blocks
    assert {min(value.shape) for value in state.values()} == {rank}


def test_impossible_ranks() -> None:
    with pytest.raises(ValueError, match="expected rank of at least 1, got 0"):
        LoRA(rank=0)


def test_files_that_do_not_fit(tiny: Surrogate, x: Tensor, tmp_path: Path) -> None:
    def refused(reason: str) -> None:
        before = list(tiny.denoiser.state_dict())
        with pytest.raises(ValueError, match=f"expected a LoRA of this model in .*{reason}"), load_lora(tiny, tmp_path):
            pass
        assert list(tiny.denoiser.state_dict()) == before
        assert not getattr(tiny.denoiser, "peft_config", None)

    refused("got an error")
    with LoRA(steps=1).tuned(x, PROMPT, tiny, 0) as tuned:
        tuned.save(tmp_path)
        with pytest.raises(ValueError, match="expected a unet without adapters, got tuning"), load_lora(tiny, tmp_path):
            pass
        assert tiny.denoiser.peft_config
    state = load_file(tmp_path / FILE)
    save_file({f"other.{key}": value for key, value in state.items()}, tmp_path / FILE)
    refused("got ")
    save_file({key: value.repeat(2, 2) for key, value in state.items()}, tmp_path / FILE)
    refused("got an error: ")
    (tmp_path / FILE).write_bytes(b"no safetensors")
    refused("got an error: ")


def test_adapters_are_not_stacked(tiny: Surrogate, x: Tensor, tmp_path: Path) -> None:
    with LoRA(steps=1).tuned(x, PROMPT, tiny, 0) as tuned:
        tuned.save(tmp_path)
    with load_lora(tiny, tmp_path):
        loaded = list(tiny.denoiser.state_dict())
        with pytest.raises(ValueError, match="expected a unet without adapters, got default_0; take"):
            LoRA(steps=1)(x, Prompts(PORTRAIT, PROMPT), tiny, 0)
        assert list(tiny.denoiser.state_dict()) == loaded
