"""The files of a guardrail (docs/guardrail-format.md): `guardrail.json`, `guardrail.safetensors` and a card.

How such a folder is written and checked: folders.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from saeguard.clamp import Clamp
from saeguard.errors import ArtifactDamagedError, ArtifactError
from saeguard.folders import Kind, canonical, read_folder, write_folder
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.rule import Rule
from saeguard.sae.scaling import InputScaling
from saeguard.sae.slim import SlimEncoder
from saeguard.selection import SelectedFeature

FORMAT_VERSION = 3
HEAD = ("layer", "hook", "hook_out", "model", "tokenizer", "sae", "versions")
JSON_FILE, TENSOR_FILE, CARD_FILE = "guardrail.json", "guardrail.safetensors", "README.md"
KIND = Kind("guardrail", JSON_FILE, TENSOR_FILE, FORMAT_VERSION)


def write(target: Path, head: Mapping[str, Any], rules: Sequence[Rule], card: str) -> None:
    """Write the folder, whole or not at all, in the place of an older guardrail; its other files stay.

    `head` (`HEAD`) is what the JSON file says beside the rules. Raises `ArtifactError`.
    """
    tensors = {f"{i}.{name}": tensor for i, rule in enumerate(rules) for name, tensor in _rule_tensors(rule).items()}
    write_folder(KIND, target, {**head, "rules": [_rule_json(rule) for rule in rules]}, tensors, {CARD_FILE: card})


def read(folder: Path) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The head (`HEAD`) and the rules. Raises an `ArtifactError` on any damage or foreign format."""
    content, tensors = read_folder(KIND, folder)
    try:
        rules = tuple(_rule(entry, _subset(tensors, f"{i}.")) for i, entry in enumerate(content["rules"]))
        return {key: content[key] for key in HEAD}, rules
    except (KeyError, TypeError) as error:
        raise ArtifactDamagedError(f"cannot read the guardrail {folder}: {error!r}") from error


def fingerprint(rules: Sequence[Rule]) -> str:
    """Identity of rules by their content: what they hold, not where they lie."""
    digest = hashlib.sha256(canonical({"rules": [_rule_json(rule) for rule in rules]}).encode())
    for rule in rules:
        for name, tensor in sorted(_rule_tensors(rule).items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def locate(source: str | Path) -> Path:
    """The folder of a guardrail, fetched if `source` is a hub id. Raises `ArtifactError`."""
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
        "scaling": None if rule.encoder.scaling is None else asdict(rule.encoder.scaling),
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
        "reach": rule.reach,
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
    scaling = None if entry["scaling"] is None else InputScaling(**entry["scaling"])
    return Rule(
        name=entry["name"],
        selected=tuple(SelectedFeature(**feature) for feature in entry["features"]),
        encoder=SlimEncoder(k=entry["topk"], scaling=scaling, **_subset(tensors, "encoder.")),
        decoder=tensors["decoder"],
        gate=Gate(scorer, accumulate, gate["moment"], gate["counts"], gate["latch"]),
        threshold=entry["threshold"],
        clamp=Clamp(**entry["clamp"]),
        action=entry["action"],
        reach=entry["reach"],
        evidence=entry["evidence"],
    )
