"""Results to a report: one self-contained HTML page, and Markdown with its images beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from sparsevlm_jax.bench.break_even import break_even_table
from sparsevlm_jax.bench.files import read_json, write_text
from sparsevlm_jax.bench.metrics import figures
from sparsevlm_jax.bench.plots import plots
from sparsevlm_jax.bench.shapes import Cell
from sparsevlm_jax.bench.tables import tables
from sparsevlm_jax.errors import UserError


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every cell's result in a folder, which may hold other JSON too; float32, which all sides agree in, first."""
    found = [read_json(file) for file in sorted(folder.glob("*.json"))]
    results = [result for result in found if "sittings" in result]
    return sorted(results, key=lambda result: result["cell"]["dtype"] != "float32")


def write_report(folder: Path) -> tuple[Path, Path]:
    """Writes report.html and report.md of all results in a folder; returns their paths.

    Raises:
      UserError: there are no results.
    """
    results = read_results(folder)
    sections = [section(result) for result in results]
    sweep = read_results(folder / "break-even")
    summary = break_even_table(sweep)
    if not results and summary is None:
        raise UserError(f"{folder}: no results there; run `sparsevlm bench --out {folder}` first")
    environment = Environment(
        loader=PackageLoader("sparsevlm_jax.bench", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html, markdown = folder / "report.html", folder / "report.md"
    for found in sections:
        for number, svg in enumerate(found["plots"].values()):
            write_text(folder / "plots" / f"{found['key']}-{number}.svg", svg)
    environment.filters["inline"] = lambda svg: Markup(svg[svg.index("<svg") :])
    for path, name in ((html, "report.html"), (markdown, "report.md")):
        environment.autoescape = path.suffix == ".html"
        page = environment.get_template(name).render(sections=sections, break_even=summary, sweep=_machines(sweep))
        write_text(path, page)
    return html, markdown


def section(result: Mapping[str, Any]) -> dict[str, Any]:
    """A cell for the templates."""
    cell = Cell(**result["cell"])
    found = figures(result)
    return {
        "key": cell.key,
        "title": f"{cell.shape}, batch {cell.batch}, {cell.visual_tokens} + {cell.text_tokens} tokens, {cell.dtype}",
        "machine": _machine(result),
        "tables": tables(result, found),
        "plots": plots(found),
    }


def readme_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The README's table: the speed of every cell, with its machine."""
    parts = []
    for result in results:
        made = section(result)
        speed = made["tables"][0]
        parts += [f"**{made['title']}** ({made['machine']}):", speed.markdown()]
    return "\n\n".join(parts)


def _machines(results: Sequence[Mapping[str, Any]]) -> str:
    return "; ".join(dict.fromkeys(map(_machine, results)))


def _machine(result: Mapping[str, Any]) -> str:
    side = next((side for side in result["sides"].values() if "environment" in side), {})
    environment = result["environment"] | side.get("environment", {})
    device = side.get("facts", {}).get("device", "cpu")
    where = environment["processor"] if device == "cpu" else device
    versions = ", ".join(
        f"{name} {environment[name]}" for name in ("jax", "torch", "transformers") if name in environment
    )
    return f"{where}, {environment.get('cores', '?')} cores, {versions}, {environment['date']}"
