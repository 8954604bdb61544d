"""From a folder to a `SparseAutoencoder`: the first format that recognises it reads it.

A format is a pair of functions, one file each: does this folder look like mine, and read it.
"""

from __future__ import annotations

from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.saelens import is_saelens_folder, load_saelens

FORMATS = ((is_saelens_folder, load_saelens),)


def load(source: str | Path) -> SparseAutoencoder:
    """Read the SAE in a local folder, or in `OWNER/REPO[:FOLDER]` on the Hugging Face hub."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    for recognises, read in FORMATS:
        if recognises(folder):
            return read(folder)
    names = sorted(path.name for path in folder.iterdir())
    raise SAEError(
        f"no known SAE format in {folder}: found {names[:8]}, expected the SAELens files "
        "cfg.json and sae_weights.safetensors"
    )


def _from_hub(source: str) -> Path:
    repo, _, subfolder = source.partition(":")
    if repo.count("/") != 1 or source.startswith((".", "/", "~")):
        raise SAEError(f"{source} is neither a folder nor a hub id such as OWNER/REPO or OWNER/REPO:FOLDER")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(repo, allow_patterns=f"{subfolder}/*" if subfolder else None)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SAEError(f"cannot fetch the SAE {source} from the Hugging Face hub: {error}") from error
    return Path(path) / subfolder
