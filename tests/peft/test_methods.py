"""Methods that add parameters: their papers' equations, the start, resume, merging, and Hugging Face's peft both ways."""

import dataclasses
import functools
import inspect
import json
import math
import re
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from finetune_jax import train as loop
from finetune_jax.checkpoint import named_leaves
from finetune_jax.config import MeshConfig, OptimConfig, PeftConfig, load_saved
from finetune_jax.data.text import TextFeatures, prompted
from finetune_jax.errors import UserError
from finetune_jax.export import export
from finetune_jax.models import bert
from finetune_jax.models.bert import BertConfig, Output
from finetune_jax.models.layers import FLOAT32, Conv, Linear
from finetune_jax.models.resnet import ConvLayer
from finetune_jax.opening import open_adapters, open_model
from finetune_jax.peft import install
from finetune_jax.peft.adalora import budget, layers_of, orthogonality, pruned
from finetune_jax.peft.bottleneck import AdapterConvLayer, HoulsbyOutput, PfeifferOutput
from finetune_jax.peft.dora import DoraLinear
from finetune_jax.peft.ia3 import Ia3Linear
from finetune_jax.peft.install import is_added, merged
from finetune_jax.peft.lora import LoraConv, LoraLinear
from finetune_jax.peft.prompt import Prefix
from finetune_jax.plan import Subject
from finetune_jax.predict import predict
from finetune_jax.prepare import first_state, prepare
from finetune_jax.step import make_forward, make_train_step
from finetune_jax.tasks.sequence import SequenceClassification
from finetune_jax.tree import flatten, lookup, unflatten
from tests import tiny
from tests.faults.test_numerics import poison
from tests.tiny import assert_same_bits, saved

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of peft's own imports
    import peft

replace = dataclasses.replace
config_of = functools.partial(tiny.config_of, layers=2)  # what a method adds is found by its layer
ONE = slice(0, 1)
METHODS = {
    "lora": PeftConfig("lora", rank=4, alpha=8.0),
    "rslora, everywhere, dropout": PeftConfig(
        "lora", (r"dense$|self/",), rank=4, alpha=8.0, rslora=True, dropout=0.3
    ),
    "one layer": PeftConfig("lora", (r"layer/1/.*query$",), rank=2, alpha=4.0),
    "ia3": PeftConfig("ia3"),
    "dora": PeftConfig("lora", rank=4, alpha=8.0, dora=True, dropout=0.2),
    "adalora": PeftConfig("adalora", rank=4, alpha=8.0, target_rank=2, prune_every=1, dropout=0.1),
    "adalora, few values": PeftConfig("adalora", rank=4, target_rank=1, prune_every=1),
    "pfeiffer": PeftConfig("bottleneck", width=4),
    "houlsby": PeftConfig("bottleneck", width=4, placement="houlsby"),
    "prefix": PeftConfig("prefix", virtual_tokens=3),
    "prefix through a layer": PeftConfig("prefix", virtual_tokens=3, prefix_hidden=8),
    "prompt": PeftConfig("prompt", virtual_tokens=3),
}
ALONE = ("pfeiffer", "houlsby", "prefix", "prefix through a layer", "prompt")
"""Those that cannot be multiplied into the model."""
OURS = ("pfeiffer", "houlsby")
"""Those that peft has not."""
MOVES_THE_START = ("prefix", "prefix through a layer", "prompt")
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
AUTO = {
    "text": AutoModelForSequenceClassification,
    "token": AutoModelForTokenClassification,
    "image": AutoModelForImageClassification,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks transformers
    # peft's own AdaLoRA folders give it too: it looks for layers of these names.
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]


