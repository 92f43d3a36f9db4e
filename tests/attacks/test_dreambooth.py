import json
from pathlib import Path
from typing import Any

import pytest
import stock
import torch
from stock import PORTRAIT, PROMPT
from torch import Generator, Tensor

from antidiffusion.attacks.dreambooth import DreamBooth
from antidiffusion.models.base import Surrogate
from antidiffusion.models.sampling import sample

OPTIONS: dict[str, Any] = {"steps": 2, "learning_rate": 1e-4}
CLASS = "a photo of person"


def drawn(surrogate: Surrogate) -> Tensor:
    return sample([PORTRAIT], surrogate, Generator().manual_seed(0), steps=2, guidance=1, size=(64, 64))


def test_equals_a_plain_training_loop(sd15, tiny: Surrogate, x: Tensor) -> None:
    pipe = stock.load(sd15.folder)
    with torch.no_grad():
        embedding = stock.embed(pipe, PROMPT)
    generator = Generator().manual_seed(5)
    theirs = stock.train(pipe, list(pipe.unet.parameters()), [(1.0, x, lambda: embedding)], generator, **OPTIONS)
    with DreamBooth(**OPTIONS, batch_size=1).tuned(x, PROMPT, tiny, 5) as tuned:
        torch.testing.assert_close(torch.tensor(tuned.losses), torch.tensor(theirs), rtol=1e-4, atol=1e-6)


def test_prior_and_text_encoder_equal_a_plain_training_loop(sd15, tiny: Surrogate, x: Tensor) -> None:
    pipe, generator = stock.load(sd15.folder), Generator().manual_seed(5)
    pictures = []
    for count in (4, 1):  # four at once
        latents = torch.randn((count, 4, 8, 8), generator=generator)
        options: Any = {"num_inference_steps": 1, "guidance_scale": 5.0, "height": 64, "width": 64}
        pictures.append(pipe([CLASS] * count, latents=latents, output_type="pt", **options).images)
    terms = [
        (1.0, x, lambda: stock.embed(pipe, PROMPT)),
        (0.5, torch.cat(pictures), lambda: stock.embed(pipe, CLASS)),
    ]
    parameters = [parameter for part in (pipe.unet, pipe.text_encoder) for parameter in part.parameters()]
    theirs = stock.train(pipe, parameters, terms, generator, **OPTIONS)
    prior: Any = {"class_prompt": CLASS, "class_pictures": 5, "prior_weight": 0.5, "sampling_steps": 1}
    attack = DreamBooth(**OPTIONS, **prior, batch_size=1, guidance=5.0, text_encoder=True)
    with attack.tuned(x, PROMPT, tiny, 5) as tuned:
        torch.testing.assert_close(torch.tensor(tuned.losses), torch.tensor(theirs), rtol=1e-4, atol=1e-6)
        ours, expected = (encoder.state_dict() for encoder in (tiny.text_encoders[0], pipe.text_encoder))
        assert all((ours[name] - expected[name]).abs().mean() < 1e-5 for name in expected)


def test_the_folder_loads_everywhere(checkpoint, surrogate: Surrogate, x: Tensor, tmp_path: Path) -> None:
    untuned = drawn(surrogate)
    attack = DreamBooth(steps=1, learning_rate=1e-3, text_encoder=True)
    with attack.tuned(x, PROMPT, surrogate, 0) as tuned:
        ours = tuned.sample(PORTRAIT, 0, steps=2, guidance=1)
        tuned.save(tmp_path)
    assert (ours - untuned).abs().max() > 0.02
    reloaded = Surrogate.from_pretrained(str(tmp_path))
    torch.testing.assert_close(drawn(reloaded), ours, rtol=0, atol=1e-5)
    assert reloaded.size == surrogate.size
    assert (stock.draw(stock.load(tmp_path), [PORTRAIT], 0) - ours).abs().max() < 1e-3
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".bin", ".pt", ".pkl")]


def test_the_folder_keeps_the_step_sizes(mini: Surrogate, x: Tensor, tmp_path: Path) -> None:
    with DreamBooth(steps=1).tuned(x[:1], PROMPT, mini, 0) as tuned:
        tuned.save(tmp_path)
    again = Surrogate.from_pretrained(str(tmp_path))
    rates = (mini.learning_rate, mini.lora_learning_rate)
    assert (again.learning_rate, again.lora_learning_rate) == rates
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_impossible_numbers_of_class_pictures() -> None:
    with pytest.raises(ValueError, match="expected class_pictures of at least 1, got 0"):
        DreamBooth(class_prompt=CLASS, class_pictures=0)
