"""LoRA and (IA)3: their papers' equations, nothing changed at the start, resume, merging, and Hugging Face's peft both ways."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from finetune_jax import train as loop
from finetune_jax.config import PeftConfig
from finetune_jax.errors import UserError
from finetune_jax.export import export
from finetune_jax.job import open_model
from finetune_jax.models.layers import Conv, Linear
from finetune_jax.peft.ia3 import Ia3Linear
from finetune_jax.peft.install import is_added, merged
from finetune_jax.peft.lora import LoraConv, LoraLinear
from finetune_jax.predict import predict
from finetune_jax.step import make_forward
from tests import tiny
from tests.tiny import assert_same_bits, config_of, saved

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of peft's own imports
    import peft

replace = dataclasses.replace
ONE = slice(0, 1)
METHODS = {
    "lora": PeftConfig("lora", rank=4, alpha=8.0),
    "rslora, everywhere, dropout": PeftConfig(
        "lora", (r"dense$|self/",), rank=4, alpha=8.0, rslora=True, dropout=0.3
    ),
    "one layer": PeftConfig("lora", (r"layer/1/.*query$",), rank=2, alpha=4.0),
    "ia3": PeftConfig("ia3"),
}
AUTO = {"text": AutoModelForSequenceClassification, "token": AutoModelForTokenClassification}
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft asks transformers
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


def of_method(config, name):
    model = replace(config.model, batch_norm="frozen") if config.model.family == "resnet" else config.model
    return replace(config, model=model, peft=METHODS[name])


CASES = [("text", name) for name in METHODS] + [("token", "lora"), ("image", "lora")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_at_the_start_the_model_is_the_base(kind, name, tmp_path):
    """The bits of the logits, and the weights that the run would have begun with."""
    logits, weights = [], []
    for config in (config_of(kind, tmp_path), of_method(config_of(kind, tmp_path), name)):
        setup = loop.prepare(config, jax.devices()[ONE])
        state = loop.first_state(setup)
        batch = setup.batches[0]
        logits.append(jax.jit(make_forward(setup.job.task, setup.job.parts))(state.weights, batch)[0])
        weights.append({path: value for path, value in state.weights.items() if not is_added(path)})
    np.testing.assert_array_equal(*logits)
    assert_same_bits(*weights)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_only_the_method_and_the_head_learn_and_a_stopped_run_goes_on(kind, name, tmp_path):
    config = of_method(config_of(kind, tmp_path, steps=6), name)
    setup = loop.prepare(config, jax.devices()[ONE])
    start = loop.first_state(setup).weights
    loop.train(config, tmp_path / "whole", devices=jax.devices()[ONE])
    with pytest.raises(loop.Stopped):
        loop.train(config, tmp_path / "parts", devices=jax.devices()[ONE], stop_at=3)
    loop.train(config, tmp_path / "parts", devices=jax.devices()[ONE])
    whole = saved(tmp_path / "whole")
    assert_same_bits(whole, saved(tmp_path / "parts"))
    for path, value in whole[1]["weights"].items():
        moved = np.asarray(value).tobytes() != np.asarray(start[path]).tobytes()
        assert moved == (is_added(path) or path.startswith("classifier/")), path
    moments = {str(path) for path, _ in jax.tree.flatten_with_path(whole[1]["training"]["opt_state"])[0]}
    assert not any(path.endswith("kernel']") and "classifier" not in path for path in moments)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Kind -> a Hugging Face folder of a tiny model, trained a little."""
    made = {}

    def folder_of(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"base-{kind}")
            loop.train(config_of(kind, folder, steps=2), folder / "run", devices=jax.devices()[ONE])
            export(folder / "run", folder / "hf")
            made[kind] = folder / "hf"
        return made[kind]

    return folder_of


def on(config, folder):
    """The same from a checkpoint."""
    return replace(config, model=replace(config.model, pretrained=str(folder), hf_config={}, tokenizer=None))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base):
    """(kind, name) -> run folder of a short training on the base."""
    made = {}

    def run_of(kind, name):
        if (kind, name) not in made:
            folder = tmp_path_factory.mktemp("run")
            config = on(of_method(config_of(kind, folder, steps=5), name), base(kind))
            loop.train(config, folder / "run", devices=jax.devices()[ONE])
            made[kind, name] = folder / "run"
        return made[kind, name]

    return run_of


def inputs(kind, tmp_path):
    if kind == "image":
        return [{"image": str(file)} for file in tiny.pictures(tmp_path, 3)]
    sentences = tiny.sentences(7, 3)
    return [{"tokens": s} if kind == "token" else {"text": " ".join(s)} for s in sentences]


def logits_of(model, rows):
    return [np.asarray(row["logits"]) for row in predict(*open_model(str(model)), rows, logits=True)]


