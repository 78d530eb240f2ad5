"""`--check`: whether a converted checkpoint still is what was written."""

from __future__ import annotations

from pathlib import Path

from convert.converted import open_converted
from convert.run import Watch
from sparsevlm_jax import store
from sparsevlm_jax.errors import UserError


def check(folder: str | Path, watch: Watch = lambda done, total: None) -> int:
    """Compares every parameter and every file with the digests that were taken when they were written.

    Returns:
      How many tensors were compared.

    Raises:
      UserError: everything that differs, in one message.
    """
    opened = open_converted(folder)
    manifest, done = opened.manifest, 0
    total = manifest.nbytes
    problems = store.changed_files(opened.folder, manifest)
    for number, group in enumerate(manifest.groups):
        try:
            store.require_whole(opened.folder, number, manifest)  # first: what orbax says of damaged chunks is long
            opened.tensors(number)
        except UserError as error:
            problems.append(str(error))
        done += sum(record.nbytes for record in group)
        watch(done, total)
    if problems:
        raise UserError("; ".join(problems))
    return len(manifest.records)
