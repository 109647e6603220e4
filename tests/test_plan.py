"""finetune-jax plan: the figures against formulas and the compilers' own, and what it says of bad input."""

import dataclasses
import importlib.util
import json
import math
import re

import jax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from finetune_jax import cli, plan, plan_report, targets
from finetune_jax.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ImageConfig,
    MeshConfig,
    MethodsConfig,
    ModelConfig,
    OptimConfig,
    PeftConfig,
    TaskConfig,
    TrainConfig,
    from_dict,
)
from finetune_jax.errors import UserError
from finetune_jax.models import bert, resnet
from finetune_jax.models.layers import Product
from finetune_jax.prepare import prepare
from tests import tiny

WORK = plan.Workload(1000, 32, 3)
BERT = {"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "vocab_size": 512,
        "max_position_embeddings": 64}  # fmt: skip
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}


def recipe(family="bert", batch=16, dtype="float32", mesh=MeshConfig(smallest_split=0), train=None, **model):  # noqa: B008
    return Config(
        task=TaskConfig(name="sequence_classification" if family == "bert" else "image_classification"),
        model=ModelConfig(
            family=family, hf_config=BERT if family == "bert" else RESNET, dtype=dtype, **model
        ),
        data=DataConfig(image=ImageConfig(size=16))
        if family == "resnet"
        else DataConfig(batching="padded", max_length=32),
        train=train or TrainConfig(batch_size=batch),
        mesh=mesh,
    )


@pytest.fixture
def here(monkeypatch):
    """The CPU's compiler in place of the others, and eight devices in place of a target's."""
    monkeypatch.setattr(plan, "devices_of", lambda target: jax.devices()[: target.chips])
    monkeypatch.setattr(plan, "compiler_version", lambda target: "this machine")


def of(config, target="v5e:2x4", **options):
    ((estimate, tried),) = plan.plan(config, [target], workload=WORK, **options)
    return estimate, tried


# ---------------------------------------------------------------------------------------------------------------------
# Collectives are the theory's
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_data_parallel_sends_the_gradient_once(here, family):
    estimate, _ = of(recipe(family))
    gradient = estimate.memory.parameters if family == "bert" else estimate.donated / 3
    assert {(c.kind, c.axes) for c in estimate.program.collectives} == {("all-reduce", "data")}
    (reduced,) = estimate.program.collectives
    assert gradient <= reduced.bytes < 1.06 * gradient  # BatchNorm's sums, the loss and its weight besides


def test_per_replica_batch_norm_sends_no_statistics(here):
    whole, _ = of(recipe("resnet"))
    replica, _ = of(recipe("resnet", batch_norm_groups=8))
    layers = 1 + 2 * 2 + 2
    assert whole.program.collectives[0].count >= 2 * layers
    assert replica.program.collectives[0].count < layers


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_fsdp_gathers_parameters_and_reduces_gradients_only(here, family):
    estimate, _ = of(recipe(family, mesh=MeshConfig(data=1, fsdp=8, smallest_split=0)))
    whole, _ = of(recipe(family))
    kinds = {c.kind: c.bytes for c in estimate.program.collectives}
    gradient = whole.program.collectives[0].bytes
    # Of a table with few looked up rows the rows may move instead of the table, which is less.
    assert kinds.pop("all-to-all", 0) < 0.1 * gradient
    assert set(kinds) <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert 0.8 * gradient < kinds["all-gather"] < 2.1 * gradient, "forward and backward may each gather"
    assert 0.8 * gradient < kinds.get("all-reduce", 0) + kinds.get("reduce-scatter", 0) < 1.05 * gradient
    for part in ("parameters", "optimizer"):
        # An eighth, and the vectors of BatchNorm and the like, which are copied.
        assert getattr(estimate.memory, part) < 1.15 * getattr(whole.memory, part) / 8


def test_without_the_constraint_fsdp_moves_activations(here, monkeypatch):
    """The test above can fail: it is the constraint that holds it."""
    monkeypatch.setattr("finetune_jax.job.split_rows", lambda mesh: lambda x: x)
    estimate, _ = of(recipe(mesh=MeshConfig(data=1, fsdp=8, smallest_split=0)))
    whole, _ = of(recipe())
    assert sum(c.bytes for c in estimate.program.collectives) > 3 * whole.program.collectives[0].bytes


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_flops_of_bert_are_the_formula(here, scan):
    estimate, _ = of(recipe(scan_layers=scan))
    assert estimate.program.flops == pytest.approx(estimate.minimum_flops, rel=0.005)
    tokens, width = 16 * 32 / 8, 128
    layer = 2 * tokens * (4 * width**2 + 2 * width * 512) + 4 * tokens * 32 * width
    head = 2 * 2 * width * (width + 3)
    assert estimate.minimum_flops == 3 * (2 * layer + head)


