"""The methods that a guardrail is compared with, one file a method."""
