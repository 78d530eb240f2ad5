"""`--check`: whether a converted checkpoint still is what was written."""

from __future__ import annotations

from pathlib import Path

from convert.converted import open_converted
from convert.run import Watch, file_digest
from sparsevlm_jax.errors import UserError


def check(folder: str | Path, watch: Watch = lambda done, total: None) -> int:
    """Compares every parameter and file with its digest in the manifest.

    Returns:
      How many tensors were compared.

    Raises:
      UserError: everything that differs, in one message.
    """
    opened = open_converted(folder)
    manifest, done = opened.manifest, 0
    total = manifest.nbytes
    problems = [
        f"{opened.folder / name}: missing or changed"
        for name, digest in manifest.files.items()
        if not (opened.folder / name).is_file() or file_digest(opened.folder / name) != digest
    ]
    for number, group in enumerate(manifest.groups):
        try:
            opened.tensors(number)
        except UserError as error:
            problems.append(str(error))
        done += sum(record.nbytes for record in group)
        watch(done, total)
    if problems:
        raise UserError("; ".join(problems))
    return len(manifest.records)
