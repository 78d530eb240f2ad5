"""Reading a converted checkpoint back as the tensors it was made of."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparsevlm_jax import store
from sparsevlm_jax.checkpoint import entries_of
from sparsevlm_jax.config import LlavaConfig
from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path
from sparsevlm_jax.shards import shortlist
from sparsevlm_jax.store import Manifest, Record
from sparsevlm_jax.weights import Entry


class Converted(NamedTuple):
    """A converted checkpoint; its parameters are not read yet."""

    folder: Path
    manifest: Manifest
    config: LlavaConfig
    entries: dict[str, Entry]  # by path in the tree

    def tensors(self, group: int) -> list[tuple[Record, np.ndarray]]:
        """The tensors of a group in the Hugging Face order of axes, each compared with its digest.

        Raises:
          UserError: some are damaged.
        """
        folder = store.group_folder(self.folder, group)
        params = store.restore_group(self.folder, group)

        def tensor(record: Record) -> np.ndarray | None:
            path = tuple(record.path.split("/"))
            if path not in params or params[path].shape != self.entries[record.path].shape:
                return None
            array = store.in_order(self.entries[record.path].to_hf(params.pop(path)))
            return array if store.digest(array) == record.stored_digest else None

        records = self.manifest.groups[group]
        tensors = store.parallel(tensor, records)
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
    manifest, config = store.read_manifest(folder), LlavaConfig.from_file(folder)
    return Converted(folder, manifest, config, entries_of(folder, manifest, config))
