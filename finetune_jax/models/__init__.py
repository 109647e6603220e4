"""Flax NNX networks: jax and flax only; no configuration file, mesh, HF file or data is known here."""
