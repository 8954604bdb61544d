"""From a reference to a `SparseAutoencoder`: fetch what it names, and let the format that knows it read it."""

from __future__ import annotations

from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.formats import (
    dictionary_learning,
    gemma_scope,
    gemma_scope2,
    goodfire,
    llama_scope,
    qwen_scope,
    saelens,
    sparsify,
)
from saeguard.sae.formats.place import Place
from saeguard.sae.reference import Reference

FORMATS = (saelens, gemma_scope, gemma_scope2, sparsify, dictionary_learning, llama_scope, goodfire, qwen_scope)


def load(source: str | Path) -> SparseAutoencoder:
    """Read the SAE in a local folder or file, or on the Hugging Face hub (`Reference`). Raises `SAEError`."""
    path = Path(source)
    if not path.exists():
        path = Reference.parse(str(source)).fetch()
    place = Place.of(path)
    for form in FORMATS:
        if (file := form.find(place)) is not None:
            sae: SparseAutoencoder = form.read(file, str(source))
            return sae
    names = sorted(found.name for found in place.folder.iterdir())
    formats = ", ".join(form.__name__.rpartition(".")[2] for form in FORMATS)
    raise SAEError.mismatch(
        f"format of the SAE {source}", found=names[:8], expected=f"the files of one of {formats}",
        fix="Name the folder that holds one SAE, or its file.",
    )  # fmt: skip
