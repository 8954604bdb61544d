"""`saeguard doctor`: does this SAE belong to this model and layer? Measured on a few thousand tokens of text.

measure, corrections, precision -> figures -> checks, declared -> findings -> diagnosis
"""
