"""Timing the product itself: one file a benchmark."""
