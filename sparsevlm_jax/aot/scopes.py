"""Where an instruction belongs: the phases of an answer, by the code's own named scopes."""

from __future__ import annotations

# Phase -> parts of a scope's path; the first phase that has one is where an instruction belongs.
PHASES = {
    "tower": ("vision_tower", "image_tower", "video_tower", "multi_modal_projector"),
    "rate": ("rate",),
    "score": ("score",),
    "select": ("select",),
    "recycle": ("recycle",),
    "rebuild": ("rebuild",),
    "attend": ("attend",),
    "projections": ("self_attn", "rotary"),
    "mlp": ("mlp",),
    "head": ("lm_head",),
}
OTHER = "norms, residuals, sampling, caches"
PRUNING = ("rate", "score", "select", "recycle", "rebuild")


def phase_of(scope: str) -> str:
    """The phase of a scope's path, such as jit(start)/prefill/score/dot_general."""
    parts = set(scope.split("/"))
    return next((phase for phase, names in PHASES.items() if parts & set(names)), OTHER)
