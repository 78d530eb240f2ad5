"""A converted checkpoint read back as the tensors that it was made of, each compared with its digest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsevlm_jax.checkpoints import orbax
from sparsevlm_jax.checkpoints.load import entries_of
from sparsevlm_jax.checkpoints.manifest import Manifest, Record, read_manifest
from sparsevlm_jax.config import ModelConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path
from sparsevlm_jax.models.family import config_of
from sparsevlm_jax.models.names import Entry
from sparsevlm_jax.text import shortlist

# Called with the bytes that are done and with all of them.
Watch = Callable[[int, int], None]


class Converted(NamedTuple):
    """A converted checkpoint; its parameters are not read yet."""

    folder: Path
    manifest: Manifest
    config: ModelConfig
    entries: dict[str, Entry]  # by path in the tree

    def tensors(self, group: int) -> list[tuple[Record, np.ndarray]]:
        """The tensors of a group in the Hugging Face order of axes, each compared with its digest.

        Raises:
          UserError: some are damaged.
        """
        folder = orbax.group_folder(self.folder, group)
        params = orbax.restore_group(self.folder, group)

        def tensor(record: Record) -> np.ndarray | None:
            path = tuple(record.path.split("/"))
            if path not in params or params[path].shape != self.entries[record.path].shape:
                return None
            array = params.pop(path)
            return array if orbax.digest(array) == record.stored_digest else None

        records = self.manifest.groups[group]
        tensors = orbax.parallel(tensor, records)
        damaged = [record.path for record, array in zip(records, tensors, strict=True) if array is None]
        if damaged:
            raise UserError(f"{folder}: damaged: {shortlist(damaged)}")
        return list(zip(records, tensors, strict=True))


def open_converted(folder: str | Path) -> Converted:
    """Opens a converted checkpoint.

    Raises:
      UserError: it is none, or manifest and config.json do not belong together.
    """
    folder = user_path(folder)
    manifest, config = read_manifest(folder), config_of(folder)
    return Converted(folder, manifest, config, entries_of(folder, manifest, config))


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
    problems = orbax.changed_files(opened.folder, manifest)
    for number, group in enumerate(manifest.groups):
        try:
            orbax.require_whole(opened.folder, number, manifest)  # first: what orbax says of damaged chunks is long
            opened.tensors(number)
        except UserError as error:
            problems.append(str(error))
        done += sum(record.nbytes for record in group)
        watch(done, total)
    if problems:
        raise UserError("; ".join(problems))
    return len(manifest.records)
