"""Every error a user can meet, and nothing else.

    GuardrailError                      anything this package refuses
    ├── CorpusError                     text that cannot be read or used
    │   ├── CorpusOverlapError          one text is both to be forgotten and to be kept
    │   └── TooFewSequencesError        not enough text for the promise asked for
    ├── ModelError                      a model this package cannot work on
    │   ├── LayerError                  a layer that the model does not have
    │   ├── HookError                   a hook point that the model's blocks do not have
    │   └── NonFiniteError              NaN or infinite activations
    ├── SAEError                        an SAE that cannot be read
    │   └── SAEMismatchError            an SAE that does not belong to this model and layer
    ├── SelectionError                  too few features survive, or ids that the SAE does not have
    ├── ExplanationError                explanations that cannot be read or do not belong to the SAE
    ├── EndpointError                   a language model that was asked for descriptions and gave none
    ├── AttachError                     a guardrail that cannot act as calibrated: it refuses to run
    ├── EngineError                     an inference engine in a state that cannot be guarded
    │   └── ProofError                  the start-up proof failed: the guard does not act in this engine
    ├── OverloadedError                 a server that has no room for a request now
    ├── UnavailableError                a server that takes no more requests
    ├── ArtifactError                   a guardrail folder that cannot be used
    │   ├── ArtifactDamagedError        missing, truncated or altered files
    │   ├── ArtifactVersionError        written in a format this version does not read
    │   └── ArtifactMismatchError       made for another model, tokenizer or layer
    ├── EvaluationError                 a test that cannot be run, or a result that cannot be read
    │   └── JudgeError                  a judge that cannot be reached, or whose answer cannot be read
    ├── BaselineError                   a method to compare with that cannot be fitted
    │   ├── DoesNotFitError             it needs more memory than there is
    │   └── NonFiniteLossError          its loss became NaN or infinite
    ├── MergeError                      guardrails that cannot become one
    ├── DownloadError                   a file that could not be fetched whole
    └── UsageError                      wrong use of the command line

Errors raised by `mismatch` carry what was found and what was expected.
"""

from __future__ import annotations

from typing import Any, Self


class GuardrailError(Exception):
    """Base of all errors; `what`, `found`, `expected` and `fix` are set by `mismatch`."""

    what: str = ""
    fix: str = ""
    found: Any = None
    expected: Any = None

    @classmethod
    def mismatch(cls, what: str, *, found: Any, expected: Any, fix: str) -> Self:
        """An error that says what was found, what was expected and how to fix it."""
        error = cls(f"{what}: found {found}, expected {expected}. {fix}")
        error.what, error.found, error.expected, error.fix = what, found, expected, fix
        return error


class CorpusError(GuardrailError):
    """Text that cannot be read or used."""


class CorpusOverlapError(CorpusError):
    """The same text is in the forget corpus and in a retain corpus."""


class TooFewSequencesError(CorpusError):
    """Not enough sequences for the false-positive rate that was asked for."""


class ModelError(GuardrailError):
    """A model this package cannot work on."""


class LayerError(ModelError):
    """A layer index that the model does not have."""


class HookError(ModelError):
    """A hook point that the model's decoder blocks do not have."""


class NonFiniteError(ModelError):
    """NaN or infinite values in the residual stream."""


class SAEError(GuardrailError):
    """A sparse autoencoder that cannot be read."""


class SAEMismatchError(SAEError):
    """A sparse autoencoder of another width, model or layer."""


class SelectionError(GuardrailError):
    """Fewer features survive selection than were asked for, or the ids given cannot be used."""


class ExplanationError(GuardrailError):
    """Explanations of features that cannot be read, or that are of another SAE."""


class EndpointError(GuardrailError):
    """A language model endpoint that gives no answer, or none that can be used."""


class AttachError(GuardrailError):
    """The guardrail cannot act exactly as it was calibrated, so it refuses to run."""


class EngineError(GuardrailError):
    """An inference engine, its version or its settings, that cannot be guarded."""


class ProofError(EngineError):
    """The start-up proof was not given, or failed."""


class OverloadedError(GuardrailError):
    """A server that has no room for a request now."""


class UnavailableError(GuardrailError):
    """A server that takes no more requests: it is shutting down, or its engine has failed."""


class ArtifactError(GuardrailError):
    """A guardrail folder that cannot be used."""


class ArtifactDamagedError(ArtifactError):
    """Files of the guardrail are missing, truncated or altered."""


class ArtifactVersionError(ArtifactError):
    """The guardrail is in a format this version does not read."""


class ArtifactMismatchError(ArtifactError):
    """The guardrail was made for another model, tokenizer or layer."""


class EvaluationError(GuardrailError):
    """A test that cannot be run, or a result file that cannot be read."""


class JudgeError(EvaluationError):
    """A judge that cannot be reached, or whose answer cannot be read."""


class BaselineError(GuardrailError):
    """A method to compare with that cannot be fitted, or whose result cannot be written."""


class DoesNotFitError(BaselineError):
    """A run that needs more memory than there is; said before it starts."""


class NonFiniteLossError(BaselineError):
    """A loss or a weight that is NaN or infinite. `step` is where, `checkpoint` the last good state, if any."""

    step: int = 0
    checkpoint: str | None = None


class MergeError(GuardrailError):
    """Guardrails that cannot become one."""


class DownloadError(GuardrailError):
    """A file that could not be fetched whole."""


class UsageError(GuardrailError):
    """Wrong use of the command line (exit status 2)."""
