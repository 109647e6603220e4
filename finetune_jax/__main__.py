"""`python -m finetune_jax` is the command `finetune-jax`."""

from finetune_jax.cli import main

main()
