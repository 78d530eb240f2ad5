"""Damaged and hostile inputs by the thousand: each has to end in an answer or one clear error, soon and in little room.

    python -m tests.fuzz --count 2000 --seed 0

prints a table of what was damaged and how it ended. One process does the work, so that imports are paid once; it is
started again when it has to be stopped.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

SECONDS, BYTES = 2.0, 1_000_000_000  # beyond what the undamaged input takes
OUTCOMES = ("answer", "UserError", "traceback", "over time", "over memory")
_PATIENCE = 30  # seconds after which the worker is stopped

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**9, 10**30, -(10**9), 0.5, 1e30, 1e300, float("nan"), float("inf"),
    "", "llava", "x" * 1000, "../../etc/passwd", "a\0b", "\ud800", "{% for i in range(10**9) %}{% endfor %}",
    [], [[]], {}, {"a": 1}, [1, 2, 3], [None], ["x"], [-2, -5], [1e30], {"shortest_edge": 10**9},
]  # fmt: skip
TEMPLATES = [
    "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] * 3 }}{% endfor %}{% endfor %}",
    "{% set ns = namespace(a='x') %}{% for i in range(30) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}",
    "{{ messages | tojson(indent=2) | replace('a', 'b') | center(80) | indent(4) }}",
    "{% macro m(n) %}{% if n > 0 %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}x{% endmacro %}{{ m(9) }}",
    "{{ '%05d|%s' % (3, messages) }}{{ '{:>8}'.format(1) }}{{ [1, 2] * 3 }}{{ 2**8 }}{{ 'a,b'.split(',') }}",
]
Mutation = Callable[[random.Random, Path], None]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="inputs in total")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(*map(Path, given.work))
        return
    with tempfile.TemporaryDirectory() as place:
        results = list(run(Path(place), cases(given.seed, given.count)))
    counts = Counter((kind, outcome) for (kind, *_), outcome, _ in results)
    print(f"{'':12}" + "".join(f"{outcome:>13}" for outcome in OUTCOMES))
    for kind in KINDS:
        print(f"{kind:12}" + "".join(f"{counts[kind, outcome]:13}" for outcome in OUTCOMES))
    for case, outcome, detail in results:
        if outcome not in OUTCOMES[:2]:
            print(*case, outcome, detail, sep=" | ")


def cases(seed: int, count: int) -> list[tuple[str, int, int]]:
    """Kind, seed and number of inputs, all kinds in turn."""
    kinds = list(KINDS)
    return [(kinds[number % len(kinds)], seed, number) for number in range(count)]


def run(place: Path, wanted: list[tuple[str, int, int]]) -> Iterator[tuple[tuple[str, int, int], str, str]]:
    """Case, outcome and detail of every case, in the order of the cases."""
    if not (place / "sound").exists():
        make_sound(place / "sound")
    worker = None
    for case in wanted:
        worker = worker or start(place)
        assert worker.stdin and worker.stdout
        print(*case, file=worker.stdin, flush=True)
        killer = subprocess.Popen(["sleep", str(_PATIENCE)])
        line = read_line(worker, killer)
        killer.kill()
        killer.wait()
        if line is None:
            worker.kill()
            worker.wait()
            worker = None
            yield case, "over time" if killer.returncode == 0 else "traceback", "the process had to be stopped, or died"
        else:
            outcome, detail = json.loads(line)
            yield case, outcome, detail
    if worker:
        worker.communicate()


def start(place: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.fuzz", "--work", str(place / "sound"), str(place / "damaged")]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, env=env)


def read_line(worker: subprocess.Popen[str], killer: subprocess.Popen[bytes]) -> str | None:
    """The worker's next line; None when it has died or the patience is over."""
    import select

    assert worker.stdout
    while not select.select([worker.stdout], [], [], 0.2)[0]:
        if killer.poll() is not None:
            return None
    return worker.stdout.readline() or None


# In the worker.


def work(sound: Path, damaged: Path) -> None:
    """Answers every case on stdin with a line: outcome and detail."""
    print_result, sys.stdout = sys.stdout, io.StringIO()
    baseline = {kind: max(attempt(kind, sound)[2] for _ in range(2)) for kind in KINDS}
    room = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 3 * BYTES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    for line in sys.stdin:
        kind, *numbers = line.split()
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(sound, damaged, ignore=partial(unused, kind, sound))
        KINDS[kind][0](random.Random(" ".join([kind, *numbers])), damaged)
        before = reset_peak()
        outcome, detail, seconds = attempt(kind, damaged)
        if peak() - before > BYTES:
            outcome, detail = "over memory", f"{(peak() - before) / 1e9:.1f} GB; {detail}"
        elif seconds > baseline[kind] + SECONDS:
            outcome, detail = "over time", f"{seconds:.1f} s; {detail}"
        print(json.dumps([outcome, detail]), file=print_result, flush=True)


def unused(kind: str, sound: Path, folder: str, names: list[str]) -> list[str]:
    """The parts of the sound inputs that a kind leaves alone."""
    if Path(folder) != sound:
        return []
    return ["orbax"] if KINDS[kind][1] in (load_hf, ask) else ["hf"]


def attempt(kind: str, folder: Path) -> tuple[str, str, float]:
    """How using the folder ends, and after how many seconds."""
    from sparsevlm_jax.errors import UserError

    start = time.perf_counter()
    try:
        KINDS[kind][1](folder)
        outcome, detail = "answer", ""
    except UserError as error:
        outcome, detail = ("traceback" if len(str(error).splitlines()) != 1 else "UserError"), str(error)
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome, detail = "traceback", f"{type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    return outcome, detail[:500], time.perf_counter() - start


