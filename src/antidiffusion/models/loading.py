"""Build a surrogate from a location: understand it, read its parts, and try one step."""

from typing import Any

import torch

from antidiffusion.models.headers import WeightsError, first_line, read_json
from antidiffusion.models.kinds import classify
from antidiffusion.models.weights import Location

# Arguments of `Surrogate` that differ from Stable Diffusion's: the embedded model has a hundredth of its weights.
CARD = "antidiffusion.json"


def load_parts(location: Location, dtype: torch.dtype) -> dict[str, Any]:
    """Return the arguments of `Surrogate` but its name.

    Raises:
        WeightsError: If anything in the model is not understood, missing, left over, damaged or no number.
    """
    from diffusers import DDIMScheduler

    kind = classify(location)
    vae = kind.part("vae", dtype)
    if dtype == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae = vae.float()  # the entry says that float16 overflows
    card = location.folder / CARD
    return {
        "vae": vae,
        "unet": kind.part("unet", dtype),
        "text_encoders": [kind.part(name, dtype) for name in kind.row.encoders],
        "tokenizers": [kind.tokenizer(name) for name in kind.row.tokenizers],
        # Latents are not bounded; schedulers of other classes leave clip_sample out, and DDIM's default is to clip.
        "scheduler": DDIMScheduler.from_config(kind.scheduler, clip_sample=False),
        "size": kind.size,
    } | (read_json(card) if card.is_file() else {})


@torch.no_grad()
def trial(surrogate: Any) -> None:
    """Encode one smallest picture and ask the denoiser once: what no list of look-alikes knows shows here.

    Raises:
        WeightsError: If an answer has another shape than its question, or is no number.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 3, surrogate.multiple, surrogate.multiple, generator=generator).to(surrogate.device)
    try:
        z = surrogate.encode(x, generator)
        embedding = surrogate.embed([""])
        n, t = surrogate.draw(z, generator)
        answer = surrogate.predict(n, t, embedding)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        raise WeightsError(
            f"expected a model that denoises a latent when it is told a text, got {type(error).__name__} from "
            f"{surrogate.name}: {first_line(error)}; name a base model of one of the families in the documentation"
        ) from error
    for part, tensor in {"autoencoder": z, "text encoder": embedding.tokens, "denoiser": answer}.items():
        if not tensor.isfinite().all():
            half = "float32" not in surrogate.precision or surrogate.autocast
            remedy = "use --dtype bfloat16 or float32" if half else "use another file of this model"
            raise WeightsError(
                f"expected finite numbers from the {part} in {surrogate.precision}, got NaN or infinity from "
                f"{surrogate.name}; {remedy}"
            )
    if answer.shape != z.shape:
        raise WeightsError(
            f"expected an answer of the latent's shape {tuple(z.shape)}, got {tuple(answer.shape)} from "
            f"{surrogate.name}; name a base model"
        )
