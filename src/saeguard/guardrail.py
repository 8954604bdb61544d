"""`Guardrail`: the frozen artifact. It says where to look, what to look for, when to act and how.

A folder of two files (docs/guardrail-format.md): `guardrail.json` and `guardrail.safetensors`. Every byte of both
is covered by a digest; a folder is written whole or not at all, and nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from saeguard.choices import Action
from saeguard.clamp import Clamp
from saeguard.errors import (
    ArtifactDamagedError,
    ArtifactError,
    ArtifactMismatchError,
    ArtifactVersionError,
    GuardrailError,
    MergeError,
)
from saeguard.files import follow_umask
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.model import decoder_layer, model_fingerprint, text_config, tokenizer_fingerprint
from saeguard.sae.slim import SlimEncoder
from saeguard.selection import SelectedFeature

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from saeguard.intervention import Guard

FORMAT_VERSION = 1
JSON_FILE, TENSOR_FILE, CARD_FILE = "guardrail.json", "guardrail.safetensors", "README.md"


@dataclass(frozen=True)
class Rule:
    """One topic's guardrail: features, gate, threshold and clamp. `evidence` holds the calibration figures (JSON)."""

    name: str
    selected: tuple[SelectedFeature, ...]
    encoder: SlimEncoder
    decoder: Tensor
    gate: Gate
    threshold: float
    clamp: Clamp
    action: Action = "clamp"
    evidence: Mapping[str, Any] = field(default_factory=dict)

    @property
    def features(self) -> tuple[int, ...]:
        """Feature ids in rank order."""
        return tuple(feature.id for feature in self.selected)


@dataclass(frozen=True)
class Guardrail:
    """One or more rules for one layer of one model.

    `model` and `tokenizer` are fingerprints, `sae` says which SAE the features are of.
    """

    layer: int
    model: Mapping[str, Any]
    tokenizer: str
    sae: Mapping[str, Any]
    rules: tuple[Rule, ...]
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        """The rule of a guardrail that holds one. Raises `GuardrailError` where there are several."""
        if len(self.rules) != 1:
            raise GuardrailError(f"this guardrail holds {len(self.rules)} rules: use .rules[i]")
        return self.rules[0]

    @property
    def features(self) -> tuple[int, ...]:
        """Ids of the selected features in rank order."""
        return self.rule.features

    @property
    def threshold(self) -> float:
        """The gate statistic above which a sequence is triggered."""
        return self.rule.threshold

    @property
    def gate(self) -> Gate:
        """How the statistic is computed and when it decides."""
        return self.rule.gate

    @property
    def clamp(self) -> Clamp:
        """What is done at hot tokens."""
        return self.rule.clamp

    @property
    def action(self) -> Action:
        """What a trigger does."""
        return self.rule.action

    @property
    def evidence(self) -> Mapping[str, Any]:
        """Calibration figures."""
        return self.rule.evidence

    def attach(self, model: nn.Module, tokenizer: Any) -> AbstractContextManager[Guard]:
        """Guard `model` inside a `with` block. Raises `AttachError` or `ArtifactMismatchError` before anything runs."""
        from saeguard.intervention import attach

        return attach(self, model, tokenizer)

    def check(self, model: nn.Module, tokenizer: Any) -> None:
        """Refuse a model, tokenizer or layer other than those the guardrail was calibrated on."""
        decoder_layer(model, self.layer)
        found = model_fingerprint(model)
        fix = "Fit a guardrail for this model."
        for part in ("config", "weights"):
            if found[part] != self.model[part]:
                raise ArtifactMismatchError.mismatch(
                    f"{part} of the model", found=found[part], expected=self.model[part], fix=fix
                )
        if (vocabulary := tokenizer_fingerprint(tokenizer)) != self.tokenizer:
            raise ArtifactMismatchError.mismatch(
                "tokenizer (vocabulary, special tokens, chat template)",
                found=vocabulary,
                expected=self.tokenizer,
                fix="Use the tokenizer the guardrail was fitted with.",
            )
        width = text_config(model).hidden_size
        if self.rules[0].decoder.shape[1] != width:
            raise ArtifactMismatchError.mismatch(
                "d_model", found=width, expected=self.rules[0].decoder.shape[1], fix=fix
            )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder, whole or not at all; an older guardrail there is replaced. Raises `ArtifactError`."""
        target = Path(folder)
        if target.exists() and not (target / JSON_FILE).exists() and (not target.is_dir() or any(target.iterdir())):
            raise ArtifactError(f"{target} exists and is not a guardrail: nothing was written. Choose another folder.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
                new = Path(temporary) / "new"
                new.mkdir()
                self._write(new)
                _swap(new, target, aside=Path(temporary) / "old")
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(f"cannot write the guardrail {target}: {error}. Nothing was changed.") from error
        return target

    def _write(self, folder: Path) -> None:
        from saeguard.card import model_card

        tensors = {
            f"{i}.{name}": tensor.detach().cpu().contiguous().clone()
            for i, rule in enumerate(self.rules)
            for name, tensor in _rule_tensors(rule).items()
        }
        save_file(tensors, folder / TENSOR_FILE)
        follow_umask(folder / TENSOR_FILE)
        content = {
            "format_version": FORMAT_VERSION,
            "layer": self.layer,
            "model": dict(self.model),
            "tokenizer": self.tokenizer,
            "sae": dict(self.sae),
            "rules": [_rule_json(rule) for rule in self.rules],
            "versions": dict(self.versions),
            "tensors_sha256": hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest(),
        }
        (folder / JSON_FILE).write_text(_canonical(content | {"sha256": _digest(content)}), "utf-8")
        (folder / CARD_FILE).write_text(model_card(self), "utf-8")

    def push_to_hub(self, repo_id: str, *, private: bool = False) -> str:
        """Upload the folder, with its card, to the Hugging Face hub; the address of the commit."""
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            folder = self.save_pretrained(Path(temporary) / "guardrail")
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Read a guardrail from a folder or a hub id. Raises an `ArtifactError` on any damage or foreign format."""
        folder = _folder(source)
        content = _read_json(folder / JSON_FILE)
        try:
            raw = (folder / TENSOR_FILE).read_bytes()
            if hashlib.sha256(raw).hexdigest() != content["tensors_sha256"]:
                raise ArtifactDamagedError(f"{folder / TENSOR_FILE} was altered: its digest is not the recorded one")
            tensors = load_file(folder / TENSOR_FILE)
            rules = tuple(_rule(entry, _subset(tensors, f"{i}.")) for i, entry in enumerate(content["rules"]))
            return cls(
                content["layer"], content["model"], content["tokenizer"], content["sae"], rules, content["versions"]
            )
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise ArtifactDamagedError(f"cannot read the guardrail {folder}: {error!r}") from error


