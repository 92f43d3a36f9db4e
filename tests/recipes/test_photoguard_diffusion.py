import pytest
import torch
from ascents import seeded
from torch import Tensor

from antidiffusion.attacks.base import Prompts
from antidiffusion.attacks.sdedit import SDEdit
from antidiffusion.models.base import Surrogate
from antidiffusion.recipes.photoguard_diffusion import EditTarget


@pytest.fixture
def target() -> Tensor:
    return torch.rand(1, 3, 64, 64, generator=seeded(9))


def test_an_edit_without_noise_is_sdedit(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    embedding = tiny.embed(["a photo"])
    objective = EditTarget(tiny, embedding, target, strength=0.7, denoising_steps=4, eta=0.0)
    expected = SDEdit(strength=0.7, guidance=1.0, steps=6)(x, Prompts("a photo"), tiny, seed=3)
    with torch.no_grad():
        edited = objective.edit(x, seeded(3))
    torch.testing.assert_close(edited.clamp(0, 1), expected, rtol=1e-3, atol=1e-4)
    distance = 2 * (edited - target).square().sum((1, 2, 3)).sqrt()
    torch.testing.assert_close(objective(x, seeded(3)), -distance)


def test_the_gradient_passes_through_every_step_of_the_edit(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    objective = EditTarget(tiny, tiny.embed([""]), target, denoising_steps=3, eta=0.0)
    outputs: list[Tensor] = []
    hook = tiny.denoiser.register_forward_hook(lambda module, arguments, output: outputs.append(output.sample))
    leaf = x.clone().requires_grad_()
    loss = objective(leaf, seeded()).sum()
    hook.remove()
    gradients = torch.autograd.grad(loss, [leaf, *outputs])
    assert len(outputs) == 3 and all(gradient.abs().sum() > 0 for gradient in gradients)
    # a step along the gradient raises the objective by what the gradient says
    direction = gradients[0] / gradients[0].norm()
    with torch.no_grad():
        risen = (objective(x + 0.1 * direction, seeded()) - objective(x - 0.1 * direction, seeded())).sum() / 0.2
    assert risen == pytest.approx(gradients[0].norm().item(), rel=0.1)


def test_ddpm_noise_makes_edits_random(tiny: Surrogate, x: Tensor, target: Tensor) -> None:
    noisy, calm = (EditTarget(tiny, tiny.embed([""]), target, eta=eta) for eta in (1.0, 0.0))
    with torch.no_grad():
        assert not torch.allclose(noisy.edit(x, seeded()), calm.edit(x, seeded()))
        assert torch.equal(noisy.edit(x, seeded()), noisy.edit(x, seeded()))
