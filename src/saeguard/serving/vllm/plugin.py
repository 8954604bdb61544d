"""The entry point `vllm.general_plugins`: `VLLM_PLUGINS=saeguard` with `SAEGUARD_GUARDRAILS=id=DIR,…` guards.

vLLM logs an error met while it imports a plugin and goes on without; so nothing is imported here that could fail, and
what `register` raises ends the process.
"""

from __future__ import annotations

import os

PLUGIN = "saeguard"
GUARDRAILS = "SAEGUARD_GUARDRAILS"


def register() -> None:
    """Called by vLLM in every process. Without guardrails, and not asked for by name, it leaves vLLM alone."""
    text, named = os.environ.get(GUARDRAILS, ""), PLUGIN in os.environ.get("VLLM_PLUGINS", "").split(",")
    if not text and not named:
        return
    from saeguard.serving.vllm.engine import guard_every_engine
    from saeguard.serving.vllm.loading import parse_guardrails

    guard_every_engine(parse_guardrails(text))
