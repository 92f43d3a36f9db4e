"""FLUX.2 klein at reduced width, with random weights and a tokenizer of letters."""

from typing import Any

import torch

WIDTH = 8  # of the text encoder, which has as many layers as are read
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
)


def build_pipeline(*, distilled: bool) -> Any:
    """Build a pipeline with random weights."""
    import diffusers

    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        tokenizer, encoder = _qwen()
        vae = diffusers.AutoencoderKLFlux2(
            block_out_channels=(16, 16, 32, 32), layers_per_block=1, norm_num_groups=8, sample_size=64
        )
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2)
        vae.register_to_config(force_upcast=True)  # as published
        transformer = diffusers.Flux2Transformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * WIDTH,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return diffusers.Flux2KleinPipeline(scheduler, vae, encoder, tokenizer, transformer, is_distilled=distilled)


def _qwen() -> tuple[Any, Any]:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    vocab = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2TokenizerFast(vocab=vocab, merges=[], additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=27,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        initializer_range=0.3,
        tie_word_embeddings=True,
    )
    return tokenizer, Qwen3ForCausalLM(config)
