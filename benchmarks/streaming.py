"""What streaming costs: the embedded model's answer whole, paced and token by token, from the same compiled programs.

    python -m benchmarks.streaming --out benchmarks/results/streaming.json

They take turns; a ratio is the median of the rounds' own. The answer is forced to its full length.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

import sparsevlm_jax as sv
from sparsevlm_jax.bench.files import write_json
from sparsevlm_jax.data import demo_model
from sparsevlm_jax.generation.api import require_processor, settings_for
from sparsevlm_jax.generation.request import GenerationRequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write raw samples there")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--new-tokens", type=int, default=64)
    options = parser.parse_args()
    model = sv.load(demo_model.path(), dtype=demo_model.DTYPE)
    inputs = require_processor(model)([[demo_model.photo()]], ["what digit is red?"])
    samples: dict[str, list[float]] = {}
    requests: dict[str, GenerationRequest] = {}
    for method in ("dense", "v1.5"):
        settings = settings_for(model, method, options.new_tokens)
        settings["end_tokens"] = ()
        requests[method] = GenerationRequest(model.params, model.config, inputs.ids, inputs.images, **settings)
    for number in range(options.rounds + 1):
        for method, request in requests.items():
            turns = [(f"{method} whole", options.new_tokens), (f"{method} paced", None), (f"{method} one by one", 1)]
            for name, every in turns[number % 3 :] + turns[: number % 3]:
                seconds = _decoding(request, every)
                if number:  # the first round compiles
                    samples.setdefault(name, []).append(seconds)
    for method in requests:
        whole = samples[f"{method} whole"]
        for how in ("paced", "one by one"):
            streamed = samples[f"{method} {how}"]
            more = median(b / a for a, b in zip(whole, streamed, strict=True)) - 1
            print(
                f"{method}: {options.new_tokens} tokens whole {1e3 * median(whole):.1f} ms, "
                f"{how} {1e3 * median(streamed):.1f} ms, {100 * more:+.1f} %"
            )
    if options.out:
        _write(options.out, samples, options.new_tokens)


def _decoding(request: GenerationRequest, every: int | None) -> float:
    """Seconds from the first token, which the prefill gives, to the last."""
    chunks = request.chunks(every)
    next(chunks)
    began = time.perf_counter()
    for _ in chunks:
        pass
    return time.perf_counter() - began


def _write(file: Path, samples: dict[str, list[float]], new_tokens: int) -> None:
    from sparsevlm_jax.bench.machine import environment

    result: dict[str, Any] = {"machine": environment("cpu"), "load": os.getloadavg(), "new_tokens": new_tokens}
    write_json(file, result | {"seconds": samples})


if __name__ == "__main__":
    main()
