import warnings
from pathlib import Path

import pytest
import torch
from conftest import write_joint

from antidiffusion.models.base import Surrogate

PROMPT = "a photo of a dog"


@pytest.fixture(scope="module")
def sd35(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return Surrogate.from_pretrained(str(write_joint("sd35", tmp_path_factory.mktemp("sd35"))))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return Surrogate.from_pretrained(str(write_joint("sd3", tmp_path_factory.mktemp("sd3"))))


def test_the_picture_stands_before_the_text(sd35: Surrogate) -> None:
    assert sd35.places(sd35.cross_layers()[0], 288, 304) == (slice(0, 16), slice(16, 304), slice(0, 16))


def test_a_second_attention_sees_the_picture_alone(sd3: Surrogate, sd35: Surrogate) -> None:
    """`attn2` reads text in a UNet, and in 3.5 the picture."""
    assert sd3.self_layers() == sd3.cross_layers()
    alone = set(sd35.self_layers()) - set(sd35.cross_layers())
    assert alone == {f"transformer_blocks.{i}.attn2.processor" for i in (0, 1)}
    places = sd35.places(min(alone), 288, 16)
    assert torch.arange(16)[places.text].numel() == 0 and torch.arange(16)[places.picture].numel() == 16


def test_without_t5_its_tokens_are_zeros(sd3: Surrogate, sd35: Surrogate) -> None:
    tokens, told = sd3.embed([PROMPT]).tokens, sd35.embed([PROMPT]).tokens
    assert tokens.shape == told.shape == (1, 32 + 256, 32)
    assert not tokens[:, 32:].any() and told[:, 32:].abs().amin() > 0


def test_only_what_no_encoder_reads_is_called_cut(sd3: Surrogate, sd35: Surrogate) -> None:
    prompt = "dog " * 40  # more than CLIP's 32 tokens here, less than T5's 256
    with pytest.warns(UserWarning, match="cut off"):
        sd3.embed([prompt])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sd35.embed([prompt])


def test_a_folder_comes_back_the_same(sd3: Surrogate, tmp_path: Path) -> None:
    sd3.pipeline().save_pretrained(tmp_path / "again")
    assert Surrogate.from_pretrained(str(tmp_path / "again")).sha256 == sd3.sha256
