"""The HTTP side: an OpenAI-compatible server."""