def values(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


def test_lora_is_its_equation():
    rng = np.random.default_rng(0)
    layer = LoraLinear(
        Linear(6, 5, nnx.initializers.normal(), dtype=jnp.float32, rngs=nnx.Rngs(0)),
        3,
        0.7,
        0.0,
        "x",
        nnx.Rngs(1),
    )
    x, b = values(rng, 2, 4, 6), values(rng, 3, 5)
    layer.lora_b[...] = jnp.asarray(b)
    kernel, a, bias = (
        np.asarray(value[...], np.float64) for value in (layer.kernel, layer.lora_a, layer.bias)
    )
    np.testing.assert_allclose(layer(jnp.asarray(x)), x @ (kernel + 0.7 * a @ b) + bias, atol=1e-5)


def test_dropout_drops_of_the_products_input_only():
    rng = np.random.default_rng(0)
    base = Linear(64, 5, nnx.initializers.normal(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = LoraLinear(base, 3, 1.0, 0.5, "x", nnx.Rngs(1))
    x = jnp.asarray(values(rng, 1, 64))
    np.testing.assert_array_equal(layer(x, jax.random.key(0)), base(x))
    layer.lora_b[...] = jnp.ones((3, 5))
    kept = (
        np.asarray(layer(x, jax.random.key(0)) - base(x)),
        np.asarray(layer(x, jax.random.key(1)) - base(x)),
    )
    assert not np.allclose(*kept)
    many = np.mean([np.asarray(layer(x, jax.random.key(i)) - base(x)) for i in range(400)], axis=0)
    np.testing.assert_allclose(many, np.asarray(layer(x) - base(x)), atol=0.25)


def test_layers_of_one_key_drop_different_elements():
    base = Linear(64, 5, nnx.initializers.normal(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    one, other = (LoraLinear(base, 3, 1.0, 0.5, name, nnx.Rngs(1)) for name in ("query", "key"))
    for layer in (one, other):
        layer.lora_b[...] = jnp.ones((3, 5))
    x = jnp.asarray(values(np.random.default_rng(0), 1, 64))
    np.testing.assert_array_equal(one(x), other(x))
    assert not np.allclose(one(x, jax.random.key(0)), other(x, jax.random.key(0)))


def test_what_is_random_starts_as_in_the_papers():
    """lora_a as Hugging Face peft's (uniform, torch's kaiming_uniform_ of sqrt(5)), a bottleneck with a deviation of 0.01."""
    wide = Linear(400, 5, nnx.initializers.normal(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    theirs = torch.empty(100, 400)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    ours = np.asarray(LoraLinear(wide, 100, 1.0, 0.0, "x", nnx.Rngs(1)).lora_a[...])
    window = Conv(16, 6, 5, 1, nnx.initializers.normal(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    convolved = np.asarray(LoraConv(window, 100, 1.0, nnx.Rngs(1)).lora_a[...])
    for found in (ours, convolved):
        assert abs(found).max() == pytest.approx(float(theirs.abs().max()), rel=0.01)
        assert found.std() == pytest.approx(float(theirs.std()), rel=0.02)
        assert abs(found.mean()) < 0.02 * abs(found).max()
    config = bert.BertConfig(**{**tiny.FIELDS, "hidden_size": 128})
    made = bert.BertForSequenceClassification(config, 2, rngs=nnx.Rngs(0))
    install.install(made, PeftConfig(method="bottleneck", width=64), "bert", bert.HEAD, jax.random.key(0))
    downs = [value for path, value in nnx.to_flat_state(nnx.state(made)) if path[-1] == "adapter_down"]
    assert downs
    for down in downs:
        assert np.asarray(down[...]).std() == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 2)])
def test_lora_of_a_convolution_is_torchs(size, stride):
    rng = np.random.default_rng(0)
    base = Conv(4, 6, size, stride, nnx.initializers.normal(), dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = LoraConv(base, 2, 0.5, nnx.Rngs(1))
    layer.lora_b[...] = jnp.asarray(values(rng, 2, 6))
    x = values(rng, 2, 9, 9, 4)

    def conv(x, kernel):
        kernel = torch.tensor(np.asarray(kernel)).permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(x, kernel, stride=stride, padding=size // 2)

    image = torch.tensor(x).permute(0, 3, 1, 2)
    narrow = conv(image, layer.lora_a[...])
    wide = torch.einsum("brhw,ro->bohw", narrow, torch.tensor(np.asarray(layer.lora_b[...])))
    theirs = (conv(image, base.kernel[...]) + 0.5 * wide).permute(0, 2, 3, 1)
    np.testing.assert_allclose(layer(jnp.asarray(x)), theirs.numpy(), atol=1e-5)


@pytest.mark.parametrize("scales_input", [True, False])
def test_ia3_is_its_equation(scales_input):
    rng = np.random.default_rng(0)
    layer = Ia3Linear(
        Linear(6, 5, nnx.initializers.normal(), dtype=jnp.float32, rngs=nnx.Rngs(0)),
        scales_input=scales_input,
    )
    x, factor = values(rng, 2, 4, 6), values(rng, 6 if scales_input else 5)
    layer.ia3[...] = jnp.asarray(factor)
    kernel, bias = np.asarray(layer.kernel[...]), np.asarray(layer.bias[...])
    expected = (x * factor) @ kernel + bias if scales_input else (x @ kernel + bias) * factor
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, atol=1e-5)


def test_dora_is_its_equation():
    """m (W + s A B) / |W + s A B| by columns, and the gradient with the norm held (arXiv:2402.09353, eqs. 5 and 11), by torch."""
    rng = np.random.default_rng(0)
    base = Linear(6, 5, nnx.initializers.normal(1.0), dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = DoraLinear(base, 3, 0.7, 0.0, "x", nnx.Rngs(1))
    layer.lora_b[...], layer.dora_m[...] = jnp.asarray(values(rng, 3, 5)), jnp.asarray(values(rng, 5))
    x = values(rng, 4, 6)

    graphdef, flat = nnx.graphdef(layer), flatten(nnx.state(layer))

    def ours(parameters):
        named = dict(zip(("lora_a", "lora_b", "dora_m"), parameters, strict=True))
        made = nnx.merge(graphdef, unflatten({**flat, **named}), copy=True)
        return jnp.sum(jnp.square(made(jnp.asarray(x))))

    parameters = tuple(value[...] for value in (layer.lora_a, layer.lora_b, layer.dora_m))
    found, gradients = jax.value_and_grad(ours)(parameters)
    kernel, bias = (torch.tensor(np.asarray(value[...])) for value in (base.kernel, base.bias))
    a, b, m = (torch.tensor(np.asarray(value)).requires_grad_() for value in parameters)
    moved = kernel + 0.7 * a @ b
    turned = (kernel.norm(dim=0) + m) * moved / moved.norm(dim=0).detach()
    expected = (torch.tensor(x) @ turned + bias).square().sum()
    expected.backward()
    np.testing.assert_allclose(found, expected.detach(), rtol=1e-5)
    for mine, theirs in zip(gradients, (a, b, m), strict=True):
        np.testing.assert_allclose(mine, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [HoulsbyOutput, PfeifferOutput])
def test_bottlenecks_are_their_equations(kind):
    rng = np.random.default_rng(0)
    config = BertConfig(hidden_size=6, layer_norm_eps=1e-12)
    layer = kind(Output(4, config, jnp.float32, nnx.Rngs(0)), 2, "relu", nnx.Rngs(1))
    for name in ("down", "down_bias", "up", "up_bias"):
        value = getattr(layer, f"adapter_{name}")
        value[...] = jnp.asarray(values(rng, *value.shape))
    x, residual = values(rng, 1, 3, 4), values(rng, 1, 3, 6)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True)

    def through(x):
        down, down_bias, up, up_bias = (
            np.asarray(getattr(layer, f"adapter_{n}")[...]) for n in ("down", "down_bias", "up", "up_bias")
        )
        return np.maximum(x @ down + down_bias, 0) @ up + up_bias

    dense = x @ np.asarray(layer.dense.kernel[...])
    inside = dense if kind is HoulsbyOutput else norm(dense + residual)
    expected = norm(dense + through(inside) + residual)
    np.testing.assert_allclose(layer(jnp.asarray(x), jnp.asarray(residual), None), expected, atol=1e-5)


def test_a_bottleneck_of_a_convolution_is_torchs():
    """x + conv1x1(relu(conv1x1(x))), x what the layer gives (arXiv:1705.08045)."""
    rng = np.random.default_rng(0)
    base = ConvLayer(3, 6, 3, 1, "relu", compute=FLOAT32, rngs=nnx.Rngs(0))
    layer = AdapterConvLayer(base, 2, "relu", nnx.Rngs(1))
    x = values(rng, 2, 5, 5, 3)
    inside = base(jnp.asarray(x), None, False)
    np.testing.assert_array_equal(layer(jnp.asarray(x), None, False), inside, "it starts as the layer")
    given = {}
    for name in ("down", "down_bias", "up", "up_bias"):
        value = getattr(layer, f"adapter_{name}")
        value[...] = jnp.asarray(values(rng, *value.shape))
        given[name] = torch.tensor(np.array(value[...]))
    inside = torch.tensor(np.array(inside)).permute(0, 3, 1, 2)
    conv = torch.nn.functional.conv2d
    narrow = torch.relu(conv(inside, given["down"].T[:, :, None, None], given["down_bias"]))
    expected = inside + conv(narrow, given["up"].T[:, :, None, None], given["up_bias"])
    found = layer(jnp.asarray(x), None, False)
    np.testing.assert_allclose(found, expected.permute(0, 2, 3, 1), atol=1e-5)


def test_a_prefix_through_a_layer_is_pefts():
    """The numbers of peft's own encoder with our weights (arXiv:2101.00190, section 4.3)."""
    prefix = Prefix(5, 2, 4, 3, 0.02, nnx.Rngs(0))
    rng, ours = np.random.default_rng(0), {}
    for name in ("table", "in", "in_bias", "out", "out_bias"):
        value = getattr(prefix, f"prefix_{name}")
        value[...] = jnp.asarray(values(rng, *value.shape))
        ours[name] = torch.tensor(np.array(value[...]))
    encoder = peft.PrefixEncoder(
        peft.PrefixTuningConfig(
            num_virtual_tokens=5, token_dim=4, num_layers=2, encoder_hidden_size=3, prefix_projection=True
        )
    )
    names = (
        "embedding.weight",
        "transform.0.weight",
        "transform.0.bias",
        "transform.2.weight",
        "transform.2.bias",
    )
    given = (ours["table"], ours["in"].T, ours["in_bias"], ours["out"].T, ours["out_bias"])
    encoder.load_state_dict(dict(zip(names, given, strict=True)))
    theirs = encoder(torch.arange(5)).detach().reshape(5, 2, 2, 4)  # P x T x (key, value) x D
    np.testing.assert_allclose(prefix(), theirs.transpose(0, 1), atol=1e-5)


def test_the_budget_falls_along_a_cubic_curve():
    """arXiv:2303.10512, eq. 12: all until t_i, then down to the target, which holds from T - t_f."""
    config = PeftConfig("adalora", rank=6, target_rank=2, prune_from=0.2, prune_until=0.8)
    found = [int(budget(step, config, 5, 50)) for step in range(51)]
    for step, value in enumerate(found):
        left = min(max(1 - (step - 10) / 30, 0), 1)
        assert value == (10 if step >= 40 else round(10 + 20 * left**3))
    assert found[0] == found[10] == 30
    assert found[40:] == [10] * 11


def test_adalora_prunes_as_algorithm_1():
    """Twelve updates of two layers against a NumPy derivation of arXiv:2303.10512, eqs. 8 to 11, with budgets and pruning."""
    rng = np.random.default_rng(0)
    config = PeftConfig("adalora", rank=3, target_rank=1, prune_from=0.25, prune_until=0.75, prune_every=2)
    shapes = {"lora_a": (4, 3), "lora_e": (3,), "lora_b": (3, 5)}
    paths = {f"{layer}/{name}": shape for layer in ("x", "y") for name, shape in shapes.items()}
    params = {path: values(rng, *shape) for path, shape in paths.items()} | {"head/kernel": values(rng, 2)}
    transform = pruned(config, 12)
    state = transform.init(jax.tree.map(jnp.asarray, params))
    mine = {path: value.astype(np.float64) for path, value in params.items()}
    mean, spread = ({path: np.zeros(shape) for path, shape in paths.items()} for _ in range(2))
    kept = np.ones(6, bool)
    for step in range(1, 13):
        gradients = {path: values(rng, *value.shape) for path, value in params.items()}
        updates = {path: 0.1 * values(rng, *value.shape) for path, value in params.items()}
        made, state = transform.update(
            jax.tree.map(jnp.asarray, updates), state, params, gradients=gradients, weight=2.0
        )
        params = {path: np.asarray(params[path] + made[path]) for path in params}
        for path in paths:
            now = np.abs(mine[path] * gradients[path] / 2.0)
            mean[path] = 0.85 * mean[path] + 0.15 * now
            spread[path] = 0.85 * spread[path] + 0.15 * np.abs(now - mean[path])
        score = {path: mean[path] * spread[path] for path in paths}
        each = [
            score[f"{layer}/lora_e"] + score[f"{layer}/lora_a"].mean(0) + score[f"{layer}/lora_b"].mean(1)
            for layer in ("x", "y")
        ]
        left = min(max(1 - (step - 3) / 6, 0), 1)
        places = 2 if step >= 9 else round(2 + 4 * left**3)
        if step <= 9:
            kept = np.zeros(6, bool)
            kept[np.argsort(-np.concatenate(each))[:places]] = True
        mine = {path: mine[path] + updates[path] for path in mine}
        if step >= 9 or (step > 3 and (step - 3) % 2 == 0):
            for layer, mask in zip(("x", "y"), np.split(kept, 2), strict=True):
                mine[f"{layer}/lora_e"] = mine[f"{layer}/lora_e"] * mask
        for path in params:
            np.testing.assert_allclose(
                params[path], mine[path], rtol=1e-4, atol=1e-6, err_msg=f"{step} {path}"
            )
    assert sum((params[f"{layer}/lora_e"] != 0).sum() for layer in ("x", "y")) == 2


def test_the_penalty_is_that_of_the_paper():
    """|P^T P - I|^2 + |Q Q^T - I|^2, Frobenius, over all layers (arXiv:2303.10512, eqs. 3 and 4)."""
    rng = np.random.default_rng(0)
    params = {
        f"{layer}/{name}": values(rng, *shape)
        for layer in ("x", "y")
        for name, shape in (("lora_a", (3, 3, 4, 2)), ("lora_e", (2,)), ("lora_b", (2, 5)))
    }
    total = 0.0
    for layer in ("x", "y"):
        q, p = params[f"{layer}/lora_a"].reshape(-1, 2).T, params[f"{layer}/lora_b"].T
        total += np.linalg.norm(p.T @ p - np.eye(2)) ** 2 + np.linalg.norm(q @ q.T - np.eye(2)) ** 2
    np.testing.assert_allclose(orthogonality(0.3)(jax.tree.map(jnp.asarray, params)), 0.3 * total, rtol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_penalty_is_added_once_and_not_told(accumulation, tmp_path):
    """The update of a step of SGD differs by the penalty's gradient, whatever the micro-batches; the loss does not."""
    config = of_method(config_of("text", tmp_path, steps=1), "adalora")
    config = replace(
        config,
        peft=replace(config.peft, dropout=0.0),
        model=replace(config.model, hf_config={**config.model.hf_config, **STILL}),
        data=replace(config.data, batching="padded"),
        optim=OptimConfig(name="sgd", learning_rate=1.0, schedule="constant", momentum=0.0, clip_norm=None),
    )
    setup = prepare(config, jax.devices()[ONE])
    found = []
    for penalty in (None, setup.updates.penalty):
        state = first_state(setup)
        step = make_train_step(
            setup.job.task, setup.job.parts, replace(setup.updates, penalty=penalty), accumulation
        )
        with jax.numpy_dtype_promotion("standard"):
            new, sums = jax.jit(step)(state, setup.batches[0])
        found.append((new.params, sums["loss"]))
        start = state.params
    np.testing.assert_array_equal(found[0][1], found[1][1])
    expected = jax.grad(setup.updates.penalty)(start)
    for path, gradient in expected.items():
        np.testing.assert_allclose(found[0][0][path] - found[1][0][path], gradient, atol=1e-5, err_msg=path)


def test_adalora_ends_at_its_budget(tmp_path):
    config = of_method(config_of("text", tmp_path, steps=8), "adalora")
    loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    weights = saved(tmp_path / "run")[1]["weights"]
    layers = layers_of(weights)
    assert len(layers) == 12
    assert sum((np.asarray(weights[f"{layer}/lora_e"]) != 0).sum() for layer in layers) == 2 * len(layers)
    with pytest.raises(
        UserError, match=r"the pruning of peft.method adalora begins at a share of the training"
    ):
        loop.train(config, tmp_path / "run", allow_change=("train.steps",))
    start = saved_ranks(replace(config, peft=replace(config.peft, prune_until=1.0)), tmp_path / "late")
    assert start == 2 * len(layers), "pruned with the last update"


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "name"),
    [("text", "adalora"), ("text", "dora"), ("text", "prefix"), ("token", "prompt"), ("image", "pfeiffer")],
)
def test_any_mesh_takes_the_same_updates(kind, name, tmp_path):
    """Eight devices, everything split that can be, beside one."""
    config = of_method(config_of(kind, tmp_path, steps=4), name)
    if kind != "image":
        config = replace(config, data=replace(config.data, batching="padded"))
    loop.train(config, tmp_path / "one", devices=jax.devices()[ONE])
    loop.train(replace(config, mesh=MeshConfig(2, 2, 2, smallest_split=0)), tmp_path / "eight")
    one, eight = ([row["loss"] for row in tiny.rows(tmp_path / run)] for run in ("one", "eight"))
    np.testing.assert_allclose(one, eight, rtol=2e-5)


def saved_ranks(config, run):
    loop.train(config, run, devices=jax.devices()[ONE])
    weights = saved(run)[1]["weights"]
    return sum((np.asarray(weights[f"{layer}/lora_e"]) != 0).sum() for layer in layers_of(weights))


def test_a_prompt_begins_with_words_of_the_vocabulary(base, tmp_path):
    config = on(of_method(config_of("text", tmp_path), "prompt"), base("text"))
    weights = first_state(prepare(config, jax.devices()[ONE])).weights
    table = np.asarray(weights["bert/embeddings/word_embeddings/embedding"])
    prompt = np.asarray(weights["bert/embeddings/word_embeddings/prompt"])
    assert all((table == row).all(axis=1).any() for row in prompt)
    other = first_state(prepare(replace(config, seed=1), jax.devices()[ONE])).weights
    assert not np.array_equal(prompt, other["bert/embeddings/word_embeddings/prompt"])


def test_virtual_pieces_stand_before_every_segment():
    offsets = np.array([0, 2, 5])
    features = TextFeatures(
        input_ids=np.array([7, 8, 4, 5, 6], np.int32),
        token_type_ids=np.array([0, 1, 0, 0, 1], np.uint8),
        offsets=offsets,
        example_ids=np.array([0, 1], np.int32),
        labels=np.array([-1, 3, -1, 2, 1], np.int32),
        words=np.array([-1, 0, -1, 1, 2], np.int32),
        word_offsets=np.array([0, 1, 3]),
        cut=np.asarray(0),
    )
    made = prompted(features, range(90, 92))
    assert made.input_ids.tolist() == [90, 91, 7, 8, 90, 91, 4, 5, 6]
    assert made.token_type_ids.tolist() == [0, 0, 0, 1, 0, 0, 0, 0, 1]
    assert made.offsets.tolist() == [0, 4, 9]
    assert made.labels.tolist() == [-1, -1, -1, 3, -1, -1, -1, 2, 1]
    assert made.words.tolist() == [-1, -1, -1, 0, -1, -1, -1, 1, 2]
    assert prompted(features, range(0)) is features


def of_method(config, name):
    if config.model.family != "resnet":
        return replace(config, peft=METHODS[name])
    # Convolutions have no dropout of what goes into a product, and running averages belong to the model.
    model, method = replace(config.model, batch_norm="frozen"), replace(METHODS[name], dropout=0.0)
    return replace(config, model=model, peft=method)


CASES = [
    *(("text", name) for name in METHODS),
    *(("token", name) for name in ("lora", "prefix", "prompt")),
    *(("image", name) for name in ("lora", "dora", "adalora", "adalora, few values", "pfeiffer")),
]


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[1] not in MOVES_THE_START])
def test_at_the_start_the_model_is_the_base(kind, name, tmp_path):
    """The bits of the logits, and the weights that the run would have begun with."""
    logits, weights = [], []
    for config in (config_of(kind, tmp_path), of_method(config_of(kind, tmp_path), name)):
        setup = prepare(config, jax.devices()[ONE])
        state = first_state(setup)
        batch = setup.batches[0]
        logits.append(jax.jit(make_forward(setup.job.task, setup.job.parts))(state.weights, batch)[0])
        weights.append({path: value for path, value in state.weights.items() if not is_added(path)})
    np.testing.assert_array_equal(*logits)
    assert_same_bits(*weights)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Kind -> a Hugging Face folder of a tiny model, trained a little."""

    @functools.cache
    def folder_of(kind):
        folder = tmp_path_factory.mktemp(f"base-{kind}")
        loop.train(config_of(kind, folder, steps=2), folder / "run", devices=jax.devices()[ONE])
        export(folder / "run", folder / "hf")
        return folder / "hf"

    return folder_of


def on(config, folder):
    """The same from a checkpoint."""
    return replace(config, model=replace(config.model, pretrained=str(folder), hf_config={}, tokenizer=None))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """(kind, name) -> run folder of a short training on the base."""

    @functools.cache
    def run_of(kind, name):
        folder = tmp_path_factory.mktemp("run")
        config = on(of_method(config_of(kind, folder, steps=5), name), base(kind))
        loop.train(config, folder / "run", devices=jax.devices()[ONE])
        return folder / "run"

    return run_of


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_only_the_method_and_the_head_learn_and_a_stopped_run_goes_on(kind, name, runs, tmp_path):
    config = load_saved(runs(kind, name) / "config.json")
    start = first_state(prepare(config, jax.devices()[ONE])).weights
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "parts", devices=jax.devices()[ONE], stop_at=3)
    loop.train(config, tmp_path / "parts", devices=jax.devices()[ONE])
    whole = saved(runs(kind, name))
    assert_same_bits(whole, saved(tmp_path / "parts"))
    for path, value in whole[1]["weights"].items():
        moved = np.asarray(value).tobytes() != np.asarray(start[path]).tobytes()
        if not path.endswith("/lora_e"):  # all of a layer may have been pruned, which is where they began
            assert moved == (is_added(path) or path.startswith("classifier/")), path
    moments = {str(path) for path, _ in jax.tree.flatten_with_path(whole[1]["training"]["opt_state"])[0]}
    assert not any(path.endswith("kernel']") and "classifier" not in path for path in moments)


def inputs(kind, tmp_path):
    if kind == "image":
        return [{"image": str(file)} for file in tiny.pictures(tmp_path, 3)]
    sentences = tiny.sentences(7, 3)
    return [{"tokens": s} if kind == "token" else {"text": " ".join(s)} for s in sentences]


def logits_of(model, rows):
    return [np.asarray(row["logits"]) for row in predict(*open_model(str(model)), rows, logits=True)]


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[1] not in ALONE])
def test_merged_gives_the_logits_of_the_run(kind, name, runs, tmp_path):
    run = runs(kind, name)
    assert export(run, tmp_path / "hf", verify=True) <= 1e-5
    assert not (tmp_path / "hf/adapter_config.json").exists()
    rows = inputs(kind, tmp_path)
    for ours, theirs in zip(logits_of(run, rows), logits_of(tmp_path / "hf", rows), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    job, weights = open_model(str(run))
    changed = merged(weights, job.peft)
    assert any(not np.array_equal(changed[p], weights[p]) for p in changed), "there is something to merge"


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_adapter_gives_the_logits_of_the_run(kind, name, runs, tmp_path):
    """Bit for bit. Of DoRA peft's file has the sum of a length and what was learned, which float32 rounds."""
    run = runs(kind, name)
    apart = 1e-6 if "dora" in name else 0.0
    assert export(run, tmp_path / "adapter", verify=True, adapter=True) <= apart
    assert not (tmp_path / "adapter/model.safetensors").exists()
    rows = inputs(kind, tmp_path)
    for ours, theirs in zip(logits_of(run, rows), logits_of(tmp_path / "adapter", rows), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=apart)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "image"])
def test_an_adapter_of_dora_rounds_a_length_once(kind, runs, tmp_path):
    """To the nearest float32; everything else is the run's bit for bit."""
    run = runs(kind, "dora")
    export(run, tmp_path / "adapter", adapter=True)
    (_, weights), (_, opened) = open_model(str(run)), open_model(str(tmp_path / "adapter"))
    assert weights.keys() == opened.keys()
    for path, value in weights.items():
        ours, theirs, rounded = np.asarray(value), np.asarray(opened[path]), 0.0
        if path.endswith("/dora_m"):
            kernel = np.asarray(weights[path.removesuffix("dora_m") + "kernel"], np.float64)
            length = np.sqrt((kernel**2).sum(tuple(range(kernel.ndim - 1)))) + ours
            rounded = (np.spacing(length.astype(np.float32)) + np.spacing(np.abs(ours))) / 2
        assert (np.abs(theirs.astype(np.float64) - ours) <= rounded).all(), path


@pytest.mark.long
@pytest.mark.parametrize("kind", ["text", "image"])
def test_a_layer_may_have_lost_all_its_values(kind, runs):
    """What the cases of that name are there for."""
    weights = saved(runs(kind, "adalora, few values"))[1]["weights"]
    kept = [np.count_nonzero(weights[f"{layer}/lora_e"]) for layer in layers_of(weights)]
    assert min(kept) == 0
    assert sum(kept) == len(kept)


def theirs_from(kind, folder):
    """The model in torch. peft 0.21 asks by name for the argument through which a prefix comes in, which transformers 5.24 has renamed:
    here it has both names.
    """
    model = AUTO[kind].from_pretrained(folder)
    if kind == "image":
        return model
    forward = model.bert.forward
    if "past_key_values" in inspect.signature(forward).parameters:
        return model

    def renamed(*positional, past_key_values=None, **named):
        return forward(*positional, cache=past_key_values, **named)

    model.bert.forward = renamed
    return model


def their_logits(model, folder, kind, rows):
    if kind == "image":
        opened = [Image.open(row["image"]) for row in rows]
        with torch.no_grad():
            return model(
                **AutoImageProcessor.from_pretrained(folder)(opened, return_tensors="pt")
            ).logits.numpy()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        text = row.get("text", row.get("tokens"))
        encoded = tokenizer(text, return_tensors="pt", is_split_into_words=kind == "token")
        with torch.no_grad():
            made = model(**encoded).logits[0].numpy()
        # peft gives the logits of a prompt too, before those of the text.
        found.append(made[-1 - len(text) : -1] if kind == "token" else made)
    return found


@pytest.mark.parametrize("name", ALONE)
def test_what_cannot_be_merged_is_said(name, runs, tmp_path):
    with pytest.raises(UserError, match=r"cannot be multiplied into the model; add --adapter"):
        export(runs("text", name), tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.long
@pytest.mark.parametrize(("kind", "name"), [c for c in CASES if c[1] not in OURS])
def test_peft_opens_what_we_write(kind, name, runs, base, tmp_path):
    run = runs(kind, name)
    export(run, tmp_path / "adapter", adapter=True)
    model = theirs_from(kind, base(kind))
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    rows = inputs(kind, tmp_path)
    theirs = their_logits(adapted, base(kind), kind, rows)
    for ours, other in zip(logits_of(run, rows), theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)


@pytest.mark.parametrize("kind", ["text", "token"])
@pytest.mark.parametrize(
    "config",
    [
        lambda task: peft.LoraConfig(
            task_type=task,
            r=3,
            lora_alpha=7,
            target_modules=["query", "dense"],
            use_rslora=True,
            init_lora_weights=False,
        ),
        lambda task: peft.LoraConfig(task_type=task, init_lora_weights=False),
        lambda task: peft.IA3Config(
            task_type=task,
            target_modules=["key", "value", "output.dense"],
            feedforward_modules=["output.dense"],
            init_ia3_weights=False,
        ),
        lambda task: peft.LoraConfig(task_type=task, r=3, use_dora=True, init_lora_weights=False),
        lambda task: peft.AdaLoraConfig(
            task_type=task,
            init_r=5,
            target_r=2,
            total_step=9,
            target_modules=["query", "output.dense"],
            init_lora_weights=False,
        ),
        lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=4),
        lambda task: peft.PrefixTuningConfig(
            task_type=task, num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=6
        ),
        lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=4),
    ],
    ids=["rslora", "lora", "ia3", "dora", "adalora", "prefix", "prefix through a layer", "prompt"],
)
def test_we_open_what_peft_writes(kind, config, base, tmp_path):
    torch.manual_seed(0)
    task = "SEQ_CLS" if kind == "text" else "TOKEN_CLS"
    model = peft.get_peft_model(theirs_from(kind, base(kind)), config(task)).eval()
    for name, value in model.named_parameters():
        if "ia3" in name or "modules_to_save" in name or "magnitude" in name:
            torch.nn.init.normal_(value, 1.0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    rows = inputs(kind, tmp_path)
    theirs = their_logits(model, base(kind), kind, rows)
    for ours, other in zip(logits_of(tmp_path / "adapter", rows), theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)
    if model.peft_type in ("PREFIX_TUNING", "PROMPT_TUNING"):
        with pytest.raises(
            UserError, match="cannot be multiplied into the model; evaluate and predict open it"
        ):
            export(tmp_path / "adapter", tmp_path / "hf")
        return
    gives_the_same_merged(kind, tmp_path, rows, theirs)


def gives_the_same_merged(kind, folder, rows, theirs):
    """An adapter that peft wrote becomes a whole model that transformers opens."""
    export(folder / "adapter", folder / "hf", verify=True)
    whole = AUTO[kind].from_pretrained(folder / "hf").eval()
    for ours, other in zip(their_logits(whole, folder / "hf", kind, rows), theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)
    assert "merged into" in (folder / "hf/README.md").read_text()


@pytest.mark.parametrize(
    "config",
    [
        lambda **more: peft.LoraConfig(r=3, init_lora_weights=False, **more),
        lambda **more: peft.LoraConfig(r=3, use_dora=True, init_lora_weights=False, **more),
        lambda **more: peft.AdaLoraConfig(
            init_r=3, target_r=2, total_step=9, init_lora_weights=False, **more
        ),
    ],
    ids=["lora", "dora", "adalora"],
)
def test_we_open_what_peft_writes_of_images(config, base, tmp_path):
    torch.manual_seed(0)
    chosen = config(target_modules=["convolution"], modules_to_save=["classifier"])
    model = peft.get_peft_model(theirs_from("image", base("image")), chosen).eval()
    for name, value in model.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            torch.nn.init.normal_(value, 1.0, 0.3)
        elif "lora_" in name:
            torch.nn.init.normal_(value, 0.0, 0.1)
    model.save_pretrained(tmp_path / "adapter")
    rows = inputs("image", tmp_path)
    theirs = their_logits(model, base("image"), "image", rows)
    np.testing.assert_allclose(logits_of(tmp_path / "adapter", rows), theirs, atol=1e-5)
    gives_the_same_merged("image", tmp_path, rows, theirs)


@pytest.mark.parametrize(
    ("options", "named"), [({"adapter": True}, "--adapter"), ({"step": "3"}, "--step 3")]
)
def test_an_adapter_has_no_steps_and_is_none_twice(options, named, runs, tmp_path):
    export(runs("text", "lora"), tmp_path / "adapter", adapter=True)
    with pytest.raises(UserError, match=f"is an adapter already, and no run; leave {named} out"):
        export(tmp_path / "adapter", tmp_path / "hf", **options)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("change", [{"peft": PeftConfig(method="lora")}, {"model": {"train": "head"}}])
def test_what_is_random_is_not_frozen(change, base, tmp_path):
    """A checkpoint of a masked LM has no pooler: a new one is trained, whatever else is."""
    shutil.copytree(base("text"), tmp_path / "bare")
    file = tmp_path / "bare/model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "pooler" not in name}, file)
    config = on(config_of("text", tmp_path, steps=1), tmp_path / "bare")
    model = replace(config.model, **change.get("model", {}))
    config = replace(config, model=model, peft=change.get("peft", config.peft))
    loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    _, after = saved(tmp_path / "run")
    bare = load_file(tmp_path / "bare/model.safetensors")
    moments = [path for path in named_leaves(after["training"]) if "/mu/" in path]
    assert any("pooler" in path for path in moments)
    assert not any("/self/query/kernel" in path for path in moments)
    assert export(tmp_path / "run", tmp_path / "hf", verify=True) <= 1e-5
    assert not any("pooler" in name for name in bare)
    planned = Subject.open(config, None).train_step(config, jax.devices()[ONE]).state
    assert {path for path in planned.params if "pooler" in path}, "what is planned is what is trained"
    frozen = replace(config, model=replace(config.model, freeze=("pooler",)))
    with pytest.raises(UserError, match=r"bare has no bert/pooler/dense/bias"):
        loop.train(frozen, tmp_path / "other", devices=jax.devices()[ONE])
    assert not (tmp_path / "other").exists()


def test_the_adapter_alone_is_not_frozen(base, tmp_path):
    config = on(of_method(config_of("text", tmp_path, steps=1), "lora"), base("text"))
    config = replace(config, model=replace(config.model, freeze=("lora_",)))
    with pytest.raises(UserError, match=r"leaves nothing to train of what peft.method lora adds"):
        loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])


