"""Attacks: what a determined user can get back from a guarded model. One file a family."""
