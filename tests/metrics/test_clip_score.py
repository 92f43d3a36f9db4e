import math
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TOKENIZER
from PIL import Image
from torch import Tensor

from antidiffusion.metrics.semantic import ClipScore, prepare

TEXTS = ["a photo of a woman with a red hat", "an old man"]
SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP model with random weights, and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    common: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4}
    text = common | {"vocab_size": len(tokenizer), "max_position_embeddings": 24}
    text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = common | {"image_size": SIDE, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def score(folder: Path) -> ClipScore:
    return ClipScore(str(folder))


def cosines(folder: Path, pixels: Tensor, texts: list[str]) -> list[float]:
    """Compute the similarities by hand from the two towers, one pair after the other."""
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for picture, text in zip(pixels, texts, strict=True):
            seen = model.visual_projection(model.vision_model(picture[None]).pooler_output)[0]
            tokens = tokenizer([text], return_tensors="pt").input_ids
            read = model.text_projection(model.text_model(tokens).pooler_output)[0]
            found.append(float(seen @ read / (seen.norm() * read.norm())))
    return found


def test_is_a_hundred_times_the_cosine_and_never_negative(folder: Path, score: ClipScore) -> None:
    x = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(0.1, 1, 8)[:, None, None, None]
    texts = [f"{text} {word}" for word in ("", "with glasses", "smiling", "on a beach") for text in TEXTS]
    expected = torch.tensor(cosines(folder, prepare(x, SIDE), texts))
    got = score(x, texts)
    assert expected.min() < 0 < expected.max()
    torch.testing.assert_close(got, 100 * expected.clamp(min=0), rtol=1e-4, atol=1e-4)
    assert got.shape == (8,) and got.dtype == torch.float32


def test_a_pair_is_itself_alone_and_in_another_place(score: ClipScore, x: Tensor) -> None:
    """Texts of other lengths in the batch are padding."""
    texts = ["a", "an old man with a beard and a hat"]
    together = score(x, texts)
    torch.testing.assert_close(score(x.flip(0), texts[::-1]).flip(0), together, rtol=1e-4, atol=1e-3)
    alone = torch.cat([score(x[i : i + 1], texts[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (50, 91), (100, 70), (20, 20)])
def test_pictures_are_prepared_as_by_the_library(size: tuple[int, int]) -> None:
    from transformers import CLIPImageProcessorPil

    y, x = np.mgrid[: size[0], : size[1]]
    texture = np.random.default_rng(0).integers(0, 40, (*size, 3))
    pixels = (np.stack([x + 60, y + 90, x + y], -1) + texture).astype(np.uint8)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    theirs = torch.as_tensor(processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"])
    ours = prepare(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255, SIDE)
    assert ours.shape == theirs.shape == (1, 3, SIDE, SIDE)
    assert (ours - theirs).abs().max() < 1.2 / 255 / 0.26


def test_text_beyond_the_window_is_cut_with_a_warning(score: ClipScore, x: Tensor) -> None:
    long = "a " * 30
    with pytest.warns(UserWarning, match=r"expected a prompt of at most 22 tokens, got 30; cut off"):
        cut = score(x[:1], [long])
    torch.testing.assert_close(cut, score(x[:1], ["a " * 22]), rtol=1e-4, atol=1e-4)


def test_wrong_arguments_are_refused(score: ClipScore, x: Tensor) -> None:
    for pictures, texts in ((x, TEXTS[:1]), (x, "aa"), (x, []), (x[0], TEXTS), (x * 255, TEXTS), (x * math.nan, TEXTS)):
        with pytest.raises(ValueError, match=r"expected .*, got .*; "):
            score(pictures, texts)


def test_a_model_that_is_not_here_is_not_fetched(folder: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"the network was asked for {arguments}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name in (str(tmp_path), "nobody/no-such-clip"):
        with pytest.raises(ValueError, match=rf"expected a CLIPModel .*, got '{name}': .*; hf download {name}"):
            ClipScore(name)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (pickled / file.name).write_bytes(file.read_bytes())
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected a CLIPModel in safetensors"):
        ClipScore(str(pickled))
