"""`saeguard-vllm serve MODEL --guardrail [ID=]DIR`: vLLM's own server, which serves guarded or not at all."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path

from saeguard.errors import EngineError, GuardrailError, UsageError
from saeguard.serving.vllm.plugin import GUARDRAILS, PLUGIN, register

PROG = "saeguard-vllm"
EXAMPLE = f"""example:
  {PROG} serve MODEL --guardrail astronomy=guardrails/astronomy --port 8000
all other options are those of `vllm serve`"""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the server; it returns when the server has ended. Exit status 1: refused, 2: wrong use."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="Serve a model with vLLM, guarded.", epilog=EXAMPLE, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("command", choices=["serve"])
    parser.add_argument("model", help="folder or hub id that the guardrails were fitted on")
    parser.add_argument("--guardrail", action="append", required=True, metavar="[ID=]DIR", help="may be given again")
    args, others = parser.parse_known_args(argv)
    try:
        prepare(args.guardrail)
        serve(args.model, others)
    except UsageError as error:
        sys.stderr.write(f"{PROG}: {error}\n")
        return 2
    except GuardrailError as error:
        sys.stderr.write(f"{PROG}: {type(error).__name__}: {error}\n")
        return 1
    return 0


def prepare(guardrails: Sequence[str]) -> None:
    """Set what the plugin reads, and see that it will be loaded. Raises `UsageError` or `EngineError`."""
    named = [part if "=" in part else f"{Path(part).name}={part}" for part in guardrails]
    plugins = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name and name != PLUGIN]
    os.environ.update({GUARDRAILS: ",".join(named), "VLLM_PLUGINS": ",".join([*plugins, PLUGIN])})
    for group in ("vllm.general_plugins", "vllm.endpoint_plugins"):
        if not (found := [entry for entry in entry_points(group=group) if entry.name == PLUGIN]):
            raise EngineError(f"vLLM will not find the plugin ({group}): install saeguard in this environment")
        found[0].load()
    register()


def serve(model: str, options: Sequence[str]) -> None:
    """Run vLLM's OpenAI server in this process."""
    from vllm.entrypoints.launchers.api_server.entry import main as vllm_serve

    sys.argv = [PROG, "--model", model, *options]
    vllm_serve()


if __name__ == "__main__":
    sys.exit(main())