def merge(guardrails: list[Guardrail]) -> Guardrail:
    """One guardrail with the rules of several, for one pass. Raises `MergeError` unless layer and model agree."""
    if not guardrails:
        raise MergeError("nothing to merge: expected at least one guardrail")
    first = guardrails[0]
    for other in guardrails[1:]:
        for part in ("layer", "tokenizer"):
            if getattr(other, part) != getattr(first, part):
                raise MergeError.mismatch(
                    f"{part} of the guardrails", found=getattr(other, part), expected=getattr(first, part),
                    fix="Only guardrails of one layer of one model become one.",
                )  # fmt: skip
        if other.model["weights"] != first.model["weights"]:
            raise MergeError.mismatch(
                "model weights",
                found=other.model["weights"],
                expected=first.model["weights"],
                fix="Fit both on one model.",
            )
    rules = tuple(rule for guardrail in guardrails for rule in guardrail.rules)
    names = [rule.name for rule in rules]
    if len(set(names)) < len(names):
        raise MergeError(f"two rules have one name: {sorted(names)}. Rename one when fitting it (--name).")
    return Guardrail(first.layer, first.model, first.tokenizer, first.sae, rules, first.versions)


def _swap(new: Path, target: Path, *, aside: Path) -> None:
    """Put `new` in the place of `target`, or leave `target` as it was."""
    if target.exists():
        target.replace(aside)
    try:
        new.replace(target)
    except OSError:
        if aside.exists():
            aside.replace(target)
        raise


def _folder(source: str | Path) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ArtifactError(f"no guardrail at {source}: it is neither a folder nor a hub id such as OWNER/REPO")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, allow_patterns=[JSON_FILE, TENSOR_FILE]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(f"cannot fetch the guardrail {source} from the Hugging Face hub: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        raw = path.read_bytes().decode("utf-8")
        content = json.loads(raw)
        version = content["format_version"]
        digest = content.pop("sha256", None)
        whole = digest == _digest(content) and raw == _canonical(content | {"sha256": digest})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactDamagedError(f"cannot read {path}: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ArtifactVersionError.mismatch(
            f"format version of {path}", found=version, expected=FORMAT_VERSION, fix="Fit it again, or update saeguard."
        )
    if not whole:
        raise ArtifactDamagedError(f"{path} was altered: its digest is not the recorded one. Fetch or fit it again.")
    return dict(content)


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(content).encode()).hexdigest()


def _subset(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rule_tensors(rule: Rule) -> dict[str, Tensor]:
    tensors = {f"encoder.{name}": tensor for name, tensor in rule.encoder.tensors().items()}
    tensors["decoder"] = rule.decoder
    if isinstance(rule.gate.scorer, Evidence | Probe):
        tensors["gate.weights"] = rule.gate.scorer.weights
    return tensors


def _rule_json(rule: Rule) -> dict[str, Any]:
    gate = rule.gate
    return {
        "name": rule.name,
        "features": [asdict(feature) for feature in rule.selected],
        "topk": rule.encoder.k,
        "gate": {
            "kind": gate.kind,
            "bias": getattr(gate.scorer, "bias", 0.0),
            "accumulator": {"kind": type(gate.accumulator).__name__.lower(), **asdict(gate.accumulator)},
            "moment": gate.moment,
            "counts": gate.counts,
            "latch": gate.latch,
        },
        "threshold": rule.threshold,
        "clamp": asdict(rule.clamp),
        "action": rule.action,
        "evidence": dict(rule.evidence),
    }


def _rule(entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Rule:
    gate = entry["gate"]
    scorer: Density | Evidence | Probe = Density()
    if gate["kind"] != "density":
        kinds: dict[str, type[Evidence | Probe]] = {"evidence": Evidence, "probe": Probe}
        scorer = kinds[gate["kind"]](tensors["gate.weights"], gate["bias"])
    accumulator = dict(gate["accumulator"])
    accumulate = {"mean": Mean, "cusum": Cusum}[accumulator.pop("kind")](**accumulator)
    return Rule(
        name=entry["name"],
        selected=tuple(SelectedFeature(**feature) for feature in entry["features"]),
        encoder=SlimEncoder(k=entry["topk"], **_subset(tensors, "encoder.")),
        decoder=tensors["decoder"],
        gate=Gate(scorer, accumulate, gate["moment"], gate["counts"], gate["latch"]),
        threshold=entry["threshold"],
        clamp=Clamp(**entry["clamp"]),
        action=entry["action"],
        evidence=entry["evidence"],
    )
