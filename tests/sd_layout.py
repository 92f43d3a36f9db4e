"""Stable Diffusion's original key names for diffusers' weights: the inverse of diffusers' single-file converters."""

import re
from typing import Any

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "encoder.layers": "transformer.resblocks",
    "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def rename(key: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        key = re.sub(rf"(^|\.){re.escape(new)}(\.|$)", rf"\g<1>{old}\g<2>", key)
    return key


def unet(module: Any) -> dict[str, Tensor]:
    stride = module.config.layers_per_block + 1

    def original(key: str) -> str:
        found = re.match(r"(down|mid|up)_blocks?\.(?:(\d)\.)?(resnets|attentions|\w+samplers)\.(\d)\.(.*)", key)
        if not found:
            return rename(key, UNET)
        side, kind, layer, rest = found[1], found[3], int(found[4]), found[5]
        rest = rename(rest, RESNET) if kind == "resnets" else rest
        if side == "mid":
            return f"middle_block.{2 * layer if kind == 'resnets' else 1}.{rest}"
        block = int(found[2])
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * stride}.0.{rest.replace('conv', 'op')}"
        if kind == "upsamplers":
            position = 2 if hasattr(module.up_blocks[block], "attentions") else 1
            return f"output_blocks.{(block + 1) * stride - 1}.{position}.{rest}"
        index = block * stride + layer
        where = f"input_blocks.{index + 1}" if side == "down" else f"output_blocks.{index}"
        return f"{where}.{int(kind == 'attentions')}.{rest}"

    return {f"model.diffusion_model.{original(key)}": value for key, value in module.state_dict().items()}


def vae(module: Any) -> dict[str, Tensor]:
    last = len(module.config.block_out_channels) - 1

    def original(key: str) -> str:
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        if "mid_block.attentions.0" in key:
            return rename(key.replace("mid_block.attentions.0", "mid.attn_1"), VAE_ATTENTION)
        key = re.sub(r"up_blocks\.(\d)", lambda m: f"up.{last - int(m[1])}", key)
        key = key.replace("down_blocks", "down").replace("resnets", "block").replace("conv_norm_out", "norm_out")
        return re.sub(r"(down|up)samplers\.0", r"\1sample", key).replace("conv_shortcut", "nin_shortcut")

    state = {original(key): value for key, value in module.state_dict().items()}
    linear = re.compile(r"mid\.attn_1\.\w+\.weight")  # was a 1 x 1 convolution
    return {
        f"first_stage_model.{key}": value[..., None, None] if linear.search(key) and value.ndim == 2 else value
        for key, value in state.items()
    }


def clip(module: Any, prefix: str) -> dict[str, Tensor]:
    state = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
    positions = torch.arange(module.config.max_position_embeddings)[None]  # old files have this buffer
    return {f"{prefix}.text_model.{k}": v for k, v in (state | {"embeddings.position_ids": positions}).items()}


def open_clip(module: Any, prefix: str) -> dict[str, Tensor]:
    width = module.config.hidden_size
    state = {key.removeprefix("text_model."): value for key, value in module.state_dict().items()}
    projection = state.pop("text_projection.weight", torch.eye(width))
    result = {"text_projection": projection.T, "logit_scale": torch.tensor(4.6)}
    for key, value in state.items():
        if ".self_attn.q_proj" in key:
            fused = torch.cat([state[key.replace("q_proj", f"{part}_proj")] for part in "qkv"])
            result[rename(key, OPEN_CLIP).replace("self_attn.q_proj.", "attn.in_proj_")] = fused
        elif not re.search(r"self_attn\.[kv]_proj", key):
            result[rename(key, OPEN_CLIP)] = value
    return {f"{prefix}.{key}": value for key, value in result.items()}


def sd3(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the original names of a Stable Diffusion 3 or 3.5 transformer."""
    last = max(int(name.split(".")[1]) for name in state if name.startswith("transformer_blocks."))
    names = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
        "proj_out": "final_layer.linear",
        "transformer_blocks": "joint_blocks",
        "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "attn.to_out.0": "x_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj",
        "attn.norm_q": "x_block.attn.ln_q",
        "attn.norm_k": "x_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q",
        "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q",
        "attn.norm_added_k": "context_block.attn.ln_k",
        "attn.to_add_out": "context_block.attn.proj",
        "ff.net.0.proj": "x_block.mlp.fc1",
        "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1",
        "ff_context.net.2": "context_block.mlp.fc2",
    }
    found = {}
    for name, value in state.items():
        fused = re.match(r"transformer_blocks\.(\d+)\.(attn2?)\.(to_q|add_q_proj)\.(\w+)$", name)
        if fused:
            block, attention, kind, rest = fused.groups()
            side = "x_block" if kind == "to_q" else "context_block"
            parts = [state[name.replace(kind, kind.replace("_q", f"_{part}"))] for part in "qkv"]
            found[f"joint_blocks.{block}.{side}.{attention}.qkv.{rest}"] = torch.cat(parts)
        elif not re.search(r"attn2?\.(to_[kv]|add_[kv]_proj)\.", name):
            swapped = name.startswith(("norm_out", f"transformer_blocks.{last}.norm1_context"))
            halves = value.chunk(2)[::-1] if swapped else [value]  # the original has the shift first
            found[rename(name, names)] = torch.cat(list(halves))
    return {f"model.diffusion_model.{name}": value.contiguous().clone() for name, value in found.items()}


def original_state(pipeline: Any) -> dict[str, Tensor]:
    """Return every weight of a Stable Diffusion 1.x, 2.x or XL pipeline under the original file's name."""
    if hasattr(pipeline, "text_encoder_2"):
        text = clip(pipeline.text_encoder, "conditioner.embedders.0.transformer")
        text |= open_clip(pipeline.text_encoder_2, "conditioner.embedders.1.model")
    elif pipeline.unet.config.use_linear_projection:
        text = open_clip(pipeline.text_encoder, "cond_stage_model.model")
    else:
        text = clip(pipeline.text_encoder, "cond_stage_model.transformer")
    buffers = {"alphas_cumprod": pipeline.scheduler.alphas_cumprod, "betas": pipeline.scheduler.betas}
    state = unet(pipeline.unet) | vae(pipeline.vae) | text | buffers
    return {key: value.contiguous().clone() for key, value in state.items()}
