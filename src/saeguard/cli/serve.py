"""`saeguard serve`."""

from __future__ import annotations

import argparse
from typing import Any

from saeguard.cli.options import add_common, add_fields, add_model, emit
from saeguard.serving.config import ServeConfig

HELP = "an OpenAI-compatible server for a guarded model"
EXAMPLE = (
    "saeguard serve --guardrail guardrails/astronomy --port 8000\n"
    "  saeguard serve --model M --guardrail stars=guardrails/astronomy guardrails/chemistry --action stars=refuse"
)
KEYS = "SAEGUARD_API_KEYS"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `serve`."""
    parser.add_argument(
        "--guardrail", required=True, nargs="+", action="extend", metavar="[ID=]DIR",
        help="guardrail folders; the id is the folder's name unless it is given",
    )  # fmt: skip
    parser.add_argument(
        "--action", nargs="+", action="extend", default=[], metavar="ID=ACTION",
        help="what a guardrail does: clamp, refuse or monitor (default: what it was fitted for)",
    )  # fmt: skip
    add_model(parser)
    add_fields(parser, ServeConfig)
    add_common(parser)


def run(args: argparse.Namespace) -> None:
    """Load, prove, serve until stopped. API keys may also come in the environment variable of that name."""
    import time

    began = time.perf_counter()
    import os
    from dataclasses import asdict

    from saeguard.cli.loading import load
    from saeguard.errors import UsageError
    from saeguard.serving.policy import load_guardrails

    try:
        from saeguard.serving.http.server import Server, service
        from saeguard.serving.http.service import read_keys
    except ModuleNotFoundError as error:
        raise UsageError(f"{error.name} is missing. Install the server with: pip install 'saeguard[serve]'") from error
    config = serve_config(args)
    keys = read_keys(config.api_keys_file, os.environ.get(KEYS, ""))
    guardrails = load_guardrails(args.guardrail, args.action)
    before = time.perf_counter()
    loaded = load(args)
    load_seconds = time.perf_counter() - before
    with service(loaded.model, loaded.tokenizer, guardrails, config, keys=keys) as running:

        def ready(found: Any) -> None:
            figures = asdict(found) | {"load_seconds": load_seconds}
            running.log.write("ready", **figures)
            if args.json:
                emit(figures)

        Server(running, ready, began + load_seconds).run()


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """The defaults with the options that were given. Raises `UsageError`."""
    import dataclasses

    names = {field.name for field in dataclasses.fields(ServeConfig)}
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in vars(args).items() if name in names
    }
    return ServeConfig(**given)
