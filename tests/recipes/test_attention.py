import numpy as np
import pytest
import torch
from ascents import canvas, run, seeded, slope
from conftest import write_joint
from torch import Tensor

from antidiffusion.models.attention import record_attention
from antidiffusion.models.base import Surrogate
from antidiffusion.models.memory import low_memory
from antidiffusion.models.schedule import noised
from antidiffusion.recipes import Attention
from antidiffusion.recipes.attention import EarlyAttention, first_maps
from antidiffusion.recipes.semantic import entropy, mass


@pytest.fixture(params=["unet", "joint"])
def model(request: pytest.FixtureRequest, tiny: Surrogate) -> Surrogate:
    return tiny if request.param == "unet" else request.getfixturevalue("sd3")


@pytest.fixture(scope="module")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Surrogate:
    return Surrogate.from_pretrained(str(write_joint("sd3", tmp_path_factory.mktemp("sd3"))))


def noisy(model: Surrogate, x: Tensor) -> tuple[Tensor, Tensor]:
    z = model.posterior(x).mean
    n, t = model.draw(z, seeded())
    return noised(model.schedule, z, n, t), t


@pytest.mark.parametrize("count", [1, 2])
@torch.no_grad()
def test_the_first_maps_are_those_of_a_whole_pass_and_nothing_runs_after(
    model: Surrogate, x: Tensor, count: int
) -> None:
    (z_t, t), told, layers = noisy(model, x), model.embed(["a photo"]), model.cross_layers()
    with record_attention(model, layers[:count]) as whole:
        model.predict(z_t, t, told)
    ran: list[str] = []
    names = {name: module for name, module in model.denoiser.named_modules() if name.endswith((".attn", ".attn2"))}
    hooks = [m.register_forward_pre_hook(lambda *_, name=name: ran.append(name)) for name, m in names.items()]
    found = first_maps(model, layers[:count], z_t, t, told)
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, torch.cat([layer.flatten(1, 2) for layer in whole], 1))
    assert [f"{name}.processor" for name in ran] == layers[:count]
    assert not any(module._forward_pre_hooks for module in model.denoiser.modules())
    torch.testing.assert_close(model.predict(z_t, t, told), model.predict(z_t, t, told), rtol=0, atol=0)


def test_the_objective_is_the_mean_of_its_term_over_draws(model: Surrogate, x: Tensor) -> None:
    told = model.embed([""])
    objective = EarlyAttention(model, told, "entropy", x, draws=3)
    generator, leaf = seeded(), x.clone().requires_grad_()
    z = model.encode(leaf, generator)
    values = []
    for _ in range(3):
        n, t = model.draw(z, generator)
        values.append(
            entropy(first_maps(model, model.cross_layers()[:1], noised(model.schedule, z, n, t), t, told), None)
        )
    expected = torch.stack(values).mean(0)
    torch.testing.assert_close(objective(x, seeded()), expected)
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    assert torch.nn.functional.cosine_similarity(slope(objective, x).flatten(), gradient.flatten(), 0) > 0.999


def test_the_divergence_is_from_the_clean_picture(model: Surrogate, x: Tensor) -> None:
    objective = EarlyAttention(model, model.embed([""]), "divergence", x)
    mean = model.posterior(x).mean.detach()
    assert not objective._at(mean, seeded()).any() and (objective._at(mean + 0.5, seeded()) > 0).all()


@pytest.mark.parametrize(("term", "measure"), [("entropy", entropy), ("mass", mass)])
def test_the_recipe_moves_attention_where_it_says(sd3: Surrogate, pixels: np.ndarray, term: str, measure) -> None:
    """At noise and times that the recipe did not see."""
    one, control = canvas(pixels), canvas(pixels)
    trace = run(Attention(term=term, steps=8, draws=4), sd3, one)
    run(Attention(term=term, steps=8, draws=4, step_size=1e-9), sd3, control)
    told, layers = sd3.embed([""]), sd3.cross_layers()[:1]

    @torch.no_grad()
    def level(x: Tensor) -> float:
        generator, z = seeded(99), sd3.posterior(x).mean.expand(8, -1, -1, -1)
        n, t = sd3.draw(z, generator)
        return measure(first_maps(sd3, layers, noised(sd3.schedule, z, n, t), t, told), None).mean().item()

    assert level(one.view()) > level(one.clean_view) + 5 * abs(level(control.view()) - level(one.clean_view))
    assert one.delta.abs().max() == 8 and len(trace.losses["perturbation"]) == 8


def test_low_memory_gives_the_same(joint: Surrogate, pixels: np.ndarray) -> None:
    """The block in which the pass ends is one whose weights the backward pass reads."""
    recipe, kept, lean = Attention(steps=2, draws=2), canvas(pixels), canvas(pixels)
    run(recipe, joint, kept)
    with low_memory(joint):
        run(recipe, joint, lean)
    assert (kept.delta == lean.delta).float().mean() > 0.99
