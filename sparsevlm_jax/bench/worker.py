"""A side in a process, mostly one of its own: reads requests as JSON lines on stdin, answers them on stdout.

Whatever libraries print goes to stderr. A request is {"of": side, "do": name, ...arguments}; an answer is {"ok": ...}
or {"error": ...}.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np

from sparsevlm_jax.bench.shapes import Cell, Side
from sparsevlm_jax.bench.timing import cores, forget_peak_memory, peak_resident_bytes, timed
from sparsevlm_jax.data.demo_model import photo
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.models.llava import LlavaConfig
from sparsevlm_jax.process import versions

VERSIONS = ("jax", "jaxlib", "flax", "torch", "transformers", "numpy")
CALIBRATION = {"cpu": (2048, 2**28), "gpu": (8192, 2**31)}  # side of the square matrices, bytes of the tall one


class WorkerError(RuntimeError):
    """A side that failed; its process is gone or of no more use."""


class Process:
    """The parent's end of a process in which sides live. It starts at once."""

    def __init__(self, device: str) -> None:
        self._compiler_files = TemporaryDirectory(prefix="bench-")
        root = Path(__file__).parent.parent.parent  # where the package is: the worker may start elsewhere
        self._process = subprocess.Popen(
            [sys.executable, "-m", "sparsevlm_jax.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=_environment(device, self._compiler_files.name, root),
        )

    def post(self, request: Mapping[str, Any]) -> None:
        """Sends a request; `receive` waits for its answer."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is gone, as `receive` will find
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def receive(self) -> Any:
        """The answer to the first request that has none yet.

        Raises:
          WorkerError: it failed, or the process is gone.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the process ended with exit code {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        """Ends the process, which it does by itself when nothing can be asked any more."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._compiler_files.cleanup()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._process.kill()  # whatever it is doing, nobody waits for it
        self.close()


class Worker:
    """The parent's end of a side. Use it as a context, which waits until the side is ready, and ends it.

    Args:
      process: where it lives, beside others; by default in one of its own.
    """

    def __init__(self, cell: Cell, side: Side, room: int, device: str, process: Process | None = None) -> None:
        self.side = side
        self._alone = process is None
        self._process = Process(device) if process is None else process
        self.post("begin", cell=asdict(cell), side=asdict(side), room=room, device=device, alone=self._alone)

    def ask(self, what: str, **arguments: Any) -> Any:
        """Has the worker do something, and waits.

        Raises:
          WorkerError: it failed, or is gone.
        """
        self.post(what, **arguments)
        return self.receive()

    def post(self, what: str, **arguments: Any) -> None:
        """Has the worker do something; `receive` waits for it."""
        self._process.post({"of": self.side.name, "do": what, **arguments})

    def receive(self) -> Any:
        """The answer to what was posted. Raises as `ask` does."""
        return self._process.receive()

    def close(self) -> None:
        """Ends the side, and its process where that is its own."""
        if self._alone:
            self._process.close()
        else:
            with suppress(WorkerError):
                self.ask("end")

    def __enter__(self) -> Worker:
        try:
            self.receive()
        except WorkerError:
            self.close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._alone:
            self._process.__exit__(*exception)
        elif exception[0] is None:
            self.close()


class Service:
    """The worker's end: one runner, and what can be asked of it."""

    def __init__(self, cell: Mapping[str, Any], side: Mapping[str, Any], room: int, device: str, alone: bool) -> None:
        self.cell, self.side, self.device, self.alone = Cell(**cell), Side(**side), device, alone
        self.settled = 0  # resident bytes before what is timed
        if self.side.engine == "jax":
            from sparsevlm_jax.bench.jax_side import JaxRunner

            self.runner: Any = JaxRunner(self.cell, self.side, room)
        else:
            from sparsevlm_jax.bench.torch_side import runner

            self.runner = runner(self.cell, self.side, room, device)

    def prepare(self, phases: Sequence[str]) -> None:
        self.runner.prepare(phases)

    def compile(self) -> dict[str, Any]:
        return self.runner.compile()

    def settle(self) -> None:
        """Before what is timed: what compiling and warming up has left behind does not count as memory."""
        gc.collect()
        self.settled = forget_peak_memory()

    def turn(self, marks: Sequence[int], phases: Sequence[str] = ()) -> dict[str, float]:
        """Runs every phase once: seconds by phase, and from pixels until so many new tokens were there."""
        seconds = {name: timed(run)[1] for name, run in self.runner.phases().items() if not phases or name in phases}
        if not phases or "generate" in phases:
            _, until = self.runner.generate(marks)
            seconds |= {f"tokens_{mark}": at for mark, at in zip(marks, until, strict=True)}
        return seconds

    def answer(self, new_tokens: int) -> dict[str, Any]:
        """What has to agree: tokens by row, and the selections behind them."""
        tokens, _ = self.runner.generate((new_tokens,))
        return {"tokens": tokens.tolist(), "selections": self.runner.selections()}

    def follow(self, steps: int, file: str, tokens: list[list[int]] | None = None) -> dict[str, Any]:
        """Decodes along given tokens, or greedily: the tokens by row and the selections; logits go to the file."""
        followed, logits = self.runner.follow(steps, None if tokens is None else np.asarray(tokens))
        np.save(file, logits)
        return {"tokens": followed.tolist(), "selections": self.runner.selections()}

    def preprocess(self) -> float:
        """Seconds that the photograph takes to become one prompt's pixels, by the family's processor on Pillow."""
        from PIL import Image

        processor = _image_processor(self.cell.config)

        def run() -> Any:
            with Image.open(photo()) as image:
                return processor([image.convert("RGB")] * self.cell.images, return_tensors="np")

        return min(timed(run)[1] for _ in range(3))

    def report(self) -> dict[str, Any]:
        """What is known after the turns: memory, peaks of the device, versions."""
        peak = peak_resident_bytes()
        device_peak = self.runner.device_peak_bytes() if self.alone else None  # the process's: of all its sides
        memory = {"resident_peak": peak, "rise": peak - self.settled, "device_peak": device_peak}
        return {
            "memory": memory,
            "peaks": self.runner.calibrate(*CALIBRATION[self.device]),
            "environment": {"cores": cores(), **versions(VERSIONS)},
        }

    def facts(self) -> dict[str, Any]:
        return self.runner.facts()

    def profile(self, folder: str, new_tokens: int) -> dict[str, dict[str, float]]:
        """See `bench.profiling`."""
        from sparsevlm_jax.bench.profiling import profile

        return profile(self.runner, Path(folder), new_tokens)


def _image_processor(config: LlavaConfig) -> Any:
    """CLIP's, or LLaVA-NeXT's, which cuts tiles too."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    side = config.vision.image_size
    sizes: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    if config.most_tiles == 1:
        return CLIPImageProcessorPil(**sizes)
    return LlavaNextImageProcessorPil(**sizes, **config.image_options)


def main() -> None:
    """Answers requests until stdin ends; then nobody waits for what is being done, either."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is interrupted, and ends this process
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    services: dict[str, Any] = {}
    for line in _requests():
        request = json.loads(line)
        side, what, found = request.pop("of"), request.pop("do"), None
        try:
            if what == "begin":
                services[side] = Service(**request)
            elif what == "end":
                services.pop(side, None)
            else:
                found = getattr(services[side], what)(**request)
            answer = {"ok": found}
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # of any library, out of memory included: the parent reports it and goes on
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        with suppress(BrokenPipeError):  # the parent is gone, which `_requests` sees too
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


def _requests() -> Iterator[str]:
    """Lines of stdin. Ends the process when there can be no more, at once: a parent that was killed does not say so."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    Thread(target=read, daemon=True).start()
    while True:
        yield lines.get()


def _environment(device: str, folder: str, root: Path) -> dict[str, str]:
    """No memory taken beforehand, all cores, and a folder of its own for what compilers keep: cold has to be cold."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu" if device == "cpu" else "cuda,cpu",  # what is counted is counted on the CPU
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "OMP_NUM_THREADS": str(cores()),
        "JAX_COMPILATION_CACHE_DIR": str(Path(folder) / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": str(Path(folder) / "inductor"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }


if __name__ == "__main__":
    main()
