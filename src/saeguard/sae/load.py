"""From a reference to a `SparseAutoencoder`: fetch what it names, and let the format that knows it read it."""

from __future__ import annotations

from pathlib import Path

from saeguard.errors import SAEError
from saeguard.sae import registry
from saeguard.sae.autoencoder import SparseAutoencoder
from saeguard.sae.formats import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    gemma_scope2,
    goodfire,
    llama_scope,
    llamascopium,
    qwen_scope,
    saelens,
    sparsify,
)
from saeguard.sae.formats.place import Origin, Place
from saeguard.sae.reference import Reference

FORMATS = (
    saelens, gemma_scope, gemma_scope2, sparsify, dictionary_learning, llama_scope, llamascopium, goodfire, qwen_scope,
    circuit_tracer,
)  # fmt: skip


def load(source: str | Path) -> SparseAutoencoder:
    """Read the SAE in a local folder or file, in SAELens's registry or on the Hugging Face hub. Raises `SAEError`.

    A path that exists is taken first, then a name of the registry where SAELens is installed, then a `Reference`.
    """
    text, path = str(source), Path(source)
    if path.exists():
        return _read(path, Origin(text, str(path.absolute())))
    if (entry := registry.find(text)) is not None:
        if entry.foreign:
            return entry.through_saelens(text, _read)
        return _read(entry.reference.fetch(), entry.origin(text))
    reference = Reference.parse(text)
    return _read(reference.fetch(), Origin(text, f"{reference.repo}/{reference.path}"))


def _read(path: Path, origin: Origin) -> SparseAutoencoder:
    place = Place.of(path)
    for form in FORMATS:
        if (file := form.find(place)) is not None:
            sae: SparseAutoencoder = form.read(file, origin)
            return sae
    names = sorted(found.name for found in place.folder.iterdir())
    formats = ", ".join(form.__name__.rpartition(".")[2] for form in FORMATS)
    raise SAEError.mismatch(
        f"format of the SAE {origin.source}", found=names[:8], expected=f"the files of one of {formats}",
        fix="Name the folder that holds one SAE, or its file.",
    )  # fmt: skip
