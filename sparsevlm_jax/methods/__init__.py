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
BUDGETS = ("keep", "keep_at", "flops_share", "cache_bytes")


def sparsity(method: str, **settings: Any) -> Sparsity:
    """The settings of a method by name, changed where `settings` says so (None leaves a setting as it is).

    Raises:
      UserError: no such method, or settings that it does not take.
    """
    if method not in METHODS:
        raise UserError(f'--method "{method}": expected one of {", ".join(METHODS)}')
    given = {name: value for name, value in settings.items() if value is not None}
    if not METHODS[method].draws:
        given.pop("seed", None)  # it would change nothing but the program's name
    for name, owner in (("scale", "v1"), ("bias", "v1"), ("ladder", "v1"), ("heads", "v2.0")):
        if name in given and method != owner:
            raise UserError(f"--{name} belongs to --method {owner}, not to {method}")
    if method == "v1":
        law = Sparsity.v1(given.pop("keep", None), given.pop("scale", None), given.pop("bias", None))
        for name in BUDGETS[1:]:
            if name in given:
                raise UserError(f"v1 takes no --{name.replace('_', '-')}: its counts follow from --scale and --bias")
        return replace(law, **given)
    if method == "dense":
        for name in BUDGETS:
            if name in given:
                raise UserError(f"dense takes no --{name.replace('_', '-')}: it keeps everything")
    return replace(METHODS[method].settings, **given)


__all__ = ["METHODS", "Layer", "Method", "Scores", "sparsity"]
