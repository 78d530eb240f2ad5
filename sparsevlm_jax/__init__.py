"""LLaVA in pure-functional Flax with SparseVLM: visual tokens are pruned inside one compiled program."""

from sparsevlm_jax.checkpoints.load import Model, load
from sparsevlm_jax.config import ModelConfig, SiglipConfig, TextConfig, VisionConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.generation.answer import Answer
from sparsevlm_jax.generation.api import answer, generate, generate_ids, stream, stream_ids
from sparsevlm_jax.generation.batches import answer_all
from sparsevlm_jax.generation.chat import Chat
from sparsevlm_jax.inputs.packing import TiledImages
from sparsevlm_jax.models.embedding import embed, encode_images
from sparsevlm_jax.models.family import config_from_hf
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.llava_next import LlavaNextConfig
from sparsevlm_jax.models.parameters import abstract_params, init_params
from sparsevlm_jax.models.presets import PRESETS, llava_15_7b, llava_15_13b, tiny
from sparsevlm_jax.models.stages import Cache, ImageFeatures, Prompt, decode_step, prefill
from sparsevlm_jax.models.vipllava import VipLlavaConfig
from sparsevlm_jax.pruning.budgets import make_plan, plan_of_row
from sparsevlm_jax.pruning.methods import METHODS, sparsity
from sparsevlm_jax.pruning.plan import Plan, StagePlan
from sparsevlm_jax.pruning.settings import Budget, Recycling, Sparsity

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "PRESETS",
    "Answer",
    "Budget",
    "Cache",
    "Chat",
    "ImageFeatures",
    "LlavaConfig",
    "LlavaNextConfig",
    "Model",
    "ModelConfig",
    "Plan",
    "Prompt",
    "Recycling",
    "SiglipConfig",
    "Sparsity",
    "StagePlan",
    "TextConfig",
    "TiledImages",
    "UserError",
    "VipLlavaConfig",
    "VisionConfig",
    "abstract_params",
    "answer",
    "answer_all",
    "config_from_hf",
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
    "plan_of_row",
    "prefill",
    "sparsity",
    "stream",
    "stream_ids",
    "tiny",
]
