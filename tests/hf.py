"""Tiny LLaVA checkpoints in Hugging Face format, made with transformers and torch: what parity tests compare with."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sparsevlm_jax import Model, load
from sparsevlm_jax.checkpoints.load import GenerationDefaults
from sparsevlm_jax.inputs.processor import Processor

# The template of the published llava-1.5 checkpoints in substance: images first, then texts, no system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
SPACE = "▁"  # sentencepiece's mark of a space
MERGES = ((SPACE, "t"), ("h", "e"), (f"{SPACE}t", "he"), (SPACE, "a"), ("i", "n"), (SPACE, "i"), ("e", "r"), ("o", "n"))


def tiny_llava(
    path: Path,
    *,
    layers: int = 5,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 4,
    ffn: int = 96,
    image_size: int = 56,
    patch_size: int = 14,
    vocab: int = 320,
    seed: int = 0,
    max_position: int = 2048,
    processor: bool = True,
    family: str = "llava",
    tower: str = "clip_vision_model",
    tower_layers: int = 3,
    decoder: str = "llama",
    top: Mapping[str, Any] | None = None,
    **text: Any,
) -> Path:
    """Saves a random model, float32, with or without its tokenizer and image processor.

    Family, tower and decoder are of any model type that transformers has; `text` are entries of the decoder's
    configuration beside the sizes, `top` those of the whole.

    Weights are drawn wider than transformers does, so that logits are well apart and a wrong step shows. No token
    ends an answer: random weights would end it anywhere.
    """
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    videos = family == "video_llava"
    tokenizer = llama_tokenizer("<image>", "<video>") if videos else llama_tokenizer()
    if videos:
        top = {"video_token_index": tokenizer.convert_tokens_to_ids("<video>"), **(top or {})}
    assert len(tokenizer) <= vocab, f"the tokenizer has {len(tokenizer)} tokens, vocab is {vocab}"
    config = AutoConfig.for_model(
        family,
        vision_config=AutoConfig.for_model(
            tower,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=tower_layers,
            num_attention_heads=4,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=AutoConfig.for_model(
            decoder,
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=max_position,
            rms_norm_eps=1e-5,
            **text,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(image_size // patch_size) ** 2,
        **(top or {}),
    )
    model: Any = AutoModelForImageTextToText.from_config(config).eval()
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for name, tensor in sorted(model.named_parameters()):
            middle, std = 0.0, tensor.shape[-1] ** -0.5
            if "norm" in name and name.endswith("weight"):
                middle, std = 0.0 if decoder == "gemma" and "language_model" in name else 1.0, 0.1
            elif "embed_tokens" in name:  # about as strong as the visual tokens
                std = 0.5
            elif "lm_head" in name:
                std = 0.25
            elif "q_proj" in name or "k_proj" in name:
                std *= 1.5
            tensor.copy_(torch.from_numpy(random.normal(middle, std, tensor.shape).astype(np.float32)))
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    if processor:
        tokenizer.save_pretrained(path)
        if family == "llava_next":
            made = next_processor(image_size, config.image_grid_pinpoints)
        else:
            made = (siglip_processor if tower.startswith("siglip") else image_processor)(image_size)
        made.save_pretrained(path)
    return path


def endless_llava(path: Path) -> Model:
    """A loaded `tiny_llava` of two layers, asked in Vicuna's words, whose answers no token ends."""
    return replace(load(tiny_llava(path, layers=2)), generation=GenerationDefaults((), 0))


def with_template(model: Model) -> Model:
    """The same with a chat template."""
    old = model.processor
    return replace(model, processor=Processor(old.tokenizer, old.image_processor, CHAT_TEMPLATE, model.config))


def tiny_processor(path: Path, *, image_size: int = 56) -> Path:
    """Saves the tokenizer and the image processor of `tiny_llava` alone, in the files of transformers 4.x."""
    path.mkdir(parents=True, exist_ok=True)
    llama_tokenizer().save_pretrained(path)
    image_processor(image_size).save_pretrained(path)
    return path


def llama_tokenizer(*markers: str) -> Any:
    """A Llama tokenizer: BPE over the letters with byte fallback, a space in front of the text, a BOS token."""
    from transformers import LlamaTokenizer

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), SPACE, *string.ascii_lowercase]
    pieces += ["".join(pair) for pair in MERGES]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizer(vocab=vocabulary, merges=list(MERGES), add_bos_token=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": [*(markers or ["<image>"])]})
    return tokenizer


def next_processor(tile: int, canvases: Any) -> Any:
    """LLaVA-NeXT's image processor on Pillow."""
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    square = {"height": tile, "width": tile}
    return LlavaNextImageProcessorPil(size={"shortest_edge": tile}, crop_size=square, image_grid_pinpoints=canvases)


def image_processor(image_size: int) -> Any:
    """CLIP's image processor on Pillow."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    crop = {"height": image_size, "width": image_size}
    return CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=crop)


def siglip_processor(image_size: int) -> Any:
    """SigLIP's image processor on Pillow: to a square, whatever the aspect."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    return SiglipImageProcessorPil(size={"height": image_size, "width": image_size})
