"""saeguard: make a language model not know one topic at inference time, and prove how well that works.

A public name is imported when it is first asked for: `import saeguard` and `saeguard --help` load no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saeguard.config import PRESETS, FitConfig
    from saeguard.errors import GuardrailError
    from saeguard.fitting import fit
    from saeguard.guardrail import Guardrail, merge
    from saeguard.online.intervention import Guard, Verdict
    from saeguard.sae.autoencoder import SparseAutoencoder
else:
    _HOMES = {
        "PRESETS": "config",
        "FitConfig": "config",
        "Guard": "online.intervention",
        "Guardrail": "guardrail",
        "GuardrailError": "errors",
        "SparseAutoencoder": "sae.autoencoder",
        "Verdict": "online.intervention",
        "fit": "fitting",
        "merge": "guardrail",
    }

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})


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
