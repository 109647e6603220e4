"""Named entities in Chinese resumes (characters as tokens), a small BERT from random weights.

Command:   FINETUNE_JAX_DATA=FOLDER finetune-jax train --config configs/resume_ner.py --workdir runs/resume
Data:      FOLDER/resume_ner/{train,validation,test}.conll and FOLDER/bert_base_chinese_vocab/vocab.txt
Hardware:  2 CPU cores.
Expected:  see docs/results.md.
"""

from finetune_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="token_classification"),
        model=ModelConfig(
            family="bert",
            tokenizer="$FINETUNE_JAX_DATA/bert_base_chinese_vocab/vocab.txt",
            hf_config={
                "vocab_size": 21128,
                "hidden_size": 128,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 512,
                "max_position_embeddings": 256,
            },
        ),
        data=DataConfig(source="files", path="$FINETUNE_JAX_DATA/resume_ner", format="conll", max_length=192),
        optim=OptimConfig(learning_rate=1e-3, warmup_ratio=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=10, batch_size=32),
    )
