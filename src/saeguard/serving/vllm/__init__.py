"""Guardrails inside vLLM: a plugin, and the command `saeguard-vllm`. Only `engine` and `worker` know vLLM's insides."""
