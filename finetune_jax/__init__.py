"""Fine-tune Hugging Face BERT and ResNet checkpoints in JAX, and give Hugging Face checkpoints back."""

__version__ = "0.1.0"
