"""What every test runs under: CPU, no network, checked shapes, strict promotion."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent

# Environment, not jax.config: these also reach the commands that tests start as processes of their own.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
# Most of a run is XLA compiling; a second run of the same programs reads them from here. Tracing is not cached.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# XLA's own passes run as for users; only LLVM does less, which halves the compiling. JAX_DISABLE_MOST_OPTIMIZATIONS=0
# tests what users run to the last instruction.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import hypothesis
import jax
import jaxtyping
import pytest
from jaxtyping import install_import_hook

from tests import selection
from tests.cpu_time import (  # noqa: F401  (hooks)
    pytest_runtest_logreport,
    pytest_runtest_makereport,
    pytest_runtest_protocol,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

# Every annotated shape and dtype is checked from here on; it has to stand before the first import of the package.
install_import_hook("sparsevlm_jax", "beartype.beartype")

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# A compilation takes longer than hypothesis' deadline; the same examples everywhere make a failure repeatable.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """As users run it, annotations not enforced: for arguments of a wrong type, which have errors of their own."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-limit", type=float, metavar="SECONDS", help="fail the run if a test takes more CPU time")
    parser.addoption(
        "--golden",
        metavar="DIR",
        type=Path,
        help="folder of recorded traces for tests/test_golden.py, replayed whole (default: some of tests/golden)",
    )


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups, and before tests are taken by their marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several processes, what shares a computation stays together: tests of a recorded trace, or of a file."""
    selection.mark(items, whole_suite=config.args_source == pytest.Config.ArgsSource.TESTPATHS)
    for item in items:
        parameters = getattr(item, "callspec", None)
        trace = parameters.params.get("lm_trace") if parameters else None
        event = parameters.params.get("pruning_event") if parameters else None
        shared = trace or (event and event[0]) or item.path
        item.add_marker(pytest.mark.xdist_group(Path(shared).stem))


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Programs of one group are of no use to the next, and the more a process holds the slower it gets: on Linux every
    C++ exception, of which jax's bindings throw many, searches the unwinding tables of all compiled code."""
    if nextitem is None or _group(item) != _group(nextitem):
        jax.clear_caches()


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return marker.args[0]
