"""Attacks: what a determined user can get back from a guarded model. One file a family.

config (what can be chosen) -> catalogue (all attacks by name) -> campaign (the clean questions, then one job after the
other: by_prompt, white_box, by_relearning) -> task and success (asked and counted) -> card

prompts       attack, materials: dilution, turns, spelling, rewriting, templates, suffix
white box     weights, steering, steering_each, reading
relearning    relearning (what is learned from) -> finetuning (how) -> curves (what is asked when)
              relearn_forget: for methods that are compared
"""
