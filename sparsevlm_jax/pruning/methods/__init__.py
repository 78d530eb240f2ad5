"""Methods by name. Adding one is one file with a scoring function, and a line here."""

from __future__ import annotations

from typing import Any

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.pruning.methods.base import Method, PruningContext, Scores
from sparsevlm_jax.pruning.methods.baselines import (
    DENSE,
    DOWNSAMPLE,
    FASTV,
    POOL,
    PYRAMIDDROP,
    RANDOM,
    UNIFORM,
    VISION,
)
from sparsevlm_jax.pruning.methods.sparsevlm import V1, V15, V20
from sparsevlm_jax.pruning.settings import BUDGETS, Sparsity

METHODS: dict[str, Method] = {
    method.name: method
    for method in (DENSE, V1, V15, V20, RANDOM, UNIFORM, POOL, DOWNSAMPLE, FASTV, PYRAMIDDROP, VISION)
}


def sparsity(method: str, **settings: Any) -> Sparsity:
    """The settings of a method by name, changed where `settings` says so (None leaves a setting as it is).

    Args:
      method: a name in `METHODS`.
      settings: by their flat names, as `Sparsity.changed` takes them.

    Raises:
      UserError: no such method, or settings that it does not take.
    """
    if method not in METHODS:
        raise UserError(f'method="{method}": expected one of {", ".join(METHODS)}')
    own = METHODS[method]
    given = {name: value for name, value in settings.items() if value is not None}
    if not own.draws:
        given.pop("seed", None)  # it would change nothing but the program's name
    for name in given:
        owners = [other.name for other in METHODS.values() if name in other.options]
        if owners and name not in own.options:
            raise UserError(f"`{name}` belongs to `method` {' or '.join(owners)}, not to {method}")
        if name in BUDGETS:
            own.refuse_budget(name)
    return own.settings.changed(**given) if own.settle is None else own.settle(**given)


def as_sparsity(given: Sparsity | str | None) -> Sparsity:
    """Settings from themselves, the name of a method, or None for the default.

    Raises:
      UserError: anything else.
    """
    if given is None:
        return Sparsity.v15()
    if isinstance(given, str):
        return sparsity(given)
    if isinstance(given, Sparsity):
        return given
    raise UserError(f"sparsity is of type {type(given).__name__}: give Sparsity settings or the name of a method")


__all__ = ["METHODS", "PruningContext", "Method", "Scores", "as_sparsity", "sparsity"]
