"""Guarded models behind an interface: HTTP and vLLM."""
