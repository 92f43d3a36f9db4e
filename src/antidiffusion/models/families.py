"""The one list of model families: what their folders and files hold, and what makes a look-alike of each.

A family is a module with `build(scheduler, **parts)`, which returns a `Surrogate`, and a row here; nothing else names
one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Configs = Mapping[str, Mapping[str, Any]]  # part -> its config.json

CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
CLIP_TOKENIZERS, T5_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast"), ("T5TokenizerFast", "T5Tokenizer")
# Variance-preserving: each reads the same betas and differs in how it samples.
VARIANCE_PRESERVING = frozenset(
    {
        "DDIMScheduler",
        "DDIMParallelScheduler",
        "DDPMScheduler",
        "DDPMParallelScheduler",
        "DEISMultistepScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSDEScheduler",
        "DPMSolverSinglestepScheduler",
        "EulerAncestralDiscreteScheduler",
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2AncestralDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LCMScheduler",
        "LMSDiscreteScheduler",
        "PNDMScheduler",
        "SASolverScheduler",
        "TCDScheduler",
        "UniPCMultistepScheduler",
    }
)
STRAIGHT = frozenset({"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"})
# Entries of a denoiser's configuration that add a condition which no text gives, unless they have the value here.
PLAIN_UNET: dict[str, tuple[Any, str]] = {
    "time_cond_proj_dim": (None, "a UNet that is told its guidance (a latent consistency model)"),
    "encoder_hid_dim_type": (None, "a UNet with another text or picture projection (DeepFloyd IF, Kandinsky)"),
    "class_embed_type": (None, "a UNet conditioned on a class or a picture (unCLIP)"),
    "num_class_embeds": (None, "a UNet conditioned on a noise level (an upscaler)"),
    "attention_type": ("default", "a UNet with attention to boxes (GLIGEN)"),
}
UNET_LOOSE = (  # names in an original file that are no weights of the parts: running means, schedules, losses
    r"model_ema\.|first_stage_model\.loss\.|alphas_cumprod|betas$|sqrt_|log_one_minus_|posterior_|lvlb_weights$|logvar$|"
    r"denoiser\.|(cond_stage_model|conditioner\.embedders\.\d)\.(model\.)?(logit_scale|text_projection|attn_mask)$|"
    r".*\.position_ids$|v_pred$|ztsnr$"
)
CLIP_NAMES = r"transformer\.(text_model\.)?(embeddings|encoder|final_layer_norm|text_projection)"
OPEN_CLIP_NAMES = r"model\.(transformer\.resblocks|token_embedding|positional_embedding|ln_final|text_projection)"
NEVER = r"(?!)"  # matches no name
PREFIX = r"(model\.diffusion_model\.)?"


@dataclass(frozen=True)
class Family:
    """One row.

    Arguments:
        title: As sentences say it.
        module: Module of this package with `build`.
        denoiser: Part that denoises, and its class.
        pipelines: Classes in model_index.json whose model is told nothing but text.
        encoders, tokenizers: Parts and the classes that are understood.
        schedulers: Classes whose path of noise is the family's.
        held: Part -> pattern of its names in a single file; the denoiser's tells the family.
        loose: Pattern of names in a single file that are no weights of any part.
        mark: Pattern of a name that only a single file of this family has; rows are asked in their order.
        entry: Pattern of the first layer in a single file, and `channels`, what goes in there.
        patch: Channels of the denoiser per latent channel.
        plain: Entry of the denoiser's configuration -> its value in a plain model, and what any other value means.
        widths: Returns what does not fit together in the configurations of the parts, or None.
        stock: What diffusers calls a single file of this family, the first where it cannot tell.
        optional: Parts that a folder may leave out.
        side: Of the pictures in training, in pixels, where a family's configuration does not say it.
        vae: Class of the autoencoder.
        told: Entries of model_index.json that `build` takes too.
    """

    title: str
    module: str
    denoiser: tuple[str, str]
    pipelines: frozenset[str]
    encoders: Mapping[str, str]
    tokenizers: Mapping[str, tuple[str, ...]]
    schedulers: frozenset[str]
    held: Mapping[str, str]
    loose: str
    widths: Callable[[Configs], str | None]
    mark: str
    entry: str
    channels: int
    stock: tuple[str, ...]
    patch: int = 1
    plain: Mapping[str, tuple[Any, str]] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    side: int | None = None
    vae: str = "AutoencoderKL"
    told: frozenset[str] = frozenset()

    def class_of(self, part: str) -> tuple[str, str]:
        """Return the library and the class of a part that has weights."""
        if part in self.encoders:
            return "transformers", self.encoders[part]
        return "diffusers", self.denoiser[1] if part == self.denoiser[0] else self.vae


def _unet_widths(configs: Configs) -> str | None:
    unet, encoders = configs["unet"], [config for part, config in configs.items() if part.startswith("text_encoder")]
    width, tokens = unet.get("cross_attention_dim", 1280), sum(config["hidden_size"] for config in encoders)
    if set(width if isinstance(width, list) else [width]) != {tokens}:
        return f"a UNet that reads text of width {width} beside text encoders of width {tokens}"
    added = unet.get("addition_embed_type")
    if added != (None if len(encoders) == 1 else "text_time"):
        return f"a UNet with {added or 'no'} added embedding beside {len(encoders)} text encoder(s)"
    if added is None:
        return None
    ids, rest = divmod(
        unet["projection_class_embeddings_input_dim"] - encoders[-1]["projection_dim"], unet["addition_time_embed_dim"]
    )
    return None if (ids, rest) == (6, 0) else f"a UNet with {ids} time ids instead of 6 (a refiner has 5)"


def _sd3_widths(configs: Configs) -> str | None:
    transformer, third = configs["transformer"], configs.get("text_encoder_3")
    pooled = sum(configs[part]["projection_dim"] for part in ("text_encoder", "text_encoder_2"))
    if transformer.get("pooled_projection_dim", 2048) != pooled:
        return f"a transformer for pooled text of another width than its text encoders' {pooled}"
    if third and transformer.get("joint_attention_dim", 4096) != third["d_model"]:
        return f"a transformer that reads text of another width than T5's {third['d_model']}"
    return None


def _flux_widths(configs: Configs) -> str | None:
    transformer = configs["transformer"]
    if transformer.get("pooled_projection_dim", 768) != configs["text_encoder"]["hidden_size"]:
        return "a transformer for pooled text of another width than CLIP's"
    if transformer.get("joint_attention_dim", 4096) != configs["text_encoder_2"]["d_model"]:
        return "a transformer that reads text of another width than T5's"
    return None


def _flux2_widths(configs: Configs) -> str | None:
    transformer, encoder = configs["transformer"], configs["text_encoder"]
    if transformer.get("joint_attention_dim", 15360) != 3 * encoder["hidden_size"]:
        return "a transformer that reads text of another width than three of Qwen3's hidden states"
    if encoder["num_hidden_layers"] < 27:
        return f"a text encoder of {encoder['num_hidden_layers']} layers whose 27th is read"
    return None


_UNET: dict[str, Any] = {
    "module": "antidiffusion.models.sd",
    "denoiser": ("unet", "UNet2DConditionModel"),
    "schedulers": VARIANCE_PRESERVING,
    "loose": UNET_LOOSE,
    "widths": _unet_widths,
    "plain": PLAIN_UNET,
    "entry": r"model\.diffusion_model\.input_blocks\.0\.0\.weight$",
    "channels": 4,
}
FAMILIES: dict[str, Family] = {
    "sdxl": Family(
        "Stable Diffusion XL",
        pipelines=frozenset(f"StableDiffusionXL{name}Pipeline" for name in ("", "Img2Img", "Inpaint", "PAG")),
        encoders={"text_encoder": CLIP, "text_encoder_2": PROJECTED},
        tokenizers={"tokenizer": CLIP_TOKENIZERS, "tokenizer_2": CLIP_TOKENIZERS},
        held={
            "unet": r"model\.diffusion_model\.",
            "vae": r"first_stage_model\.",
            "text_encoder": rf"conditioner\.embedders\.0\.{CLIP_NAMES}",
            "text_encoder_2": rf"conditioner\.embedders\.1\.{OPEN_CLIP_NAMES}",
        },
        mark=r"model\.diffusion_model\.label_emb\.0\.0\.weight$",
        stock=("xl_base",),
        **_UNET,
    ),
    "sd": Family(
        "Stable Diffusion 1.x or 2.x",
        pipelines=frozenset(
            f"StableDiffusion{name}Pipeline" for name in ("", "Img2Img", "Inpaint", "InpaintLegacy", "PAG")
        )
        | {"LatentConsistencyModelPipeline"},
        encoders={"text_encoder": CLIP},
        tokenizers={"tokenizer": CLIP_TOKENIZERS},
        held={
            "unet": r"model\.diffusion_model\.",
            "vae": r"first_stage_model\.",
            "text_encoder": rf"cond_stage_model\.({CLIP_NAMES}|{OPEN_CLIP_NAMES})",
        },
        mark=r"model\.diffusion_model\.input_blocks\.0\.0\.weight$",
        stock=("v1", "v2"),
        **_UNET,
    ),
    "sd3": Family(
        "Stable Diffusion 3",
        module="antidiffusion.models.sd3",
        denoiser=("transformer", "SD3Transformer2DModel"),
        pipelines=frozenset(f"StableDiffusion3{name}Pipeline" for name in ("", "Img2Img", "Inpaint", "PAG")),
        encoders={"text_encoder": PROJECTED, "text_encoder_2": PROJECTED, "text_encoder_3": T5},
        tokenizers={"tokenizer": CLIP_TOKENIZERS, "tokenizer_2": CLIP_TOKENIZERS, "tokenizer_3": T5_TOKENIZERS},
        optional=frozenset({"text_encoder_3", "tokenizer_3"}),
        schedulers=STRAIGHT,
        held={
            "transformer": PREFIX
            + r"(joint_blocks|x_embedder|t_embedder|y_embedder|context_embedder|final_layer|pos_embed)",
            "vae": r"(first_stage_model|vae)\.",
            "text_encoder": rf"text_encoders\.clip_l\.{CLIP_NAMES}",
            "text_encoder_2": rf"text_encoders\.clip_g\.{CLIP_NAMES}",
            "text_encoder_3": r"text_encoders\.t5xxl\.transformer\.",
        },
        loose=r"text_encoders\.\w+\.(logit_scale|text_projection)$|.*\.position_ids$|model_sampling\.",
        widths=_sd3_widths,
        mark=PREFIX + r"joint_blocks\.0\.",
        entry=PREFIX + r"x_embedder\.proj\.weight$",
        channels=16,
        stock=("sd3", "sd35_large", "sd35_medium"),
    ),
    "flux": Family(
        "FLUX.1",
        module="antidiffusion.models.flux",
        denoiser=("transformer", "FluxTransformer2DModel"),
        pipelines=frozenset(f"Flux{name}Pipeline" for name in ("", "Img2Img", "Inpaint")),
        encoders={"text_encoder": CLIP, "text_encoder_2": T5},
        tokenizers={"tokenizer": CLIP_TOKENIZERS, "tokenizer_2": T5_TOKENIZERS},
        schedulers=STRAIGHT,
        held={
            "transformer": PREFIX
            + r"(double_blocks|single_blocks|img_in|txt_in|time_in|vector_in|guidance_in|final_layer)\.",
            "vae": r"vae\.",
            "text_encoder": rf"text_encoders\.clip_l\.{CLIP_NAMES}",
            "text_encoder_2": r"text_encoders\.t5xxl\.transformer\.",
        },
        loose=r"text_encoders\.\w+\.(logit_scale|text_projection)$|.*\.position_ids$",
        widths=_flux_widths,
        patch=4,
        side=1024,
        mark=PREFIX + r"double_blocks\.0\.img_attn\.",
        entry=PREFIX + r"img_in\.weight$",
        channels=64,
        stock=("flux-dev", "flux-schnell"),
    ),
    "flux2": Family(
        "FLUX.2 klein",
        module="antidiffusion.models.flux2",
        denoiser=("transformer", "Flux2Transformer2DModel"),
        pipelines=frozenset({"Flux2KleinPipeline", "Flux2KleinInpaintPipeline"}),
        encoders={"text_encoder": "Qwen3ForCausalLM"},
        tokenizers={"tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer")},
        schedulers=frozenset({"FlowMatchEulerDiscreteScheduler"}),
        held={},  # read from folders alone: a single file is refused as one of FLUX.2
        loose=NEVER,
        widths=_flux2_widths,
        plain={"guidance_embeds": (False, "a transformer that is told its guidance (FLUX.2 dev)")},
        patch=4,
        side=1024,
        vae="AutoencoderKLFlux2",
        told=frozenset({"is_distilled"}),
        mark=NEVER,
        entry=NEVER,
        channels=128,
        stock=(),
    ),
}