def test_remat_costs_a_forward_pass(here):
    plain, _ = of(recipe())
    again, _ = of(recipe(remat="full"))
    assert 1.2 < again.program.flops / plain.program.flops < 4 / 3 + 0.01


def test_flops_of_resnet_are_the_formula(here):
    """On maps of more than four pixels; smaller ones are one product, padding included."""
    large = dataclasses.replace(recipe("resnet"), data=DataConfig(image=ImageConfig(size=64)))
    estimate, _ = of(large)
    assert estimate.program.flops == pytest.approx(estimate.minimum_flops, rel=0.03)


def test_minimum_of_frozen_parts():
    """Two dense layers side by side, their product with each other, and two more, of which the last reads the first's too."""
    products = [
        Product("words", 0.0, (), "words/"),
        Product("query", 1.0, ("words",), "query/"),
        Product("key", 10.0, ("words",), "key/"),
        Product("scores", 100.0, ("query", "key"), "prefix/"),
        Product.dense("b/dense", 1000.0, "scores"),
        Product("sum", 0.0, ("query", "b/dense")),
        Product.dense("head", 10000.0, "sum"),
    ]
    everything = {f"{name}/kernel" for name in ("words", "query", "key", "b/dense", "head")}
    assert plan.minimum_flops(products, everything) == 33333
    assert plan.minimum_flops(products, {"head/kernel"}) == 21111
    assert plan.minimum_flops(products, {"b/dense/kernel", "head/kernel"}) == 32111
    assert plan.minimum_flops(products, {"b/LayerNorm/scale"}) == 21111
    assert plan.minimum_flops(products, {"query/lora_a"}) == 22211, (
        "key is a neighbour, its input is nobody's"
    )
    assert plan.minimum_flops(products, {"query/kernel"}) == 22212
    assert plan.minimum_flops(products, {"query/bias", "key/bias"}) == 22311
    assert plan.minimum_flops(products, {"prefix/prefix"}) == 22111


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "bottleneck"])
def test_what_is_computed_is_no_less_than_the_minimum_of_what_is_trained(here, method):
    """And no more than what the method itself and XLA's choice of what to compute again take."""
    estimate, _ = of(dataclasses.replace(recipe(), peft=PeftConfig(method=method)))
    head, _ = of(dataclasses.replace(recipe(), model=dataclasses.replace(recipe().model, train="head")))
    assert head.minimum_flops < 0.7 * estimate.minimum_flops
    assert 1 <= estimate.program.flops / estimate.minimum_flops < 1.35


def test_an_evaluation_needs_its_own_memory_and_what_training_goes_on_with(here):
    """Optimizer and, beside the averages, the parameters."""
    evaluated = dataclasses.replace(recipe(), evaluation=EvaluationConfig(batch_size=512))
    plain, _ = of(dataclasses.replace(evaluated, optim=OptimConfig(name="sgd", momentum=0.0)))
    adam, _ = of(evaluated)
    averaged, _ = of(dataclasses.replace(evaluated, methods=MethodsConfig(ema=0.9)))
    assert plain.peak == plain.evaluation > plain.memory.peak
    assert adam.evaluation - plain.evaluation == adam.memory.optimizer - plain.memory.optimizer
    weights = adam.memory.parameters
    assert averaged.evaluation - adam.evaluation == averaged.memory.parameters - weights > 0.9 * weights


def test_frozen_matrices_are_evaluated_as_training_keeps_them(here, monkeypatch):
    seen = {}
    lower = plan.lower_forward
    monkeypatch.setattr(
        plan,
        "lower_forward",
        lambda step, weights, *rest: seen.update(weights) or lower(step, weights, *rest),
    )
    model = dataclasses.replace(recipe().model, frozen_dtype="bfloat16")
    of(dataclasses.replace(recipe(), peft=PeftConfig(method="lora"), model=model))
    dense = "bert/encoder/layer/0/attention/self/query"
    assert (seen[f"{dense}/kernel"].dtype, seen[f"{dense}/lora_a"].dtype) == ("bfloat16", "float32")


