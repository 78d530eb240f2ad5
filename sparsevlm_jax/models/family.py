"""The families of models: each is a record here and a file beside this one, which nothing shared imports.

docs/new_family.md says what a new one needs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from sparsevlm_jax.config import ModelConfig, read_config, refuse_original
from sparsevlm_jax.errors import UserError, shown
from sparsevlm_jax.files import read_json
from sparsevlm_jax.models import llava, llava_next, video_llava, vipllava
from sparsevlm_jax.models.names import Table
from sparsevlm_jax.models.stages import Params


@dataclass(frozen=True)
class Family:
    """What the models of one Hugging Face `model_type` have of their own, up to the prompt; all after it is shared.

    Attributes:
      config: the class of its configurations: `from_hf` reads a config.json, the rest is `config.ModelConfig`.
      names: its tensors in checkpoints.
      module: declares its parameters, given a configuration.
      encode: parameters, tiles [t, 3, height, width] and configuration to visual tokens [t, v, d] and saliency [t, v].
      encode_frames: as `encode`, for the frames of videos; None where there are no videos.
      rows: further rows [r, d] for the packer, behind the patches of all tiles; None where there are none.
    """

    config: Any
    names: Table
    module: Callable[[Any], nn.Module]
    encode: Callable[[Params, Array, Any], tuple[Array, Array]]
    rows: Callable[[Params], Array] | None = None
    encode_frames: Callable[[Params, Array, Any], tuple[Array, Array]] | None = None


FAMILIES = {
    "llava": Family(llava.LlavaConfig, llava.NAMES, llava.Llava, llava.encode_tiles),
    "vipllava": Family(vipllava.VipLlavaConfig, vipllava.NAMES, llava.Llava, llava.encode_tiles),
    "llava_next": Family(
        llava_next.LlavaNextConfig, llava_next.NAMES, llava_next.LlavaNext, llava.encode_tiles, llava_next.newline_row
    ),
    "video_llava": Family(
        video_llava.VideoLlavaConfig,
        video_llava.NAMES,
        video_llava.VideoLlava,
        video_llava.encode_image_tiles,
        encode_frames=video_llava.encode_frames,
    ),
}


def family_of(config: ModelConfig) -> Family:
    return FAMILIES[config.model_type]


def config_from_hf(config: dict[str, Any], source: str = "config.json") -> ModelConfig:
    """Reads a parsed Hugging Face `config.json` of any family.

    Args:
      source: what to call the file in errors.

    Raises:
      UserError: another architecture, or a variant that this package does not compute.
    """
    refuse_original(config, source)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        expected = ", ".join(f'"{name}"' for name in FAMILIES)
        raise UserError(f"{source}: model_type is {shown(model_type)}, expected one of {expected}")
    return FAMILIES[model_type].config.from_hf(config, source)


def config_of(path: Path) -> ModelConfig:
    """The configuration in a model's folder, or in a `config.json` by itself.

    Raises:
      UserError: as `config_from_hf`, or there is none.
    """
    if path.is_file():
        return config_from_hf(read_json(path), str(path))
    return config_from_hf(read_config(path), str(path / "config.json"))
