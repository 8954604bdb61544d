"""One file for each format SAEs are published in.

Each has two functions: `find`, the file of weights where a place holds this format, else None; and `read`, from that
file to a `SparseAutoencoder` in plain units. `Place` is what they look at.
"""
