"""Judging a model, guarded or not: one file a kind of test."""