def test_an_adapter_names_its_folder_from_anywhere(base, tmp_path, monkeypatch):
    shutil.copytree(base("text"), tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = on(of_method(config_of("text", tmp_path, steps=1), "lora"), "base")
    loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(tmp_path / "base")
    assert "library_name: peft\n" in (tmp_path / "adapter/README.md").read_text()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=2)
    assert found.peft_config["default"].r == METHODS["lora"].rank
    assert open_model(str(tmp_path / "adapter"))[0].peft.method == "lora"


def test_a_line_that_names_an_adapter_where_there_is_none(base, tmp_path):
    rows = [{"text": "a"}, {"text": "b", "adapter": "x"}]
    with pytest.raises(UserError, match="input 2: a line names an adapter, and none are there"):
        predict(*open_model(str(base("text"))), rows)


def test_an_adapter_that_names_no_task(base, tmp_path):
    """peft asks for none: then the head is for what the model is for, if that is known."""
    torch.manual_seed(0)
    config = peft.LoraConfig(
        target_modules=["query"], modules_to_save=["classifier"], init_lora_weights=False
    )
    model = peft.get_peft_model(theirs_from("text", base("text")), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    rows = inputs("text", tmp_path)
    for ours, theirs in zip(
        logits_of(tmp_path / "adapter", rows), their_logits(model, base("text"), "text", rows), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    shutil.copytree(base("text"), tmp_path / "bare")
    for file, change in (
        (tmp_path / "bare/config.json", {"architectures": ["BertModel"]}),
        (tmp_path / "adapter/adapter_config.json", {"base_model_name_or_path": str(tmp_path / "bare")}),
    ):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        UserError, match="task_type None does not say what the head is for; set it to SEQ_CLS or TOKEN_CLS"
    ):
        open_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("kind", ["text", "token", "image"])
def test_an_adapter_brings_its_inputs(kind, base, tmp_path):
    """A vocabulary in another order, shorter windows, larger images than the model's: what the run was trained with."""
    config = on(of_method(config_of(kind, tmp_path, steps=2), "lora"), base(kind))
    if kind == "image":
        image = replace(config.data.image, size=32, override_size=True)
        config = replace(config, data=replace(config.data, image=image))
    else:
        (tmp_path / "vocab.txt").write_text("\n".join([*tiny.VOCAB[:5], *tiny.VOCAB[:4:-1]]) + "\n")
        model = replace(config.model, tokenizer=str(tmp_path / "vocab.txt"))
        config = replace(config, model=model, data=replace(config.data, max_length=8))
    loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    rows = inputs(kind, tmp_path)
    together = predict(
        *open_adapters(str(base(kind)), {"a": str(tmp_path / "adapter")})["a"], rows, logits=True
    )
    for ours, alone, beside in zip(
        logits_of(tmp_path / "run", rows), logits_of(tmp_path / "adapter", rows), together, strict=True
    ):
        np.testing.assert_array_equal(ours, alone)
        np.testing.assert_array_equal(ours, np.asarray(beside["logits"], np.float32))


@pytest.mark.parametrize(("kind", "name"), [("text", "houlsby"), ("image", "pfeiffer")])
def test_a_bottleneck_brings_the_norms_that_were_trained_beside_it(kind, name, base, tmp_path):
    """arXiv:1902.00751, section 2.1."""
    config = on(of_method(config_of(kind, tmp_path, steps=3), name), base(kind))
    config = replace(config, model=replace(config.model, train="norm"))
    loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    assert export(tmp_path / "run", tmp_path / "adapter", verify=True, adapter=True) == 0.0
    rows = inputs(kind, tmp_path)
    for ours, theirs in zip(
        logits_of(tmp_path / "run", rows), logits_of(tmp_path / "adapter", rows), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
    names = [name for name in load_file(tmp_path / "adapter/adapter_model.safetensors") if "orm" in name]
    assert names, "they are in it"
    assert not any("query" in name for name in names)


def test_an_adapter_is_for_the_weights_that_its_run_saw(base, tmp_path, capsys):
    """Not for those that lie in the same place now; and that they were rounded in training is said."""
    shutil.copytree(base("text"), tmp_path / "base")
    config = on(of_method(config_of("text", tmp_path, steps=2), "lora"), tmp_path / "base")
    loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    half = replace(config, model=replace(config.model, frozen_dtype="bfloat16"))
    loop.train(half, tmp_path / "half", devices=jax.devices()[ONE])
    capsys.readouterr()
    export(tmp_path / "half", tmp_path / "rounded", adapter=True)
    assert "frozen matrices were bfloat16 in training" in capsys.readouterr().err
    weights = load_file(tmp_path / "base/model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][3, 5] += 1.0
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    for run in ("run", "half"):
        with pytest.raises(
            UserError, match=r"other weights than those of .*base now: 1 differ, such as bert/embeddings/word"
        ):
            export(tmp_path / run, tmp_path / "adapter", adapter=True)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.long
@pytest.mark.parametrize(("skipped", "until", "best"), [(0, 0.7, 7), (2, 0.7, 9), (2, 1.0, None)])
def test_the_best_of_adalora_is_within_its_budget(skipped, until, best, base, tmp_path, monkeypatch, capsys):
    """Though every evaluation is worse than the one before: those before pruning has ended decide nothing.

    Pruning counts updates, without those that were skipped. One that so never ends is told of.
    """
    worse = iter(range(100, 0, -1))
    real = loop.evaluate

    def evaluate(*args):
        found = real(*args)
        return replace(found, metrics=found.metrics | {"accuracy": float(next(worse))})

    monkeypatch.setattr(loop, "evaluate", evaluate)
    config = on(of_method(config_of("text", tmp_path, steps=10, early_stopping=2), "adalora"), base("text"))
    config = replace(config, evaluation=replace(config.evaluation, every_steps=1))
    config = replace(config, peft=replace(config.peft, prune_until=until))
    if skipped:
        with pytest.raises(loop.Stopped):
            loop.train(config, tmp_path / "run", devices=jax.devices()[ONE], stop_at=2)
        with monkeypatch.context() as patch:
            poison(patch, SequenceClassification, lambda mark: mark >= 0, "nan")
            with pytest.raises(loop.Stopped):
                loop.train(config, tmp_path / "run", devices=jax.devices()[ONE], stop_at=2 + skipped)
    result = loop.train(config, tmp_path / "run", devices=jax.devices()[ONE])
    said = "peft.method adalora prunes until update 10, and 2 of 10 were skipped: more than its budget may be left"
    assert (said in capsys.readouterr().err) == (best is None)
    assert (result["best_step"], result["steps"]) == (best or 10, 9 if best == 7 else 10)
    _, weights = open_model(str(tmp_path / "run"))
    layers = layers_of(weights)
    if best is not None:
        assert sum(np.count_nonzero(weights[f"{layer}/lora_e"]) for layer in layers) == 2 * len(layers)
    export(tmp_path / "run", tmp_path / "adapter", adapter=True)
    fields = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (fields["tinit"], fields["tfinal"], fields["total_step"]) == (1, 10 - round(10 * until), 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alora_invocation_tokens": [5]}, r"alora_invocation_tokens \[5\] is not supported, only null"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights 'lora_ga' changes the base model too"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out true is not supported, only false"),
        ({"peft_type": "OFT"}, "peft_type 'OFT' is not among LORA, ADALORA, IA3"),
        ({"rank_pattern": {"query": 2}}, 'rank_pattern {"query": 2} is not supported, only {}'),
        ({"base_model_name_or_path": None}, "does not name its model; set base_model_name_or_path"),
        ({"r": "eight"}, "r 'eight' is not a number such as 8"),
        ({"lora_alpha": None}, "lora_alpha None is not a number such as 8"),
        ({"bias": "all"}, 'bias "all" is not supported, only "none"'),
        ({"r": 0}, "r 0 is not a number such as 8"),
    ],
)
def test_an_adapter_that_cannot_be_opened_is_said(change, message, runs, tmp_path):
    export(runs("text", "lora"), tmp_path / "adapter", adapter=True)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        open_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize("value", [np.float32(1), np.zeros((0, 16), np.float32)], ids=["a number", "no rows"])
def test_an_adapter_without_vectors_is_said(value, runs, tmp_path):
    export(runs("text", "prompt"), tmp_path / "adapter", adapter=True)
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({**load_file(file), "prompt_embeddings": np.asarray(value)}, file)
    with pytest.raises(
        UserError, match=rf"prompt_embeddings is {re.escape(str(list(np.shape(value))))}, which holds"
    ):
        open_model(str(tmp_path / "adapter"))


def test_an_adapter_for_another_model_is_said(runs, tmp_path):
    wide = config_of("text", tmp_path, steps=1)
    wide = replace(wide, model=replace(wide.model, hf_config={**tiny.FIELDS, "hidden_size": 32}))
    loop.train(wide, tmp_path / "run", devices=jax.devices()[ONE])
    export(tmp_path / "run", tmp_path / "other")
    export(runs("text", "lora"), tmp_path / "adapter", adapter=True)
    for name in ("adapter_config.json", "config.json"):
        file = tmp_path / "adapter" / name
        fields = json.loads(file.read_text())
        fields |= (
            {"base_model_name_or_path": str(tmp_path / "other")}
            if "peft_type" in fields
            else {"hidden_size": 32}
        )
        file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"is an adapter for another model than .*other: .* must be \[32"):
        open_model(str(tmp_path / "adapter"))


def test_an_adapter_for_a_model_of_other_weights_is_said(runs, base, tmp_path):
    """The same sizes, one number changed; the model itself by another name is the model."""
    for name in ("same", "other"):
        shutil.copytree(base("text"), tmp_path / name)
    weights = load_file(tmp_path / "other/model.safetensors")
    weights["bert.embeddings.word_embeddings.weight"][3, 5] += 1.0
    save_file(weights, tmp_path / "other/model.safetensors", metadata={"format": "pt"})
    export(runs("text", "lora"), tmp_path / "adapter", adapter=True)
    adapters = {"a": str(tmp_path / "adapter")}
    assert list(open_adapters(str(tmp_path / "same"), adapters)) == ["a"]
    trained_on = re.escape(str(base("text")))
    with pytest.raises(UserError, match=rf"another model than .*other: it was trained on {trained_on}"):
        open_adapters(str(tmp_path / "other"), adapters)


def test_an_adapter_for_another_kind_of_model_is_said(runs, base, tmp_path):
    export(runs("image", "lora"), tmp_path / "adapter", adapter=True)
    file = tmp_path / "adapter/adapter_config.json"
    fields = json.loads(file.read_text()) | {"base_model_name_or_path": str(base("text"))}
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"a bert model has no place for the tensor .* another kind of model"):
        open_model(str(tmp_path / "adapter"))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("text", {"peft": {"method": "lora", "rank": 17}}, "peft.rank 17 is over 16, the smaller side of bert/encoder/layer/0/attention/self/query; lower it"),
        ("text", {"peft": {"method": "lora", "targets": ["qery"]}}, "peft.targets: regex 'qery' matches no layer; the nearest are"),
        ("text", {"model": {"train": "head"}, "optim": {"layer_decay": 0.8}}, "optim.layer-decay 0.8 is for layers below the head, and all 2 tensors that are trained, such as classifier/bias, stand at its depth"),
        ("text", {"model": {"train": "head"}, "optim": {"unfreeze_every": 5}}, "optim.unfreeze-every 5 is for layers below the head"),
        ("text", {"model": {"frozen_dtype": "bfloat16"}}, "model.frozen-dtype bfloat16 is for frozen matrices, and all are trained"),
        ("text", {"model": {"frozen_dtype": "bfloat16", "freeze": ["LayerNorm"]}}, "model.frozen-dtype bfloat16 is for frozen matrices, and all are trained"),
        ("text", {"peft": {"method": "adalora"}, "model": {"freeze": ["layer/0/.*lora_e"]}}, "model.freeze freezes lora_e of bert/encoder/layer/0/attention/output/dense and not lora_a and lora_b, which peft.method adalora prunes together"),
        ("text", {"peft": {"method": "lora"}, "model": {"freeze": ["layer/1/.*lora_b"]}}, "model.freeze freezes lora_b of bert/encoder/layer/1/attention/self/query, which starts at zero, so that peft.method lora would learn nothing there; freeze lora_a instead, or both"),
        ("text", {"peft": {"method": "bottleneck", "width": 4}, "model": {"freeze": ["adapter_up$"]}}, "model.freeze freezes adapter_up of bert/encoder/layer/0/output, which starts at zero"),
        ("text", {"peft": {"method": "adalora"}, "optim": {"unfreeze_every": 3}}, "peft.method adalora and optim.unfreeze-every 3 exclude each other"),
        ("text", {"peft": {"method": "prefix"}, "optim": {"layer_decay": 0.8}}, "optim.layer-decay 0.8 is for layers below the head, and all 3 tensors that are trained, such as "),
        ("text", {"peft": {"method": "prefix"}, "optim": {"unfreeze_every": 2}}, "optim.unfreeze-every 2 is for layers below the head"),
        ("text", {"peft": {"method": "prefix"}, "model": {"attention": "splash", "hf_config": {**tiny.FIELDS, "attention_probs_dropout_prob": 0.0}}}, "model.attention splash has no place for the keys of peft.method prefix; take auto"),
        ("text", {"peft": {"method": "prompt"}, "model": {"train": "norm"}}, "peft.method prompt and model.train norm exclude each other"),
        ("text", {"peft": {"method": "ia3", "feedforward": ["nonsense"]}}, "peft.feedforward: regex 'nonsense' matches no layer that peft.targets names"),
        ("text", {"peft": {"method": "ia3", "feedforward": ["("]}}, "peft.feedforward: regex '('"),
        ("text", {"peft": {"method": "ia3", "targets": ["key"], "feedforward": ["layer/0/.*key"]}, "model": {"scan_layers": True}}, "model.scan-layers needs layers that are alike"),
        ("text", {"peft": {"method": "adalora", "prune_from": 0.99, "prune_until": 1.0}}, "peft.prune-from 0.99 prunes from update 8 on, of 8 in all"),
        ("image", {"peft": {"method": "ia3"}, "model": {"batch_norm": "frozen"}}, "peft.method ia3 is not for family resnet; it has lora, adalora, bottleneck"),
        ("image", {"peft": {"method": "lora"}}, "peft.method lora leaves the running averages to the adapter's model; set model.batch-norm frozen"),
        ("text", {"peft": {"method": "lora", "targets": ["layer/1/.*query$"]}, "model": {"scan_layers": True}}, "model.scan-layers needs layers that are alike"),
        ("text", {"peft": {"method": "ia3", "rank": 4}}, "peft.rank 4 is for lora and adalora, peft.method is ia3; leave one of them out"),
        ("text", {"peft": {"method": "lora", "feedforward": ["output"]}}, "peft.feedforward output is for ia3, peft.method is lora"),
        ("text", {"peft": {"method": "adalora", "target_rank": 9}}, "peft.target-rank 9 is over peft.rank 8, from which it falls; lower it"),
        ("text", {"peft": {"method": "adalora", "prune_until": 0.1}}, "peft.prune-until 0.1 must be over peft.prune-from 0.1"),
        ("text", {"peft": {"method": "adalora"}, "methods": {"ema": 0.9}}, "peft.method adalora and methods.ema exclude each other"),
        ("text", {"peft": {"method": "bottleneck", "width": 17}}, "peft.width 17 is over 16, the width of bert/encoder/layer/0/output; lower it"),
        ("text", {"peft": {"method": "prompt", "virtual_tokens": 33}}, "data.max-length 32 with peft.virtual-tokens 33 is over the model's 64 positions; lower it"),
        ("image", {"peft": {"method": "prefix"}, "model": {"batch_norm": "frozen"}}, "peft.method prefix is not for family resnet; it has lora"),
        ("text", {"peft": {"rank": 4}}, "peft.method is none, other fields of peft are set"),
        ("text", {"peft": {"method": "ia3"}, "model": {"train": "head"}}, "model.train head would leave peft.method ia3 untrained"),
        ("text", {"peft": {"method": "ia3"}, "model": {"reinit_layers": 1}}, "model.reinit-layers 1 and peft.method ia3 exclude each other"),
        ("text", {"model": {"train": "bias", "reinit_layers": 1}}, "model.reinit-layers 1 and model.train bias exclude each other"),
        ("text", {"peft": {"method": "lora", "dropout": 1.0}}, "peft.dropout is 1.0, must be from 0 to 0.999"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(kind, change, message, tmp_path, capsys):
    assert tiny.train_with(config_of(kind, tmp_path), change, tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_factors_of_ia3_keep_their_own_precision_and_do_not_decay():
    """Around 1 bfloat16 has steps of 0.8 %; neutral is 1, not 0."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(3, 8)).astype(np.float32), rng.normal(size=(8, 4)).astype(np.float32)
    base = Linear(8, 4, nnx.initializers.zeros, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    base.kernel[...] = jnp.asarray(kernel)
    plain = np.asarray(base(jnp.asarray(x)), np.float32)
    layer = Ia3Linear(base, scales_input=False)
    factor = np.array([1.001, 1.003, 1.005, 0.99], np.float32)
    layer.ia3[...] = jnp.asarray(factor)
    expected = np.asarray(jnp.asarray(plain * factor).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(np.asarray(layer(jnp.asarray(x)), np.float32), expected)
    paths = ["bert/x/ia3", "bert/x/lora_a", "bert/x/adapter_up_bias"]
    assert list(lookup(install.DECAY, paths, "weight decay").values()) == [False, True, False]


def test_an_adapter_needs_one(tmp_path):
    config = config_of("text", tmp_path, steps=1)
    loop.train(config, tmp_path / "plain", devices=jax.devices()[ONE])
    with pytest.raises(UserError, match=r"has no adapter: its peft.method is none; export without --adapter"):
        export(tmp_path / "plain", tmp_path / "out", adapter=True)
    loop.train(of_method(config, "lora"), tmp_path / "random", devices=jax.devices()[ONE])
    with pytest.raises(UserError, match="began with random weights"):
        export(tmp_path / "random", tmp_path / "out", adapter=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "layers"), [("text", 1), ("image", 1)])
def test_last_layers_start_anew(kind, layers, base, tmp_path):
    """The weights of a model that never saw the checkpoint, there and in the pooler; the checkpoint's everywhere else."""
    config = on(config_of(kind, tmp_path), base(kind))
    one = jax.devices()[ONE]
    loaded = first_state(prepare(config, one)).weights
    anew = replace(config, model=replace(config.model, reinit_layers=layers))
    setup = prepare(anew, one)
    assert "start from random weights" in setup.note
    random = first_state(replace(setup, loaded={})).weights
    last = ("bert/encoder/layer/1/", "bert/pooler/") if kind == "text" else ("resnet/encoder/stages/1/",)
    for path, value in first_state(setup).weights.items():
        expected = random if path.startswith(last) else loaded
        np.testing.assert_array_equal(value, expected[path], path)
    with pytest.raises(UserError, match=r"model.reinit-layers is 3, the model has 2; lower it"):
        prepare(replace(config, model=replace(config.model, reinit_layers=3)), one)
    still = replace(anew.model, freeze=(f"{last[0]}.*kernel",))
    with pytest.raises(
        UserError,
        match=rf"reinit-layers 1 and model.freeze exclude .* such as {last[0]}.*kernel, would start",
    ):
        prepare(replace(config, model=still), one)
    prepare(replace(config, model=replace(still, freeze=("embedder|embeddings",))), one)
    tiny.assert_resumes(replace(anew, train=replace(anew.train, steps=4)), tmp_path)


def test_frozen_matrices_may_be_bfloat16(base, tmp_path):
    """A run whose frozen matrices were rounded beforehand takes the same updates, from half the bytes."""
    config = on(of_method(config_of("text", tmp_path, steps=4), "lora"), base("text"))
    one = jax.devices()[ONE]
    half = replace(config, model=replace(config.model, frozen_dtype="bfloat16"))
    loop.train(half, tmp_path / "whole", devices=one)
    with pytest.raises(loop.Stopped):
        loop.train(half, tmp_path / "parts", devices=one, stop_at=2)
    loop.train(half, tmp_path / "parts", devices=one)
    whole = saved(tmp_path / "whole")
    assert_same_bits(whole, saved(tmp_path / "parts"))
    for path, value in whole[1]["weights"].items():
        is_frozen_matrix = value.ndim > 1 and not is_added(path) and not path.startswith("classifier/")
        assert (value.dtype == jnp.bfloat16) == is_frozen_matrix, path

    setup = prepare(config, one)
    for path, value in setup.loaded.items():
        if value.ndim > 1 and not path.startswith("classifier/"):
            setup.loaded[path] = np.asarray(jnp.asarray(value).astype(jnp.bfloat16).astype(jnp.float32))
    state = first_state(setup)
    step = make_train_step(setup.job.task, setup.job.parts, setup.updates, 1)
    with jax.numpy_dtype_promotion("standard"):
        for number in range(4):
            state = jax.jit(step)(state, setup.batches[number])[0]
    for path, value in state.params.items():
        np.testing.assert_allclose(whole[1]["weights"][path], value, atol=1e-6, err_msg=path)
    assert export(tmp_path / "whole", tmp_path / "hf", verify=True) <= 1e-5
