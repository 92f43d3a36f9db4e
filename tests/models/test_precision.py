import pytest
import torch
from conftest import Checkpoint
from torch import Generator, Tensor

from antidiffusion.models.base import Surrogate
from antidiffusion.models.precision import DTYPES, device_of, dtypes_of
from antidiffusion.recipes.anti_diffusion import DenoisingSemantic

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "capabilities", "native", "half"),
    [
        ("cpu", {"avx512_bf16": True}, False, True),
        ("cpu", {"amx_bf16": True}, False, True),
        ("cpu", {"avx512_bf16": False, "avx2": True}, False, False),
        ("mps", {"avx512_bf16": True}, False, False),
        ("cuda:1", {}, True, True),
        ("cuda", {}, False, False),
    ],
)
def test_auto_is_bfloat16_where_the_hardware_computes_in_it(
    monkeypatch: pytest.MonkeyPatch, device: str, capabilities: dict[str, bool], native: bool, half: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    place = torch.device(device)
    weights, computing = (torch.bfloat16, torch.bfloat16) if half else (torch.float32, None)
    assert dtypes_of("auto", place, small=False, full_tuning=False) == (weights, None)
    assert dtypes_of("auto", place, small=False, full_tuning=True) == (torch.float32, computing)
    assert dtypes_of("auto", place, small=True, full_tuning=False) == (torch.float32, None)


def test_a_torch_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert dtypes_of("auto", CPU, small=False, full_tuning=False) == (torch.float32, None)


def test_a_named_dtype_is_taken() -> None:
    asked = [*DTYPES[1:], torch.float64]
    found = [dtypes_of(name, CPU, small=True, full_tuning=True) for name in asked]
    weights = [torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert found == list(zip(weights, [None, None, None, torch.bfloat16, None], strict=True))
    with pytest.raises(ValueError, match=r"expected a dtype of auto, .*, got 'half'; leave it at auto"):
        dtypes_of("half", CPU, small=True, full_tuning=True)


def test_a_device_of_this_machine() -> None:
    assert device_of("cpu") == device_of(CPU) == CPU
    fastest = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert device_of("auto").type == fastest
    with pytest.raises(ValueError, match=r"expected a device of this machine, got 'cuda:99' \(.+\); use cpu"):
        device_of("cuda:99")


def slope(surrogate: Surrogate, x: Tensor) -> Tensor:
    leaf, generator = x.clone().requires_grad_(), Generator().manual_seed(0)
    loss = DenoisingSemantic(surrogate, surrogate.embed([""]), weight=0)(leaf, generator)
    assert loss.dtype == torch.float32
    return torch.autograd.grad(loss.sum(), leaf)[0].flatten()


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed"])
def test_half_precision_s_gradient_points_the_same_way(
    checkpoint: Checkpoint, surrogate: Surrogate, x: Tensor, dtype: str
) -> None:
    half = Surrogate.from_pretrained(str(checkpoint.folder), device="cpu", dtype=dtype)
    seen = set[torch.dtype]()
    for part in (half.vae.encoder.conv_in, half.denoiser.conv_in, half.vae.decoder.conv_in):
        part.register_forward_hook(lambda part, given, answer: seen.add(answer.dtype))
    assert torch.cosine_similarity(slope(surrogate, x), slope(half, x), dim=0) > 0.8
    assert half.decode(half.encode(x, Generator())).dtype == torch.float32
    assert seen == {torch.bfloat16}
    assert half.precision == {"bfloat16": "bfloat16", "mixed": "float32 with autocast to bfloat16"}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_protection_step(checkpoint: Checkpoint, generator: Generator, dtype: torch.dtype) -> None:
    surrogate = Surrogate.from_pretrained(str(checkpoint.folder), device="cpu", dtype=dtype)
    upcast = dtype == torch.float16 and checkpoint.name == "sdxl"
    assert surrogate.dtype == dtype and {p.dtype for p in surrogate.denoiser.parameters()} == {dtype}
    assert {p.dtype for p in surrogate.vae.parameters()} == {torch.float32 if upcast else dtype}
    assert {p.dtype for encoder in surrogate.text_encoders for p in encoder.parameters()} == {dtype}
    assert not any(p.requires_grad or module.training for module in surrogate.modules for p in module.parameters())
    shape = (1, 3, 64, 64) if dtype == torch.float16 else (2, 3, 64, 128)  # float16 is slow on CPUs
    x = torch.rand(shape, generator=generator).requires_grad_()
    losses = DenoisingSemantic(surrogate, surrogate.embed([""]))(x, generator)
    (gradient,) = torch.autograd.grad(losses.sum(), x)
    assert losses.shape == (len(x),) and losses.dtype == torch.float32 and losses.isfinite().all()
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    z = surrogate.encode(x.detach(), generator)
    assert z.dtype == surrogate.decode(z).dtype == surrogate.embed(["a"]).tokens.dtype == torch.float32
