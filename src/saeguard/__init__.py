"""saeguard: make a language model not know one topic at inference time, and prove how well that works."""

from saeguard.config import PRESETS, FitConfig
from saeguard.errors import GuardrailError
from saeguard.fit import fit
from saeguard.guardrail import Guardrail, merge
from saeguard.intervention import Guard, Verdict
from saeguard.sae.autoencoder import SparseAutoencoder

__all__ = [
    "PRESETS",
    "FitConfig",
    "Guard",
    "Guardrail",
    "GuardrailError",
    "SparseAutoencoder",
    "Verdict",
    "fit",
    "merge",
]
__version__ = "0.1.0"