def reset_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


# What is sound.


def make_sound(folder: Path) -> None:
    """A checkpoint with everything beside it, the same converted, and images."""
    import numpy as np
    from PIL import Image

    from sparsevlm_jax.checkpoints.convert import convert
    from tests.hf import CHAT_TEMPLATE, tiny_llava

    model = tiny_llava(folder / "hf", layers=2, hidden=32, ffn=48)
    (model / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    convert(model, folder / "orbax")
    images = folder / "images"
    images.mkdir()
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png", "gif", "webp", "tiff", "bmp"):
        options: dict[str, Any] = {"exif": exif} if suffix in ("jpg", "png") else {}
        colours.save(images / f"image.{suffix}", **options)
    colours.save(images / "image.tif", compression="tiff_lzw")


# How it is damaged.


def flip(rng: random.Random, file: Path) -> None:
    """Bytes changed, cut off, doubled or filled in."""
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 20])):
        at = rng.randrange(len(content) + 1)
        match rng.randrange(5):
            case 0 | 1:
                content[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                content = content[:at] or content
            case 3:
                content[at:at] = content[at : at + 50]
            case 4:
                content[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"[[[["])
    file.write_bytes(content)


def replace_value(rng: random.Random, document: Any) -> None:
    """One entry, anywhere in a JSON document, changed or removed."""
    node = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        inner = node[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            node = inner
            continue
        if rng.random() < 0.1:
            del node[key]
        else:
            node[key] = copy.deepcopy(rng.choice(NASTY))  # a later change must not reach into it
        return


def damage_json(rng: random.Random, file: Path) -> None:
    if rng.random() < 0.3:
        flip(rng, file)
        return
    document = json.loads(file.read_text())
    for _ in range(rng.choice([1, 1, 2, 5])):
        replace_value(rng, document)
    file.write_text(json.dumps(document))


def config(rng: random.Random, folder: Path) -> None:
    damage_json(rng, folder / "hf" / rng.choice(["config.json", "config.json", "generation_config.json"]))


def header(rng: random.Random, folder: Path) -> None:
    file = folder / "hf" / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = folder / "header"
    text.write_bytes(content[8 : 8 + length])
    damage_json(rng, text)
    size = text.stat().st_size if rng.random() < 0.9 else rng.choice([0, 2**63, length + 1])
    file.write_bytes(size.to_bytes(8, "little") + text.read_bytes() + content[8 + length :])


def side_file(rng: random.Random, folder: Path) -> None:
    names = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer.json")
    file = folder / "hf" / rng.choice([name for name in names if (folder / "hf" / name).exists()])
    match rng.randrange(10):
        case 0:
            file.rename(folder / "elsewhere")
            file.symlink_to(folder / "elsewhere")
        case 1:
            file.unlink()
            os.mkfifo(file)
        case _:
            damage_json(rng, file)


def template(rng: random.Random, folder: Path) -> None:
    source = rng.choice(TEMPLATES)
    for _ in range(rng.choice([0, 1, 2, 4])):
        word = rng.choice(
            ["range(99999)", "10**9", "'x' * 9**9", "messages", "[messages] * 999", "ns.a", "loop", "m(99)"]
        )
        at = rng.choice([i for i, letter in enumerate(source) if letter in "0123456789"] or [len(source)])
        source = source[:at] + word + source[at + 1 :] if rng.random() < 0.7 else source[:at] + source[at + 2 :]
    (folder / "hf" / "chat_template.jinja").write_text(source)


def manifest(rng: random.Random, folder: Path) -> None:
    damage_json(rng, folder / "orbax" / "manifest.json")


def chunk(rng: random.Random, folder: Path) -> None:
    files = sorted(item for item in (folder / "orbax" / "params").rglob("*") if item.is_file())
    file = rng.choice(files)
    match rng.randrange(6):
        case 0:
            file.unlink()
        case 1:
            file.write_bytes(rng.choice(files).read_bytes())
        case 2:
            shutil.rmtree(file.parent)
        case _:
            flip(rng, file)


def image(rng: random.Random, folder: Path) -> None:
    file = rng.choice(sorted((folder / "images").glob("image.*")))
    flip(rng, file)
    file.rename(folder / "image")


# How it is used.


def load_hf(folder: Path) -> None:
    from sparsevlm_jax import load

    load(folder / "hf")


def load_orbax(folder: Path) -> None:
    from sparsevlm_jax import load

    load(folder / "orbax")


def ask(folder: Path) -> None:
    from sparsevlm_jax.inputs.processor import Processor
    from sparsevlm_jax.models.llava import LlavaConfig

    processor = Processor.from_pretrained(folder / "hf", LlavaConfig.from_file(folder / "hf"))
    if processor is not None:
        processor([[folder / "images" / "image.png"]], ["what is this?"])


def look(folder: Path) -> None:
    from sparsevlm_jax.inputs.images import open_image

    open_image(folder / "image" if (folder / "image").exists() else folder / "images" / "image.png")


KINDS: dict[str, tuple[Mutation, Callable[[Path], None]]] = {
    "config": (config, load_hf),
    "header": (header, load_hf),
    "side-file": (side_file, ask),
    "template": (template, ask),
    "manifest": (manifest, load_orbax),
    "chunk": (chunk, load_orbax),
    "image": (image, look),
}


if __name__ == "__main__":
    main()