@pytest.mark.parametrize("family", ["bert", "resnet"])
def test_products_name_every_kernel(family):
    if family == "bert":
        config = bert.BertConfig(**BERT)
        model = bert.BertForSequenceClassification
        found = bert.products(config, 3, 4, 32, 4)
    else:
        config = resnet.ResNetConfig(
            **{name: tuple(v) if isinstance(v, list) else v for name, v in RESNET.items()}
        )
        model = resnet.ResNetForImageClassification
        found = resnet.products(config, 3, 4, 16)
    state = nnx.state(nnx.eval_shape(lambda: model(config, 3, rngs=nnx.Rngs(0))))
    kernels = {"/".join(map(str, path[:-1])) for path, _ in nnx.to_flat_state(state) if path[-1] == "kernel"}
    named = {product.name for product in found if product.flops}
    assert kernels <= named
    assert all(name.endswith(("/scores", "/mixed")) for name in named - kernels)


# ---------------------------------------------------------------------------------------------------------------------
# Memory, batch, report
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 2, 7, 50, 999, 100_000])
@pytest.mark.parametrize("start", [1, 64, 5000])
def test_largest_without(limit, start):
    calls = []

    def over(number):
        calls.append(number)
        return (number - limit - 0.5) * 3.7e6

    found = plan.largest_without(over, start)
    assert limit * (1 - plan.CLOSE) - 1 <= found <= limit
    assert len(calls) < 10
    assert len(set(calls)) == len(calls)
    assert plan.largest_without(lambda number: number, start) == 0


@pytest.mark.parametrize(
    ("message", "over"),
    [
        ("Used 27.41G of 15.75G hbm. Exceeded hbm capacity by 11.66G.", 11.66),
        ("the total memory required for HLO temporaries (198.91G) exceeds available HBM (15.75G).", 183.16),
    ],
)
def test_out_of_memory_in_the_compilers_words(message, over):
    assert plan.out_of_memory(f"RESOURCE_EXHAUSTED: {message}")["missing"] == pytest.approx(
        over * 2**30, abs=2
    )
    with pytest.raises(UserError, match="refuses the step: INTERNAL"):
        plan.out_of_memory("INTERNAL: something else")


def small(kind, memory):
    return {**targets.MACHINES, kind: dataclasses.replace(targets.MACHINES[kind], memory=memory)}


def test_what_does_not_fit_is_said_and_what_helps_is_tried(here, monkeypatch, capsys, tmp_path):
    estimate, _ = of(recipe(batch=64), "v5e:1x1")
    monkeypatch.setattr(targets, "MACHINES", small("v5e", estimate.memory.peak - 1000))
    again, tried = of(recipe(batch=64), "v5e:1x1")
    assert again.over == 1000
    assert not again.fits
    assert next(words for words, _ in tried) == "--model.dtype bfloat16"
    assert tried[-1][1].fits
    text = plan_report.report(again, tried)
    assert "no: train step 1 kB (1,000 bytes) over" in text
    assert re.search(r"tried +--model.dtype bfloat16", text)
    words = ["plan", "--target", "v5e:1x1", "--examples", "1000", "--tokens", "32", "--labels", "3"]
    words += [
        "--train.batch-size",
        "64",
        "--data.max-length",
        "32",
        "--data.batching",
        "padded",
        "--mesh.smallest-split",
        "0",
    ]
    words += ["--model.hf-config", json.dumps(BERT), "--output", str(tmp_path / "plan.json")]
    monkeypatch.setattr(targets, "prepare_environment", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 3
    assert "1,000 bytes) over" in capsys.readouterr().out
    (figures,) = json.loads((tmp_path / "plan.json").read_text())
    assert figures["over_bytes"] == 1000
    assert not figures["fits"]
    assert figures["tried"]


@pytest.mark.slow
def test_auto_finds_the_largest_batch(here, monkeypatch):
    monkeypatch.setitem(BERT, "num_hidden_layers", 1)
    limit = of(recipe(batch=10), "v5e:1x1")[0].memory.peak
    monkeypatch.setattr(targets, "MACHINES", small("v5e", limit))
    found, tried = of(recipe(batch=10), "v5e:1x1", batch_size="auto")
    assert found.config.train.batch_size == 10
    assert not tried
    monkeypatch.setattr(targets, "MACHINES", small("v5e", 1000))
    with pytest.raises(UserError, match="v5e:1x1: not even a batch of 1 fits"):
        of(recipe(batch=1), "v5e:1x1", batch_size="auto")


def test_what_was_compiled_before_is_read_again(here, monkeypatch):
    first, _ = of(recipe(batch=24))
    monkeypatch.setattr(plan, "read_program", None)
    again, _ = of(recipe(batch=24))
    assert again == first


def test_programs_of_other_devices_are_kept_out_of_the_compile_cache(here, tmp_path):
    """JAX writes a described device's program there and cannot read it again."""
    shared = jax.config.jax_compilation_cache_dir
    compilation_cache.set_cache_dir(str(tmp_path))
    try:
        of(recipe(batch=24), "v5e:1x1")
    finally:
        compilation_cache.set_cache_dir(shared)
        compilation_cache.reset_cache()
    assert not [file.name for file in tmp_path.iterdir() if "step" in file.name]
    assert jax.config.jax_enable_compilation_cache


def test_empty_rows_are_named(here):
    config = dataclasses.replace(recipe(batch=9), data=DataConfig(max_length=64))
    estimate, _ = of(config)
    assert "of them empty: a larger --train.batch-size costs nothing" in plan_report.report(estimate, [])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("v5e", "target v5e is not KIND:TOPOLOGY"),
        ("v9:2x2", "there is no v9, only v3, v4"),
        ("v5e:3x3", "v5e has no topology 3x3, only 1x1, 2x2, 2x4"),
        ("h100:3", "h100 has no topology 3, only 1, 2, 4, 8"),
        ("h100:8:2", "slices are of TPUs"),
        ("v5e:2x2:0", "slices are of TPUs, from 1"),
    ],
)
def test_unknown_targets_name_the_known(target, message):
    with pytest.raises(UserError, match=re.escape(message)):
        targets.parse_target(target)


