"""`saeguard serve`."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard.cli.options import add_common, add_fields, add_model, emit
from saeguard.serving.config import ServeConfig

HELP = "an OpenAI-compatible server for a guarded model"
EXAMPLE = (
    "saeguard serve --guardrail guardrails/astronomy --port 8000\n"
    "  saeguard serve --model M --guardrail stars=guardrails/astronomy guardrails/chemistry --action stars=refuse\n"
    "  saeguard serve --checkpoint baselines/npo"
)
KEYS = "SAEGUARD_API_KEYS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`."""
    parser.add_argument(
        "--guardrail", nargs="+", action="extend", default=[], metavar="[ID=]DIR",
        help="folders of guardrails and prompt gates; the id is the folder's name unless it is given",
    )  # fmt: skip
    parser.add_argument(
        "--action", nargs="+", action="extend", default=[], metavar="ID=ACTION",
        help="what a guardrail does: clamp, refuse or monitor; a prompt gate: refuse, corrupt or monitor "
        "(default: what it was fitted for)",
    )  # fmt: skip
    add_model(parser)
    parser.add_argument(
        "--checkpoint", metavar="M", help="serve this in place of the model, if need be without a guardrail: hub id, "
        "folder, or folder of a PEFT adapter for the model",
    )  # fmt: skip
    add_fields(parser, ServeConfig)
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Load, prove, serve until stopped. API keys may also come in the environment variable of that name."""
    import time

    began = time.perf_counter()
    import os
    from dataclasses import asdict

    from saeguard.errors import UsageError
    from saeguard.serving.policy import load_guardrails

    try:
        from saeguard.serving.http.server import Server, service
        from saeguard.serving.http.service import read_keys
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is missing. Install the server with: pip install 'saeguard[serve]'") from error
    if not (args.guardrail or args.checkpoint):
        raise UsageError("give --guardrail DIR, or --checkpoint M to serve a model as it is")
    config = serve_config(args)
    keys = read_keys(config.api_keys_file, os.environ.get(KEYS, ""))
    guardrails = load_guardrails(args.guardrail, args.action)
    before = time.perf_counter()
    model, tokenizer = _load(args)
    load_seconds = time.perf_counter() - before
    with service(model, tokenizer, guardrails, config, keys=keys) as running:

        def ready(found: Any) -> None:
            figures = asdict(found) | {"load_seconds": load_seconds}
            running.log.write("ready", **figures)
            if args.json:
                emit(figures)

        Server(running, ready, began + load_seconds).run()


def _load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer, or the checkpoint in their place."""
    from functools import partial

    from saeguard.cli.loading import model_of
    from saeguard.evaluation.subject import checkpoint

    if args.checkpoint is None:
        return model_of(args)
    base = partial(model_of, args)
    return checkpoint(args.checkpoint, base, device=args.device, dtype=args.dtype, name=args.checkpoint).loaded


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The defaults with the options that were given. Raises `UsageError`."""
    import dataclasses

    names = {field.name for field in dataclasses.fields(ServeConfig)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items() if name in names
    }
    return ServeConfig(**given)
