"""The methods that a guardrail is compared with, one file each; `catalogue.py` lists them."""