def test_bad_input_is_one_line(here, monkeypatch):
    with pytest.raises(UserError, match="needs a --target"):
        plan.plan(recipe(), [])
    with pytest.raises(UserError, match="batch-size 12 does not divide by 8"):
        of(recipe(batch=12))
    with pytest.raises(UserError, match="needs 3 devices, there are 8"):
        of(recipe(mesh=MeshConfig(data=3)))
    monkeypatch.undo()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for target, extra in (("v5e:2x2", "plan-tpu"), ("h100:8", "plan-cuda")):
        with pytest.raises(UserError, match=re.escape(f"pip install 'finetune-jax[{extra}]'")):
            of(recipe(), target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"evaluation": {"metric": "nonsense"}},
            "evaluation.metric nonsense is not among this task's metrics",
        ),
        ({"task": {"class_weights": {"yes": 1.0}}}, "missing ['no']"),
        ({"train": {"early_stopping": 2}, "data": {"validation": None}}, "needs a validation split"),
    ],
)
def test_what_training_refuses_is_not_planned(here, change, message, tmp_path):
    config = from_dict(tiny.changed_fields(tiny.config_of("text", tmp_path), change), "here")
    for answer in (lambda: prepare(config, jax.devices()[:1]), lambda: plan.plan(config, ["v5e:1x1"])):
        with pytest.raises(UserError, match=re.escape(message)):
            answer()


def test_texts_as_long_as_rows_have_nobody_to_mix_with(here):
    alone = recipe(train=TrainConfig(batch_size=4, accumulation=4))
    packed = dataclasses.replace(alone, methods=MethodsConfig(mixup=0.2), data=DataConfig(max_length=32))
    with pytest.raises(
        UserError, match=r"4 rows of one text each over train.accumulation 4 leave one in each"
    ):
        of(packed, "v5e:1x1")


def test_chips_devices_and_neighbours():
    sizes = {name: targets.parse_target(name) for name in ("v3:2x2", "v5e:4x4:2", "h100:16", "v4:2x2x4")}
    assert [t.chips for t in sizes.values()] == [4, 32, 16, 16]
    assert [t.neighbours for t in sizes.values()] == [8, 16, 8, 16]
    assert [str(t) for t in sizes.values()] == list(sizes)


def test_state_bytes_are_what_an_estimate_counts(here):
    estimate, _ = of(recipe())
    subject = plan.Subject.open(recipe(), WORK)
    assert estimate.memory.parameters == sum(
        math.prod(leaf.shape) * 4 for leaf in _job(subject).parts.abstract.values()
    )


def _job(subject):
    return plan.make_job(subject.task, "bert", subject.model_config, MeshConfig(), jax.devices()[:1])
