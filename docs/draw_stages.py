"""Draws docs/stages.svg, the README's image: visual tokens entering each layer of LLaVA-1.5-7B, from the plans."""

from __future__ import annotations

from pathlib import Path

import sparsevlm_jax as sv

BAR, GAP, HEIGHT, LEFT, TOP = 17, 4, 200, 56, 46
DENSE, KEPT, MERGED = "#d8dee4", "#2f6f9f", "#e0912f"


def draw(plan: sv.Plan) -> str:
    """An SVG: one bar per layer, dense behind, kept and merged tokens in front."""
    visual, width = plan.visual_tokens, LEFT + 32 * (BAR + GAP) + 16
    scale = HEIGHT / visual
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 50}" '
        'font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{TOP + HEIGHT + 50}" fill="white"/>',
        f'<text x="{LEFT}" y="22" fill="#222">Visual tokens entering each decoder layer, '
        "LLaVA-1.5-7B, v1.5 at 192 equivalent tokens</text>",
    ]

    def bar(layer: int, low: float, tokens: int, colour: str) -> None:
        x, y = LEFT + layer * (BAR + GAP), TOP + HEIGHT - (low + tokens) * scale
        parts.append(
            f'<rect x="{x}" y="{y:.1f}" width="{BAR}" height="{tokens * scale:.1f}" fill="{colour}" rx="1.5"/>'
        )

    merged = 0
    for stage in plan.stages:
        for layer in range(stage.start, stage.stop):
            bar(layer, 0, visual, DENSE)
            bar(layer, 0, stage.visual - merged, KEPT)
            bar(layer, stage.visual - merged, merged, MERGED)
        middle = LEFT + (stage.start + stage.stop) / 2 * (BAR + GAP) - GAP / 2
        y = TOP + HEIGHT - stage.visual * scale - 6
        parts.append(f'<text x="{middle:.1f}" y="{y:.1f}" text-anchor="middle" fill="#222">{stage.visual}</text>')
        merged = stage.clusters
    base = TOP + HEIGHT
    for layer in (0, 3, 7, 16, 31):
        x = LEFT + layer * (BAR + GAP) + BAR / 2
        parts.append(f'<text x="{x}" y="{base + 18}" text-anchor="middle" fill="#555">{layer}</text>')
    for tokens in (0, visual):
        y = base - tokens * scale + 4
        parts.append(f'<text x="{LEFT - 8}" y="{y:.1f}" text-anchor="end" fill="#555">{tokens}</text>')
    x = LEFT
    for colour, label in ((KEPT, "kept"), (MERGED, "merged from dropped ones"), (DENSE, "saved against dense")):
        parts.append(f'<rect x="{x}" y="{base + 30}" width="12" height="12" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{base + 41}" fill="#222">{label}</text>')
        x += 40 + 8 * len(label)
    return "\n".join([*parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    plan = sv.make_plan(sv.Sparsity.v15(keep=192), sv.llava_15_7b(), visual_tokens=576)
    Path(__file__).with_name("stages.svg").write_text(draw(plan))
