"""Where the parameters of the usual models lie on the usual meshes, as text: tests/golden/sharding/*.txt.

python -m tests.sharding_tables     writes them anew; look at the difference before it is committed
"""

from pathlib import Path

import jax
from flax import nnx
from jax.sharding import AbstractMesh

from finetune_jax.config import MeshConfig
from finetune_jax.hf.pretrained import parse_config
from finetune_jax.models import bert, resnet
from finetune_jax.sharding import AXES, bytes_a_device, place_params, placement_table
from finetune_jax.state import split_model

GOLDEN = Path(__file__).parent / "golden/sharding"
BASE = {"model_type": "bert"}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MODELS = {
    "bert-base": ("bert", bert.BertForSequenceClassification, BASE, 2),
    "bert-large": ("bert", bert.BertForTokenClassification, {**BASE, **LARGE}, 9),
    "resnet-50": ("resnet", resnet.ResNetForImageClassification, {"model_type": "resnet"}, 1000),
}
MESHES = (
    (8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2),
    (1, 32, 1), (4, 8, 1), (4, 4, 2),
    (1, 256, 1), (16, 16, 1), (16, 8, 2),
)  # fmt: skip


def table(name: str) -> str:
    """All meshes of a model, one under the other."""
    family, model, fields, labels = MODELS[name]
    config = parse_config(family, fields, name)
    parts = split_model(lambda key: model(config, labels, rngs=nnx.Rngs(key)))
    rules = {"bert": bert, "resnet": resnet}[family].SHARDING
    text = ""
    for sizes in MESHES:
        mesh = AbstractMesh(sizes, AXES)
        placements = place_params(rules, parts.abstract, mesh, MeshConfig().smallest_split)
        placed = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placements[path].sharding)
            for path, leaf in parts.abstract.items()
        }
        whole, part = bytes_a_device(placed)
        text += (
            f"# data {sizes[0]}, fsdp {sizes[1]}, tensor {sizes[2]}: {part:,} of {whole:,} bytes a device\n"
        )
        text += "\n".join(placement_table(parts.abstract, placements)) + "\n\n"
    return text


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        (GOLDEN / f"{name}.txt").write_text(table(name), encoding="utf-8")
