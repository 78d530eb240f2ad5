"""Runs a cell of the matrix: the turns of its sides, and whether they agree.

Results grow: sides that a cell's file holds already are not run again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sparsevlm_jax.bench.agreement import Verdict, drift, shown, verdicts
from sparsevlm_jax.bench.files import read_json, write_json
from sparsevlm_jax.bench.machine import RESERVE, environment, free_bytes, seat, worker_bytes
from sparsevlm_jax.bench.shapes import ONE_ROW, Cell, Side
from sparsevlm_jax.bench.sitting import Log, Settings, Sitting
from sparsevlm_jax.bench.worker import Worker, WorkerError


def run_cell(cell: Cell, sides: Sequence[Side], settings: Settings, folder: Path, log: Log) -> dict[str, Any]:
    """Runs the sides that the cell's result does not hold yet; returns the result, written to `folder` as it grows.

    The first side, with which the others are compared, sits with them every time. Sides that take one row only are
    left out of larger batches. Of a side that does not agree no sample is kept. What a sitting has measured before its
    end stands in `unfinished/`: of one that is cut off the raw seconds are there.
    """
    log(cell.key)
    file, unfinished = folder / f"{cell.key}.json", folder / "unfinished" / f"{cell.key}.json"
    empty = {"cell": asdict(cell), "settings": asdict(settings), "sides": {}, "sittings": []}
    result: dict[str, Any] = read_json(file) if file.exists() else empty
    possible = [side for side in sides if cell.batch == 1 or side.engine not in ONE_ROW]
    missing = [side for side in possible if side.name not in result["sides"]]
    if not missing:
        log("  is there already")
        return result
    gate = Gate(cell, settings, folder / "gates", log)
    if cell.dtype != "float32":
        gate.ask([possible[0], *missing])
    able = [side for side in dict.fromkeys([possible[0], *missing]) if gate.passes(side)]
    result["sides"] |= {side.name: {"side": asdict(side)} for side in missing if side not in able}
    for together in seat(cell, able, settings.device, settings.at_once):
        sitting = Sitting(cell, settings, log)
        so_far = {"cell": asdict(cell), "settings": asdict(settings), "samples": sitting.samples}
        sitting.run(together, after_round=partial(write_json, unfinished, so_far))
        gate.keep(sitting.answers)
        result["sittings"].append(sitting.samples)
        for side in together:
            result["sides"].setdefault(side.name, {"side": asdict(side)} | sitting.reports[side.name])
        _save(result, gate, file)
        if unfinished.exists():  # it is not where no round came to its end
            unfinished.unlink()
            if not any(unfinished.parent.iterdir()):
                unfinished.parent.rmdir()
    if not able:
        _save(result, gate, file)
    return result


def _save(result: dict[str, Any], gate: Gate, file: Path) -> None:
    """Writes what there is, with verdicts and drifts; samples of sides that disagree are taken out of it."""
    result["environment"] = environment(gate.settings.device)
    for side in gate.sides:
        if side.name not in result["sides"]:
            continue
        verdict = gate.verdict(side)
        known = result["sides"][side.name].get("verdict")
        result["sides"][side.name] |= {"verdict": verdict._asdict(), "drift": gate.drift(side)}
        if not shown(verdict):
            if known != verdict._asdict():
                gate.log(f"  {side.name} {verdict.status}: {verdict.detail}")
            for samples in result["sittings"]:
                samples.pop(side.name, None)
    for report in result["sides"].values():  # in 16 bit nobody is asked about a side that has no counterpart
        report.setdefault("verdict", Verdict("alone", "")._asdict())
    write_json(file, result)


class Gate:
    """What every side of a cell answers in float32, kept in a file: cells that share the rows ask once.

    A float32 cell's own workers give the answers. For a 16-bit cell workers of their own do, from the batch's first
    rows, for sides that another one has to agree with; each such side's 16-bit run is compared with its float32 run.
    """

    def __init__(self, cell: Cell, settings: Settings, folder: Path, log: Log) -> None:
        self.cell, self.settings, self.log = cell, settings, log
        if cell.dtype != "float32":
            self.cell = replace(cell, batch=min(cell.batch, settings.gate_rows))
        self._file = folder / f"{self.cell.key}-{settings.gate_tokens}.json"
        self._kept: dict[str, dict[str, Any]] = read_json(self._file) if self._file.exists() else {}

    def ask(self, sides: Sequence[Side]) -> None:
        """Has workers answer for the sides that have not and that have a counterpart; on a GPU several at once."""
        sides = list(dict.fromkeys(sides))
        counts = Counter(side.counterpart for side in sides)
        new = [side for side in sides if counts[side.counterpart] > 1 and side.name not in self._kept]
        with ThreadPoolExecutor(self._at_once()) as pool:
            for side, answer in zip(new, pool.map(self._answer, new), strict=True):
                self._keep(side, answer)

    def keep(self, answers: dict[Side, Any]) -> None:
        """Takes answers of a float32 sitting; a string says why there is none."""
        for side, answer in answers.items():
            self._keep(side, {"error" if isinstance(answer, str) else "answer": answer})

    def passes(self, side: Side) -> bool:
        """False where it is known that the side disagrees or fails."""
        return side.name not in self._kept or shown(self.verdict(side))

    def _at_once(self) -> int:
        """Float32 workers that the device's memory holds; a CPU's cores are busy with one."""
        if self.settings.device == "cpu":
            return 1
        wide = replace(self.cell, dtype="float32")
        return max(1, int(free_bytes(self.settings.device) * RESERVE / worker_bytes(wide)))

    @property
    def sides(self) -> list[Side]:
        """Those whose answers are kept."""
        return [Side(**kept["side"]) for kept in self._kept.values()]

    def verdict(self, side: Side) -> Verdict:
        answers = [kept.get("answer") or kept["error"] for kept in self._kept.values()]
        return verdicts(dict(zip(self.sides, answers, strict=True)))[side.name]

    def drift(self, side: Side) -> dict[str, Any] | None:
        return self._kept[side.name].get("drift")

    def _answer(self, side: Side) -> dict[str, Any]:
        """A side's float32 answer, and how far its 16-bit run drifts from it."""
        self.log(f"  {side.name}: comparing with its float32 run")
        steps, device = self.settings.gate_tokens, self.settings.device
        try:
            with TemporaryDirectory() as scratch:
                files = [str(Path(scratch) / f"{name}.npy") for name in ("wide", "narrow")]
                with Worker(replace(self.cell, dtype="float32"), side, steps, device) as wide:
                    answer = wide.ask("follow", steps=steps, file=files[0])
                with Worker(self.cell, side, steps, device) as narrow:
                    forced = narrow.ask("follow", steps=steps, file=files[1], tokens=answer["tokens"])
                found = drift(np.load(files[0]), np.load(files[1]), answer["selections"], forced["selections"])
                return {"answer": answer, "drift": found._asdict()}
        except WorkerError as error:
            return {"error": str(error)}

    def _keep(self, side: Side, what: dict[str, Any]) -> None:
        self._kept[side.name] = {"side": asdict(side)} | what
        write_json(self._file, self._kept)
