"""Hugging Face checkpoints: finding them, reading and checking them, and writing them again. No torch, no transformers."""
