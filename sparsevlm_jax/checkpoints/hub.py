"""Where a model is: a folder, or an id on the Hugging Face hub, downloaded or out of its cache."""

from __future__ import annotations

from pathlib import Path

from sparsevlm_jax.errors import UserError
from sparsevlm_jax.files import user_path


def locate(source: str | Path, revision: str | None, weights: str = "*.safetensors") -> Path:
    """The folder of a model; downloaded first, its weight files as named by `weights`, if it is a hub id.

    Raises:
      UserError: no such folder or model.
    """
    path, text = user_path(source), str(source)
    if path.is_dir():
        if revision is not None:
            raise UserError(f'{source}: a revision ("{revision}") can be chosen of a hub id only, this is a folder')
        return path
    if path.exists():
        raise UserError(f"{source}: a file, expected a folder with config.json and weights, or a hub id")
    if isinstance(source, Path) or text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise UserError(f"{source}: no such folder")
    return _download(text, revision, weights)


def _download(name: str, revision: str | None, weights: str) -> Path:
    """The hub's snapshot of a model, from the cache where the hub cannot be reached."""
    from huggingface_hub import errors, snapshot_download  # here, not above: only hub ids need it

    def snapshot(offline: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=["*.json", weights, "*.model", "*.jinja", "*.txt"],
                ignore_patterns=["*/*"],  # other formats of the same weights
                local_files_only=offline,
            )
        )

    of = f' (revision "{revision}")' if revision else ""
    try:
        try:
            return snapshot(offline=False)
        except (errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError):
            raise  # the hub's client has already looked into its cache
        except Exception:  # a proxy that is down, say; the types belong to whatever HTTP library the client uses
            return snapshot(offline=True)
    except errors.HFValidationError:
        reason = "neither a folder nor a hub id (OWNER/NAME)"
    except errors.LocalEntryNotFoundError:
        reason = "not a folder, not complete in the hub's cache, and the hub cannot be reached"
    except errors.GatedRepoError:
        reason = "the hub wants its terms accepted and a login (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        reason = "neither a folder nor a public model on the hub"
    except errors.RevisionNotFoundError:
        reason = "the hub has no such revision of it"
    except errors.HfHubHTTPError as error:
        reason = f"the hub answers: {str(error).splitlines()[0]}"
    raise UserError(f"{name}{of}: {reason}")
