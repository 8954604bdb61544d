"""The files of a guardrail (docs/guardrail-format.md): `guardrail.json`, `guardrail.safetensors` and a card.

Every byte of the first two is covered by a digest; a folder is written whole or not at all, and nothing in it is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saeguard.clamp import Clamp
from saeguard.errors import ArtifactDamagedError, ArtifactError, ArtifactVersionError
from saeguard.files import follow_umask
from saeguard.gate import Cusum, Density, Evidence, Gate, Mean, Probe
from saeguard.rule import Rule
from saeguard.sae.scaling import InputScaling
from saeguard.sae.slim import SlimEncoder
from saeguard.selection import SelectedFeature

FORMAT_VERSION = 2
HEAD = ("layer", "hook", "hook_out", "model", "tokenizer", "sae", "versions")
JSON_FILE, TENSOR_FILE, CARD_FILE = "guardrail.json", "guardrail.safetensors", "README.md"


def write(target: Path, head: Mapping[str, Any], rules: Sequence[Rule], card: str) -> None:
    """Write the folder, whole or not at all, in the place of an older guardrail; its other files stay.

    `head` (`HEAD`) is what the JSON file says beside the rules. Raises `ArtifactError`.
    """
    if target.exists() and not (target / JSON_FILE).exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"{target} exists and is not a guardrail: nothing was written. Choose another folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as temporary:
            new = Path(temporary) / "new"
            new.mkdir()
            _write_files(new, head, rules, card)
            _keep_others(target, new)
            _swap(new, target, aside=Path(temporary) / "old")
    except (OSError, ValueError, SafetensorError, shutil.Error) as error:
        raise ArtifactError(f"cannot write the guardrail {target}: {error}. Nothing was changed.") from error


def read(folder: Path) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """The head (`HEAD`) and the rules. Raises an `ArtifactError` on any damage or foreign format."""
    content = _read_json(folder / JSON_FILE)
    try:
        raw = (folder / TENSOR_FILE).read_bytes()
        if hashlib.sha256(raw).hexdigest() != content["tensors_sha256"]:
            raise ArtifactDamagedError(f"{folder / TENSOR_FILE} was altered: its digest is not the recorded one")
        tensors = load_file(folder / TENSOR_FILE)
        rules = tuple(_rule(entry, _subset(tensors, f"{i}.")) for i, entry in enumerate(content["rules"]))
        return {key: content[key] for key in HEAD}, rules
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise ArtifactDamagedError(f"cannot read the guardrail {folder}: {error!r}") from error


def fingerprint(rules: Sequence[Rule]) -> str:
    """Identity of rules by their content: what they hold, not where they lie."""
    digest = hashlib.sha256(_canonical({"rules": [_rule_json(rule) for rule in rules]}).encode())
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


def _write_files(folder: Path, head: Mapping[str, Any], rules: Sequence[Rule], card: str) -> None:
    tensors = {
        f"{i}.{name}": tensor.detach().cpu().contiguous().clone()
        for i, rule in enumerate(rules)
        for name, tensor in _rule_tensors(rule).items()
    }
    save_file(tensors, folder / TENSOR_FILE)
    follow_umask(folder / TENSOR_FILE)
    content = {
        **head,
        "format_version": FORMAT_VERSION,
        "rules": [_rule_json(rule) for rule in rules],
        "tensors_sha256": hashlib.sha256((folder / TENSOR_FILE).read_bytes()).hexdigest(),
    }
    (folder / JSON_FILE).write_text(_canonical(content | {"sha256": _digest(content)}), "utf-8")
    (folder / CARD_FILE).write_text(card, "utf-8")


def _keep_others(old: Path, new: Path) -> None:
    """Copy what else lies in the folder, such as a page that `inspect` drew."""
    for path in old.iterdir() if old.exists() else ():
        if path.is_dir():
            shutil.copytree(path, new / path.name, symlinks=True)
        elif not (new / path.name).exists():
            shutil.copy2(path, new / path.name, follow_symlinks=False)


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
        evidence=entry["evidence"],
    )
