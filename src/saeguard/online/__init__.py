"""A guardrail at work in a model: read each pass, remember each sequence, clamp what triggers.

passes (what a forward pass reads) -> memory and sequences (what was read before) -> live (the rule on this device)
-> intervention (decide and clamp) -> reach and rereading (from the first token on) -> together (several guardrails)
-> verdicts
"""
