"""Other people's programs that ask models; each of them is imported in its own file here, and nowhere else."""

from __future__ import annotations

from typing import Any


def lmms_eval_models() -> Any:
    """What lmms-eval's entry point is: where the classes are. They are imported when they are asked for."""
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    simple, chat = (f"{__name__}.lmms_eval.{name}" for name in ("SimpleModel", "ChatModel"))
    return ModelManifest("sparsevlm_jax", simple_class_path=simple, chat_class_path=chat)
