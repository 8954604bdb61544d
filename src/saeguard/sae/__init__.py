"""Sparse autoencoders: one in-memory form, one file for each file format."""

from saeguard.sae.autoencoder import JumpReLU, ReLU, SparseAutoencoder, TopK

__all__ = ["JumpReLU", "ReLU", "SparseAutoencoder", "TopK"]
