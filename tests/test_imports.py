"""Imports run one way: what stands later in ORDER may import what stands earlier; neighbours in a row never meet."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sparsevlm_jax.models.family import FAMILIES as FAMILY_RECORDS

PACKAGE = Path(__file__).parent.parent / "sparsevlm_jax"
ORDER = (
    *("errors", "bounds", "process progress ahead", "data", "text", "files", "layout rotary", "config", "config_json"),
    *("parallel", "ops", "pruning inputs", "models", "checkpoints", "generation", "aot"),
    "explain evaluate bench integrations",
    "methods __init__",  # names for users
    *("cli", "__main__"),
)
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row.split()}
FAMILIES = {family.config.__module__.rpartition(".")[2] for family in FAMILY_RECORDS.values()}
# Of a family's file: the registry, presets, names for users, the benchmark (of LLaVA-1.5 alone), and one another.
FAMILY_FILES = tuple(f"sparsevlm_jax.models.{name}." for name in FAMILIES)
KNOW_FAMILIES = (
    "models/family.py",
    "models/presets.py",
    "__init__.py",
    "bench/",
    *(f"models/{n}.py" for n in FAMILIES),
)
# Where packages are imported that not everybody has.
OWN_PLACES = {
    "torch": ("checkpoints/torch_bin.py", "checkpoints/verify.py", "bench/torch_"),
    "lmms_eval": ("integrations/",),
    "ray": ("evaluate/ray_engine.py",),
}


def faults(file: str, source: str) -> list[str]:
    """What a module of the package must not import; imports in functions and for type checkers count too."""
    own, found = Path(file).parts[0].removesuffix(".py"), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            top, _, rest = name.partition(".")
            part = rest.split(".")[0] if rest.split(".")[0] in RANK else "__init__"
            up = top == "sparsevlm_jax" and part != own and RANK[part] >= RANK[own]
            family = name.startswith(FAMILY_FILES) and not file.startswith(KNOW_FAMILIES)
            if (up and name != "sparsevlm_jax.__version__") or family:
                found.append(f"{file} imports {name}")
            elsewhere = top in OWN_PLACES and not file.startswith(OWN_PLACES[top])
            if top in ("convert", "benchmarks", "training", "tests") or elsewhere:
                found.append(f"{file} imports {name}")
    return found


def test_imports_run_one_way() -> None:
    files = [file.relative_to(PACKAGE).as_posix() for file in sorted(PACKAGE.rglob("*.py"))]
    assert len(files) > 60 and {Path(file).parts[0].removesuffix(".py") for file in files} <= RANK.keys()
    assert not [fault for file in files for fault in faults(file, (PACKAGE / file).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    "file, source",
    [
        ("ops/rope.py", "from sparsevlm_jax.config import TextConfig\nfrom sparsevlm_jax.pruning import plan"),
        ("pruning/plan.py", "if TYPE_CHECKING:\n    from sparsevlm_jax.models.llava import LlavaConfig"),
        ("pruning/plan.py", "from sparsevlm_jax.inputs.packing import pack"),
        ("bench/report.py", "def late():\n    import sparsevlm_jax.explain.page"),
        ("checkpoints/load.py", "from sparsevlm_jax import generate"),
        ("generation/api.py", "import torch.nn"),
        ("evaluate/run.py", "def late():\n    from ray import data"),
        ("integrations/lmms_eval.py", "from sparsevlm_jax.evaluate.run import Job"),
        ("cli/bench.py", "from benchmarks.retention import run"),
        ("generation/api.py", "from sparsevlm_jax.models.llava_next import LlavaNextConfig"),
        ("models/stages.py", "from sparsevlm_jax.models.llava import LlavaConfig"),
    ],
)
def test_an_import_that_runs_up_or_sideways_is_found(file: str, source: str) -> None:
    assert len(faults(file, source)) == 1
