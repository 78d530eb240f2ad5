"""The command `sparsevlm`. Answers and tables go to stdout, everything about the run to stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import jax
import typer

from sparsevlm_jax import __version__
from sparsevlm_jax.checkpoints.orbax import silence_orbax
from sparsevlm_jax.cli.answer import answer
from sparsevlm_jax.cli.ask import ask
from sparsevlm_jax.cli.bench import bench
from sparsevlm_jax.cli.convert import convert, inspect
from sparsevlm_jax.cli.demo import walk_through
from sparsevlm_jax.cli.explain import explain
from sparsevlm_jax.cli.options import as_flags, note
from sparsevlm_jax.cli.plan import plan
from sparsevlm_jax.cli.score import score, submit
from sparsevlm_jax.cli.warmup import warmup
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.inputs.images import silence_pillow

app = typer.Typer(
    help="LLaVA in JAX with SparseVLM: visual tokens are dropped and recycled while the decoder runs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_LOST = (errno.EPIPE, errno.ENOSPC, errno.EBADF, errno.EIO)


def _print_version(wanted: bool) -> bool:
    if wanted:
        print(f"sparsevlm {__version__}")
        raise typer.Exit()
    return wanted


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command()(ask)
app.command()(plan)
app.command()(warmup)
app.command()(explain)
app.command("demo")(walk_through)
app.command()(answer)
app.command()(score)
app.command()(submit)
app.command()(convert)
app.command()(inspect)
app.command()(bench)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: bad input is one line on stderr and exit code 2.

    Args:
      arguments: instead of the process's own.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it misses torch, and finds long prompts too long
    _keep_compiled_programs()
    silence_pillow()
    silence_orbax()
    sys.exit(_run(sys.argv[1:] if arguments is None else arguments))


def _run(arguments: Sequence[str]) -> int:
    """The command's exit code."""
    try:
        if sys.stdout is None:
            raise UserError("stdout is closed: there is nowhere to print to")
        code = typer.main.get_command(app).main([*arguments] or ["--help"], standalone_mode=False) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        return _fail(as_flags(str(error)))
    except Exception as error:
        return _explained(error)


def _explained(error: Exception) -> int:
    """What else goes wrong outside of this program in one line; a bug keeps its traceback."""
    lost = _lost_stdout(error)
    if isinstance(lost, BrokenPipeError):
        return 1  # who reads it has seen enough
    if lost is not None:
        return _fail(f"stdout cannot be written: {lost.strerror or lost}")
    # Typer's usage errors know how to say what is wrong.
    say = getattr(error, "format_message", None)
    if say is not None:
        return _fail(f"{say().rstrip('.')} (--help lists the options)")
    reason = _missing_backend()
    if reason is not None:
        return _fail(reason)
    raise error


def _lost_stdout(error: Exception) -> OSError | None:
    """Why stdout takes no more; Python would try again at exit, and complain, so it leads nowhere from here on."""
    # Files that cannot be written are UserErrors: what fails in writing and names no file is stdout.
    lost = error if isinstance(error, OSError) and error.filename is None and error.errno in _LOST else None
    try:
        sys.stdout.flush()
    except OSError as late:
        lost = late
    if lost is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return lost


def _missing_backend() -> str | None:
    """What is wrong where jax finds no device to run on; None if it does."""
    try:
        jax.devices()
    except Exception as error:  # which ones depends on the backend
        wanted = os.environ.get("JAX_PLATFORMS")
        if not wanted:
            return f"jax finds no device: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return (
            f"JAX_PLATFORMS={wanted}: jax has no such backend here; install it (on NVIDIA "
            'pip install "sparsevlm_jax[cuda12]") or unset the variable'
        )
    return None


def _fail(message: str) -> int:
    note("error: " + " ".join(message.split()))
    return 2


def _keep_compiled_programs() -> None:
    """Keeps compiled programs between calls of the command, unless the user has chosen where or has no home."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(folder):  # without HOME and an entry in passwd it stays "~/.cache"
        jax.config.update("jax_compilation_cache_dir", os.path.join(folder, "sparsevlm_jax", "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
