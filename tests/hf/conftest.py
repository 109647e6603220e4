"""Checkpoints written by transformers from random weights, and shapes of our models."""

import json
import shutil

import pytest
import torch
import transformers
from flax import nnx

from finetune_jax import tree
from finetune_jax.hf.pretrained import parse_config
from finetune_jax.models.bert import BertForSequenceClassification, BertForTokenClassification
from finetune_jax.models.resnet import ResNetForImageClassification

BERT = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}
RESNET = {"embedding_size": 8, "hidden_sizes": (16, 24), "depths": (2, 1), "layer_type": "bottleneck"}
OURS = {
    "BertForSequenceClassification": BertForSequenceClassification,
    "BertForTokenClassification": BertForTokenClassification,
    "ResNetForImageClassification": ResNetForImageClassification,
}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """(HF class name, number of labels) -> folder that save_pretrained wrote; made once, not to be changed."""
    folders = {}

    def make(name, num_labels=3):
        if (name, num_labels) not in folders:
            torch.manual_seed(0)
            fields = RESNET if name.startswith("ResNet") else BERT
            config = (transformers.ResNetConfig if name.startswith("ResNet") else transformers.BertConfig)(
                **fields, num_labels=num_labels
            )
            model = getattr(transformers, name)(config)
            with torch.no_grad():
                for tensor in [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]:
                    tensor.add_(torch.rand_like(tensor))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            folders[name, num_labels] = folder
        return folders[name, num_labels]

    return make


@pytest.fixture
def copied(saved, tmp_path):
    """The same, as a copy to be damaged."""

    def make(name, num_labels=3):
        folder = tmp_path / "checkpoint"
        shutil.copytree(saved(name, num_labels), folder)
        return folder

    return make


@pytest.fixture(scope="session")
def shapes():
    """(our class name, number of labels) -> shape of every parameter and statistic."""

    def make(name, num_labels=3):
        family, fields = ("resnet", RESNET) if name.startswith("ResNet") else ("bert", BERT)
        config = parse_config(family, fields, "test")
        return tree.flatten(
            nnx.state(nnx.eval_shape(lambda: OURS[name](config, num_labels, rngs=nnx.Rngs(0))))
        )

    return make


@pytest.fixture
def edit_config():
    """(folder, fields) changes config.json; a field None is taken out."""

    def edit(folder, **fields):
        path = folder / "config.json"
        changed = {**json.loads(path.read_text()), **fields}
        path.write_text(json.dumps({key: value for key, value in changed.items() if value is not None}))

    return edit
