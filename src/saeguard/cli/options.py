"""What the commands share: options generated from config dataclasses, and the options of every command."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import types
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from rich.console import Console

from saeguard.config import PRESETS, FitConfig
from saeguard.errors import UsageError

C = TypeVar("C")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every command that runs a model."""
    parser.add_argument("--json", action="store_true", help="print one JSON object for machines")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    parser.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, ..., or map: spread over all there are (default: the GPU, if any)",
    )
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
                        help="default: bfloat16 where the hardware computes in it")  # fmt: skip


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model`, which defaults to the embedded one."""
    parser.add_argument("--model", metavar="M", help="hub id or folder (default: the embedded SmolLM2-135M-Instruct)")


def add_fields(parser: argparse.ArgumentParser, config: type, skip: Sequence[str] = ()) -> None:
    """One option for each field of a dataclass whose metadata has a help text; unset options stay unset."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        if "help" in field.metadata and field.name not in skip:
            shown = "" if field.default in (None, ()) else f" (default: {_shown(field.default)})"
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", dest=field.name, default=argparse.SUPPRESS,
                help=field.metadata["help"] + shown, **_kind(hints[field.name]),
            )  # fmt: skip


def config_of(config: type[C], args: argparse.Namespace, start: C | None = None) -> C:
    """A config dataclass with the options that were given, in place of the defaults or of those of `start`."""
    names = {field.name for field in dataclasses.fields(config)}  # type: ignore[arg-type]
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items() if name in names
    }
    return dataclasses.replace(config() if start is None else start, **given)  # type: ignore[type-var]


def value_of(config: type, name: str, word: str) -> Any:
    """A field's value as its option reads it. Raises `UsageError`."""
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    add_fields(parser, config)
    try:
        return getattr(parser.parse_args([f"--{name.replace('_', '-')}={word}"]), name)
    except argparse.ArgumentError as error:
        raise UsageError(str(error)) from error


def words_of(config: Any) -> list[str]:
    """The options that give this config dataclass again."""
    words: list[str] = []
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value not in (None, ()):
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def fit_config(args: argparse.Namespace) -> FitConfig:
    """The preset with the options that were given."""
    return config_of(FitConfig, args, PRESETS[args.preset])


def named_files(pairs: Sequence[str], option: str = "--retain") -> dict[str, str]:
    """`NAME=FILE` values of an option. Raises `UsageError`."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise UsageError(f"{option} {pair}: expected NAME=FILE, for example chat=chat.jsonl")
        if name in found:
            raise UsageError(f"{option} {name} is given twice: each needs its own name")
        found[name] = file
    return found


def feature_ids(text: str) -> tuple[int, ...]:
    """Feature ids with commas between them. Raises `UsageError`."""
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UsageError(f"--features {text}: expected ids with commas between them, for example 12,34,56")
    return tuple(int(part) for part in text.split(","))


def emit(value: Any) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def console(*, quiet: bool = False) -> Console:
    """Where people read: standard output, or standard error when standard output is for machines."""
    return Console(stderr=quiet, highlight=False)


def _kind(hint: Any) -> dict[str, Any]:
    """argparse's keywords for a type annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if get_origin(hint) is tuple:
        return {**_kind(get_args(hint)[0]), "nargs": "+"}
    return {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "TEXT")}


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