@pytest.mark.parametrize(("kind", "name"), CASES)
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


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_adapter_gives_the_logits_of_the_run(kind, name, runs, tmp_path):
    run = runs(kind, name)
    assert export(run, tmp_path / "adapter", verify=True, adapter=True) == 0.0
    assert not (tmp_path / "adapter/model.safetensors").exists()
    rows = inputs(kind, tmp_path)
    for ours, theirs in zip(logits_of(run, rows), logits_of(tmp_path / "adapter", rows), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def their_logits(model, folder, kind, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        text = row.get("text", row.get("tokens"))
        encoded = tokenizer(text, return_tensors="pt", is_split_into_words=kind == "token")
        with torch.no_grad():
            made = model(**encoded).logits[0].numpy()
        found.append(made[1:-1] if kind == "token" else made)
    return found


@pytest.mark.parametrize(("kind", "name"), [case for case in CASES if case[0] != "image"])
def test_peft_opens_what_we_write(kind, name, runs, base, tmp_path):
    run = runs(kind, name)
    export(run, tmp_path / "adapter", adapter=True)
    model = AUTO[kind].from_pretrained(base(kind))
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
    ],
    ids=["rslora", "lora", "ia3"],
)
def test_we_open_what_peft_writes(kind, config, base, tmp_path):
    torch.manual_seed(0)
    task = "SEQ_CLS" if kind == "text" else "TOKEN_CLS"
    model = peft.get_peft_model(AUTO[kind].from_pretrained(base(kind)), config(task)).eval()
    for name, value in model.named_parameters():
        if "ia3" in name or "modules_to_save" in name:
            torch.nn.init.normal_(value, 1.0, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    rows = inputs(kind, tmp_path)
    theirs = their_logits(model, base(kind), kind, rows)
    for ours, other in zip(logits_of(tmp_path / "adapter", rows), theirs, strict=True):
        np.testing.assert_allclose(ours, other, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora true is not supported, only false"),
        ({"peft_type": "OFT"}, "peft_type 'OFT' is not among LORA, IA3"),
        ({"base_model_name_or_path": None}, "does not name its model; set base_model_name_or_path"),
        ({"r": "eight"}, "r 'eight' is not a number such as 8"),
        ({"lora_alpha": None}, "lora_alpha None is not a number such as 8"),
        ({"bias": "all"}, 'bias "all" is not supported, only "none"'),
    ],
)
def test_an_adapter_that_cannot_be_opened_is_said(change, message, runs, tmp_path):
    export(runs("text", "lora"), tmp_path / "adapter", adapter=True)
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
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


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("text", {"peft": {"method": "lora", "rank": 17}}, "peft.rank 17 is over 16, the smaller side of bert/encoder/layer/0/attention/self/query; lower it"),
        ("text", {"peft": {"method": "lora", "targets": ["qery"]}}, "peft.targets: regex 'qery' matches no layer; the nearest are"),
        ("image", {"peft": {"method": "ia3"}, "model": {"batch_norm": "frozen"}}, "peft.method ia3 is not for family resnet; it has lora"),
        ("image", {"peft": {"method": "lora"}}, "peft.method lora leaves the running averages to the adapter's model; set model.batch-norm frozen"),
        ("text", {"peft": {"method": "lora", "targets": ["layer/1/.*query$"]}, "model": {"scan_layers": True}}, "model.scan-layers needs layers that are alike"),
        ("text", {"peft": {"method": "ia3", "rank": 4}}, "peft.method is ia3, which has no rank"),
        ("text", {"peft": {"method": "lora", "feedforward": ["output"]}}, "peft.feedforward is for ia3, peft.method is lora"),
        ("text", {"peft": {"rank": 4}}, "peft.method is none, other fields of peft are set"),
        ("text", {"peft": {"method": "ia3"}, "model": {"train": "head"}}, "model.train head would leave peft.method ia3 untrained"),
        ("text", {"peft": {"method": "lora", "dropout": 1.0}}, "peft.dropout is 1.0, must be from 0 to 0.999"),
    ],
)  # fmt: skip
def test_wrong_choices_are_one_line(kind, change, message, tmp_path, capsys):
    assert tiny.train_with(config_of(kind, tmp_path), change, tmp_path) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
    loaded = loop.first_state(loop.prepare(config, one)).weights
    anew = replace(config, model=replace(config.model, reinit_layers=layers))
    setup = loop.prepare(anew, one)
    assert "start from random weights" in setup.note
    random = loop.first_state(replace(setup, loaded={})).weights
    last = ("bert/encoder/layer/1/", "bert/pooler/") if kind == "text" else ("resnet/encoder/stages/1/",)
    for path, value in loop.first_state(setup).weights.items():
        expected = random if path.startswith(last) else loaded
        np.testing.assert_array_equal(value, expected[path], path)
    with pytest.raises(UserError, match=r"model.reinit-layers is 3, the model has 2; lower it"):
        loop.prepare(replace(config, model=replace(config.model, reinit_layers=3)), one)
