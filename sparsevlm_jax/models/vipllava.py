"""ViP-LLaVA: five hidden states of the tower behind one norm. Source: transformers' `vipllava`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sparsevlm_jax import bounds
from sparsevlm_jax.models.llava import NAMES as LLAVA_NAMES
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.names import NORM, Row, Table

_NORM = "multi_modal_projector.projector_layernorm"
NAMES = Table(
    (*LLAVA_NAMES.rows, Row(_NORM, _NORM.replace(".", "/"), NORM)),
    {**LLAVA_NAMES.spellings, f"{_NORM}.": (f"{_NORM}.", f"model.{_NORM}.")},
    LLAVA_NAMES.harmless,
)


@dataclass(frozen=True)
class VipLlavaConfig(LlavaConfig):
    """As LLaVA-1.5; the class token is always dropped, the projector always has biases."""

    model_type: str = "vipllava"

    @classmethod
    def own_fields(cls, full: dict[str, Any], source: str) -> dict[str, Any]:
        name = f"{source}: projector_layernorm_eps"
        return {
            "model_type": full["model_type"],
            "vision_feature_select_strategy": "default",
            "projector_bias": True,
            "projector_norm_eps": bounds.positive(full["projector_layernorm_eps"], name),
        }
