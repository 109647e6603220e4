"""The command `finetune-jax`, which `python -m finetune_jax` is too. Signals are watched before anything heavy is imported."""

from finetune_jax import signals
from finetune_jax.environment import ask_for_huge_pages, deepen_compiler_stacks


def main() -> None:
    """Watch for signals, then do as the words say."""
    ask_for_huge_pages()
    signals.install()
    deepen_compiler_stacks()
    from finetune_jax.cli import main as command

    signals.phase("reading the command")
    command()


if __name__ == "__main__":
    main()
