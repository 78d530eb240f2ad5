"""Programs of full-size models compiled for an H100 and a TPU v5e, neither of which has to be there.

    python -m benchmarks.compile_for --devices h100 --out benchmarks/results/compile_for.json
    python -m benchmarks.compile_for --devices v5e --out benchmarks/results/compile_for.json
    python -m benchmarks.compile_for --tables --out benchmarks/results/compile_for.json

Each compiler needs an environment of its own: pip install '.[cuda12]' and pip install '.[tpu]'. Every result is written
as it comes; called again it goes on with what is missing. --tables prints those of docs/accelerators.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsevlm_jax.aot.compile_for import CompiledAnswer, Deployment, TooLargeError, compile_for, largest_batch
from sparsevlm_jax.aot.devices import DEVICES, require_compiler
from sparsevlm_jax.aot.programs import Prompts
from sparsevlm_jax.aot.report import answer_report, kernels_of_a_point
from sparsevlm_jax.bench.files import read_json, write_json
from sparsevlm_jax.bench.tables import Table
from sparsevlm_jax.config import QUANTIZATIONS, ModelConfig
from sparsevlm_jax.models.presets import PRESETS
from sparsevlm_jax.parallel.mesh import ONE, MeshShape
from sparsevlm_jax.pruning.methods import sparsity
from sparsevlm_jax.text import in_bytes

MODELS = ("llava-1.5-7b", "llava-next-7b", "video-llava-7b", "llava-1.5-13b")
METHODS = ("dense", "v1.5")
BATCHES = (1, 8, 32)
FRAMES, TEXT_TOKENS, NEW_TOKENS, DTYPE = 8, 88, 128, "bfloat16"
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "libtpu",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results' file")
    parser.add_argument("--devices", nargs="+", choices=list(DEVICES), default=[])
    parser.add_argument("--models", nargs="+", choices=list(PRESETS), default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--mesh", type=MeshShape.parse, default=ONE, help="several of a device, as tensor=4")
    parser.add_argument("--quantize", choices=QUANTIZATIONS, help="weights of the decoder's layers in eight bits")
    parser.add_argument("--no-search", action="store_true", help="leave the largest batch out")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there")
    options = parser.parse_args()
    results = read_json(options.out) if options.out.exists() else {}
    for name in options.devices:
        require_compiler(DEVICES[name])
        for model in options.models:
            for method in METHODS:
                deployment = Deployment(DEVICES[name], options.mesh, DTYPE, options.quantize)
                for key, result in cells(deployment, model, method, options.batches, not options.no_search, results):
                    results[key] = result | provenance()
                    write_json(options.out, results)
                    print(key, file=sys.stderr, flush=True)
    for table in tables(results) if options.tables else ():
        print(f"**{table.title}**\n\n{table.markdown()}\n")


def cells(
    deployment: Deployment, model: str, method: str, batches: list[int], search: bool, results: dict[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is missing of one column: a result for each batch, and the largest batch behind them."""
    mesh = deployment.mesh
    name = "/".join(filter(None, (deployment.device.name, deployment.quantize, "" if mesh == ONE else str(mesh))))
    prefix, known = f"{name} {model} {method}", []
    config, settings = PRESETS[model](), sparsity(method)
    prompts = prompts_of(model, config)
    missing = [batch for batch in batches if f"{prefix} {batch}" not in results]
    for batch in missing:
        report, answer = cell(config, settings, prompts(batch), deployment)
        known += [answer] if answer is not None else []
        yield f"{prefix} {batch}", report
        if answer is None:  # larger ones do not fit, either
            break
    if search and f"{prefix} largest" not in results:
        if not known and "does_not_fit" not in results[f"{prefix} 1"]:
            known = [compile_for(config, settings, prompts(mesh.data), deployment)]
        largest = largest_batch(config, settings, prompts(1), deployment, known) if known else 0
        yield f"{prefix} largest", {"batch": largest}


def cell(
    config: ModelConfig, settings: Any, prompts: Prompts, deployment: Deployment
) -> tuple[dict[str, Any], CompiledAnswer | None]:
    try:
        answer = compile_for(config, settings, prompts, deployment)
    except TooLargeError as error:
        return {"does_not_fit": str(error)}, None
    return answer_report(answer, deployment.device), answer


def prompts_of(model: str, config: ModelConfig) -> Any:
    """Prompts of one image that becomes most visual tokens, or of one video, by their number."""
    video = config.video_token_id is not None
    layout = config.video_layout(FRAMES) if video else config.image_layout(config.fullest_image)
    return lambda batch: Prompts(batch, (layout,), TEXT_TOKENS, NEW_TOKENS)


def provenance() -> dict[str, Any]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": found, "date": datetime.now(UTC).date().isoformat()}


def tables(results: dict[str, Any]) -> Iterator[Table]:
    """Memory and kernels at batch 1, and the roofline at every batch."""
    for device in dict.fromkeys(key.split()[0] for key in results):
        own = {key.partition(" ")[2]: result for key, result in results.items() if key.startswith(f"{device} ")}
        columns = list(dict.fromkeys(tuple(key.split()[:2]) for key in own))
        yield _memory(device, own, columns)
        yield _predictions(device, own, columns)


def _memory(device: str, own: dict[str, Any], columns: list[tuple[str, ...]]) -> Table:
    head = ["batch 1", "compile: prefill, decoding", "parameters", "cache", "temporaries", "left", "largest batch"]
    head += ["kernels: prefill, a step", "a pruning layer adds"]
    rows = []
    for model, method in columns:
        found = own[f"{model} {method} 1"]
        largest = str(own.get(f"{model} {method} largest", {}).get("batch", "–"))
        if "does_not_fit" in found:
            rows.append([f"{model}, {method}", *["–"] * 4, "does not fit", "0", "–", "–"])
            continue
        prefill, decode = found["prefill"], found["decode"]
        sizes = (found["parameter_bytes"], found["cache_bytes"], prefill["temporary_bytes"], found["left_bytes"])
        rows.append(
            [
                f"{model}, {method}",
                f"{prefill['compile_seconds']:.0f} s, {decode['compile_seconds']:.0f} s",
                *map(in_bytes, sizes),
                largest,
                f"{prefill['kernels']}, {decode['kernels']}",
                _added(own, model, method),
            ]
        )
    return Table(f"{device}, memory and kernels", head, rows)


def _added(own: dict[str, Any], model: str, method: str) -> str:
    dense, found = own.get(f"{model} dense 1", {}), own[f"{model} {method} 1"]
    if method == "dense" or "prefill" not in dense:
        return "–"
    scopes, everything = kernels_of_a_point(dense["prefill"], found["prefill"], len(found["lengths"]) - 1)
    return f"{scopes:.0f} ({everything:.0f} in all)"


def _predictions(device: str, own: dict[str, Any], columns: list[tuple[str, ...]]) -> Table:
    head = ["predicted, at least", *(f"batch {batch}: prefill, a step" for batch in BATCHES)]
    rows = []
    for model, method in columns:
        cells, fits = [], True
        for batch in BATCHES:
            found = own.get(f"{model} {method} {batch}", {})
            seconds = [found[part]["predicted_seconds"] for part in ("prefill", "decode") if part in found]
            fits = fits and (not found or found.get("left_bytes", -1) >= 0)
            times = ", ".join(f"{1000 * s:.3g} ms" if s < 1 else f"{s:.3g} s" for s in seconds)
            cells.append((times or "–") if fits else "does not fit")
        rows.append([f"{model}, {method}", *cells])
    return Table(f"{device}, roofline: predictions", head, rows)


if __name__ == "__main__":
    main()
