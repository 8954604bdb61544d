"""PEFT adapters: folders that change a model, and are no model by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saeguard.errors import ModelError

CONFIG_FILE = "adapter_config.json"


def is_adapter(source: str | Path) -> bool:
    """Whether this is the folder of an adapter."""
    return (Path(source) / CONFIG_FILE).is_file()


def merged(model: Any, folder: str | Path) -> Any:
    """The model with the adapter in its weights, in evaluation mode. Raises `ModelError`."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError(f"reading the adapter {folder} needs peft: pip install 'saeguard[baselines]'") from error
    try:
        return PeftModel.from_pretrained(model, folder).merge_and_unload().eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot put the adapter {folder} on the model: {error}") from error
