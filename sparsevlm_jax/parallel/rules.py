"""Where the parameters of a model lie on a mesh: tensor parallelism of the decoder, the rest whole on every device.

Queries, keys, values, gate and up are cut by their outputs, `o_proj` and `down_proj` by their inputs, so that a layer
sums over the devices twice (Megatron-LM, arXiv 1909.08053). The tables of words and the head are cut by vocabulary.
Towers and projector are whole: they see images, which devices can share instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from sparsevlm_jax.config import ModelConfig, TextConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.parallel.mesh import DATA, TENSOR, MeshShape, make_mesh

# One decoder module serves Llama and all its relatives, so this is the table of every decoder.
_LAYER = r"language_model/layers_\d+/"
RULES = (
    (_LAYER + r"self_attn/[qkv]_proj/weight", PartitionSpec(TENSOR, None)),
    (_LAYER + r"self_attn/[qkv]_proj/(bias|scale)", PartitionSpec(TENSOR)),
    (_LAYER + r"self_attn/o_proj/weight", PartitionSpec(None, TENSOR)),
    (_LAYER + r"mlp/(gate|up)_proj/weight", PartitionSpec(TENSOR, None)),
    (_LAYER + r"mlp/(gate|up)_proj/(bias|scale)", PartitionSpec(TENSOR)),
    (_LAYER + r"mlp/down_proj/weight", PartitionSpec(None, TENSOR)),
    (r"language_model/embed_tokens/embedding", PartitionSpec(TENSOR, None)),
    (r"language_model/lm_head/weight", PartitionSpec(TENSOR, None)),
)
WHOLE = PartitionSpec()
Where = Callable[[tuple[str, ...], tuple[int, ...]], Sharding]


def placement(mesh: str | Mesh, config: ModelConfig) -> Where:
    """Where each parameter goes, by its path and shape.

    Args:
      mesh: an arrangement such as "tensor=4", or a mesh from `make_mesh`.

    Raises:
      UserError: a mesh with other axes, with too few devices, or one that does not divide the decoder.
    """
    mesh = make_mesh(mesh) if isinstance(mesh, str) else mesh
    if set(mesh.axis_names) != {DATA, TENSOR}:
        raise UserError(f'the mesh has axes {mesh.axis_names}, expected "{DATA}" and "{TENSOR}": take make_mesh')
    require_divides(MeshShape(**mesh.shape), config.text)

    def where(path: tuple[str, ...], shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, spec_of(path, shape, mesh.shape[TENSOR]))

    return where


def spec_of(path: tuple[str, ...], shape: tuple[int, ...], tensor: int) -> PartitionSpec:
    """How a parameter is cut; whole where its rule would not cut it evenly, as it happens to a vocabulary."""
    joined = "/".join(path)
    spec = next((spec for pattern, spec in RULES if re.fullmatch(pattern, joined)), WHOLE)
    return spec if all(size % tensor == 0 for size, axis in zip(shape, spec, strict=False) if axis) else WHOLE


def require_divides(shape: MeshShape, text: TextConfig) -> None:
    """Refuses a decoder whose heads or width of MLP do not come out even.

    Raises:
      UserError: naming both.
    """
    for size, what in (
        (text.num_attention_heads, "attention heads"),
        (text.num_key_value_heads, "key-value heads"),
        (text.intermediate_size, "channels in its MLP"),
    ):
        if size % shape.tensor:
            raise UserError(
                f'mesh="{shape}": the decoder has {size} {what}, which tensor={shape.tensor} does not divide'
            )
