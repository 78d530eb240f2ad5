"""Converts a random checkpoint of the size of LLaVA-1.5-7B and measures memory and rate.

    python -m benchmarks.convert_full_size FOLDER        needs 30 GB there; --layers 2 for a rehearsal

Writes benchmarks/results/convert_7b.json. The bound: the whole process stays below 3 GiB plus twice the largest group.
Beside converting stands a plain copy of the same files, and beside loading two plain reads of the converted ones: into
one buffer, and into memory that keeps them all, as a loaded model does. Files leave the kernel's cache before each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.models.parameters import entries
from sparsevlm_jax.models.presets import PRESETS

RESULTS = Path(__file__).parent / "results"
SHARDS = 3
GIB = 2**30
BLOCK = 2**24  # bytes at a time of plain copies and reads


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an empty or new folder; it is emptied again at the end")
    parser.add_argument("--model", choices=["llava-1.5-7b", "llava-1.5-13b"], default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers, for a rehearsal (no results file)")
    options = parser.parse_args()
    config = PRESETS[options.model]()
    if options.layers:
        config = replace(config, text=replace(config.text, num_hidden_layers=options.layers))
    source, target, back = (options.folder / name for name in ("source", "orbax", "back"))
    source.mkdir(parents=True)
    try:
        nbytes = make_checkpoint(source, config)
        result = {"model": options.model, "dtype": "float16", "bytes": nbytes, "shards": SHARDS}
        result["copy"] = timed(lambda: copy(source, back), nbytes, source)
        shutil.rmtree(back)
        forget(source)
        result["convert"] = measure("convert", [str(source), str(target)], nbytes)
        shutil.rmtree(source)  # room for the way back
        result["read"] = timed(lambda: read(target), nbytes, target)
        forget(target)
        result["keep"] = measure("keep", [str(target)], nbytes)
        for check in (True, False):
            forget(target)
            result[f"load{'' if check else '_unchecked'}"] = measure("load", [str(target), str(check)], nbytes)
        result["check"] = measure("check", [str(target)], nbytes)
        result["to_hf"] = measure("to_hf", [str(target), str(back)], nbytes)
        result["machine"] = {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "python": platform.python_version(),
        }
        print(json.dumps(result, indent=2))
        if not options.layers:
            RESULTS.mkdir(exist_ok=True)
            name = f"convert_{options.model.rsplit('-', 1)[1]}.json"
            (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")
    finally:
        shutil.rmtree(options.folder)


def make_checkpoint(folder: Path, config: LlavaConfig) -> int:
    """Writes random float16 weights in the published form: names of transformers 4.x, shards and index; its bytes."""
    stored = list(entries(config).values())
    sizes = [2 * int(np.prod(entry.shape)) for entry in stored]
    total, random = sum(sizes), np.random.default_rng(0)
    shards: list[list[int]] = [[] for _ in range(SHARDS)]
    for number in range(len(stored)):
        shards[min(SHARDS - 1, sum(sizes[:number]) * SHARDS // total)].append(number)
    places = {}
    for index, members in enumerate(shards):
        file = f"model-{index + 1:05}-of-{SHARDS:05}.safetensors"
        header, end = {}, 0
        for number in members:
            entry, size = stored[number], sizes[number]
            header[entry.name] = {"dtype": "F16", "shape": entry.shape, "data_offsets": [end, end + size]}
            places[entry.name], end = file, end + size
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for number in members:
                # Random bits with an exponent below that of infinity: finite, and no compressor shrinks them.
                bits = random.integers(0, 2**16, sizes[number] // 2, np.uint16) & np.uint16(0xBFFF)
                stream.write(bits.data)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": places})
    )
    (folder / "config.json").write_text(json.dumps(_hf_config(config)))
    return total


def timed(run: Callable[[], None], nbytes: int, folder: Path) -> dict[str, float | bool]:
    """Seconds and rate of something that reads the files of a folder."""
    forget(folder)
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), "bytes_per_second": round(nbytes / seconds)}


def forget(folder: Path) -> None:
    """Writes the files of a folder to the disk, and has the kernel drop them from memory."""
    for file in files(folder):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> None:
    """Copies files, to the disk."""
    target.mkdir()
    for file in files(source):
        with file.open("rb") as taken, (target / file.name).open("wb") as made:
            shutil.copyfileobj(taken, made, BLOCK)
            made.flush()
            os.fsync(made.fileno())


def read(folder: Path) -> None:
    """Reads every byte."""
    block = bytearray(BLOCK)
    for file in files(folder):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


def keep(folder: str, watch: object) -> list[np.ndarray]:
    """Reads every byte into memory of its own, as many files at a time as there are threads."""

    def read_file(file: Path) -> np.ndarray:
        content = np.empty(file.stat().st_size, np.uint8)
        with file.open("rb", buffering=0) as stream:
            done = 0
            while done < len(content):
                done += stream.readinto(content[done : done + BLOCK].data)
        return content

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(read_file, files(Path(folder))))


def files(folder: Path) -> list[Path]:
    return [item for item in sorted(folder.rglob("*")) if item.is_file()]


def measure(what: str, arguments: list[str], nbytes: int) -> dict[str, float | bool]:
    """Runs one step as a process of its own: seconds, with and without starting it, and the memory it took."""
    script = f"""
import json, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
from benchmarks.convert_full_size import keep
from sparsevlm_jax.process import memory
from sparsevlm_jax.checkpoints.check import check
from sparsevlm_jax.checkpoints.export import to_hf
from sparsevlm_jax.checkpoints.convert import convert
from sparsevlm_jax.checkpoints.load import load as load_model
def load(folder, check, watch):
    return jax.block_until_ready(load_model(folder, check=check == "True").params) and None
anonymous = 0
def watch(done, total):
    global anonymous
    anonymous = max(anonymous, memory()["RssAnon"])
    print(f"{{done / 1e9:.1f}} of {{total / 1e9:.1f}} GB, {{memory()['VmHWM'] / 2**30:.2f}} GiB", file=sys.stderr)
start = time.perf_counter()
result = {what}(*sys.argv[1:], watch=watch)
seconds, group = time.perf_counter() - start, getattr(result, "largest_group", 0)
print(json.dumps({{"VmHWM": memory()["VmHWM"], "RssAnon": anonymous, "group": group, "seconds": seconds}}))
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", script, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    found = json.loads(done.stdout.splitlines()[-1])
    report: dict[str, float | bool] = {
        "seconds": round(seconds, 1),
        "without_start_seconds": round(found["seconds"], 1),
        "bytes_per_second": round(nbytes / seconds),
        "VmHWM_bytes": found["VmHWM"],
        "RssAnon_bytes": found["RssAnon"],
    }
    if found["group"]:
        bound = 3 * GIB + 2 * found["group"]
        report |= {"largest_group_bytes": found["group"], "bound_bytes": bound, "within": found["VmHWM"] < bound}
    return report


def _hf_config(config: LlavaConfig) -> dict[str, object]:
    from dataclasses import asdict

    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": "float16",
        "image_token_index": config.image_token_id,
        "projector_hidden_act": config.projector_hidden_act,
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_config": {**asdict(config.vision), "model_type": "clip_vision_model"},
        "text_config": {**asdict(config.text), "model_type": "llama"},
    }


def _cpu() -> str:
    lines = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return lines[0].split(":", 1)[1].strip() if lines else platform.processor()


if __name__ == "__main__":
    main()
