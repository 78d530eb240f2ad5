"""Methods by name. Adding one is one file with a scoring function, and a line here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.methods.base import Layer, Method, Scores
from sparsevlm_jax.methods.rivals import DENSE, DOWNSAMPLE, FASTV, POOL, PYRAMIDDROP, RANDOM, UNIFORM, VISION
from sparsevlm_jax.methods.sparsevlm import V1, V15, V20
from sparsevlm_jax.schedule import Sparsity

METHODS: dict[str, Method] = {
    method.name: method
    for method in (DENSE, V1, V15, V20, RANDOM, UNIFORM, POOL, DOWNSAMPLE, FASTV, PYRAMIDDROP, VISION)
}


def sparsity(method: str, **settings: Any) -> Sparsity:
    """The settings of a method by name, changed where `settings` says so (None leaves a setting as it is).

    Raises:
      UserError: no such method, or settings that it does not take.
    """
    if method not in METHODS:
        raise UserError(f'--method "{method}": expected one of {", ".join(METHODS)}')
    given = {name: value for name, value in settings.items() if value is not None}
    if method == "v1":
        law = Sparsity.v1(given.pop("keep", None), given.pop("scale", None), given.pop("bias", None))
        for name in ("keep_at", "flops_share", "cache_bytes"):
            if name in given:
                raise UserError(f"v1 takes no --{name.replace('_', '-')}: its counts follow from --scale and --bias")
        return replace(law, **given)
    for name in ("scale", "bias"):
        if name in given:
            raise UserError(f"--{name} belongs to --method v1, not to {method}")
    return replace(METHODS[method].settings, **given)


__all__ = ["METHODS", "Layer", "Method", "Scores", "sparsity"]
