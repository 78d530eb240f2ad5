"""LLaVA in pure-functional Flax with SparseVLM: visual tokens are pruned inside one compiled program."""

from sparsevlm_jax.chat import Chat
from sparsevlm_jax.checkpoint import Model, load
from sparsevlm_jax.config import PRESETS, LlavaConfig, TextConfig, VisionConfig, llava_15_7b, llava_15_13b, tiny
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generate import generate, generate_ids, stream, stream_ids
from sparsevlm_jax.llava import (
    Cache,
    Prompt,
    abstract_params,
    decode_step,
    embed,
    encode_images,
    init_params,
    prefill,
)
from sparsevlm_jax.methods import METHODS, sparsity
from sparsevlm_jax.schedule import Plan, Sparsity, StagePlan, make_plan

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "PRESETS",
    "Cache",
    "Chat",
    "LlavaConfig",
    "Model",
    "Plan",
    "Prompt",
    "Sparsity",
    "StagePlan",
    "TextConfig",
    "UserError",
    "VisionConfig",
    "abstract_params",
    "decode_step",
    "embed",
    "encode_images",
    "generate",
    "generate_ids",
    "init_params",
    "llava_15_7b",
    "llava_15_13b",
    "load",
    "make_plan",
    "prefill",
    "sparsity",
    "stream",
    "stream_ids",
    "tiny",
]
