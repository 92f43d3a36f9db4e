import pytest
import torch
from ascents import ask, draws, seeded, slope
from torch import Tensor

from antidiffusion.models.base import Embedding, Surrogate
from antidiffusion.recipes.objectives import Denoising
from antidiffusion.recipes.sds import Distillation


@pytest.fixture
def embedding(tiny: Surrogate) -> Embedding:
    return tiny.embed(["a photo of a person"])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_distillation_pulls_the_error_back_through_the_encoder_only(
    tiny: Surrogate, x: Tensor, embedding: Embedding, sign: float
) -> None:
    leaf, generator = x.clone().requires_grad_(), seeded()
    z, n = draws(tiny, leaf, generator)
    t = torch.randint(1000, (2,), generator=generator)
    with torch.no_grad():
        error = ask(tiny, z, n, t, embedding) - n
    (expected,) = torch.autograd.grad(z, leaf, sign * error)
    watched: list[bool] = []
    hook = tiny.denoiser.register_forward_hook(lambda *_: watched.append(torch.is_grad_enabled()))
    objective = Distillation(tiny, embedding, sign)
    found = slope(objective, x)
    hook.remove()
    assert watched == [False]
    assert torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), 0) > 0.9999
    torch.testing.assert_close(objective(x, seeded()), sign * Denoising(tiny, embedding)(x, seeded()))
