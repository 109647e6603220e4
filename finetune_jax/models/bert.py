"""BERT encoders with a sequence or a token head, on rows that may hold several examples.

Source: Devlin et al. 2018, arXiv:1810.04805; module and parameter names are those of transformers' BertModel.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from finetune_jax.models.layers import (
    ACTIVATIONS,
    FLOAT32,
    Compute,
    Embed,
    LayerNorm,
    Linear,
    Product,
    depth_rate,
    dropout,
    rematerialised,
    softmax,
    surviving,
)

SHARDING: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r".*/(query|key|value|intermediate/dense)/kernel", ("fsdp", "tensor")),
    (r".*/(query|key|value|intermediate/dense)/bias", ("tensor",)),
    (r".*/output/dense/kernel", ("tensor", "fsdp")),
    (r".*_embeddings/embedding", (None, "fsdp")),
    (r".*/pooler/dense/kernel", ("fsdp", None)),
    (r".*/(output|pooler)/dense/bias", ()),
    (r".*/LayerNorm/(scale|bias)", ()),
    (r"classifier/(kernel|bias)", ()),
)
"""Mesh axis of each dimension; () copies. Two matrix products to one sum over "tensor", as Megatron-LM (arXiv:1909.08053)."""

DECAY: tuple[tuple[str, bool], ...] = (
    (r".*/LayerNorm/(scale|bias)", False),
    (r".*/bias", False),
    (r".*/(kernel|embedding)", True),
)
"""Which parameters weight decay pulls at."""

HEAD = r"classifier/(kernel|bias)"
"""Parameters of the task, which another task's checkpoint cannot give."""

STEM, BLOCK = r"bert/embeddings/.*", r"bert/encoder/layer/(\d+)/.*"
"""Parameters before the first layer, and within one; the group is its number."""


_DEPTH = 0x5D
"""Folded into the keys of stochastic depth: dropout goes on with the keys that it has without."""


@dataclass(frozen=True)
class BertConfig:
    """The fields of HF's BertConfig that change the arithmetic, with HF's defaults."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    classifier_dropout: float | None = None
    """Of the head; None takes hidden_dropout_prob."""
    pad_token_id: int | None = 0
    """This row of the word embeddings gets no gradient."""


class Embeddings(nnx.Module):
    """Sum of word, position and token type vectors, normalised."""

    def __init__(self, config: BertConfig, compute: Compute, rngs: nnx.Rngs):
        init, width = nnx.initializers.normal(config.initializer_range), config.hidden_size
        self.split_rows = compute.split_rows
        self.word_embeddings = Embed(
            config.vocab_size, width, init, frozen_row=config.pad_token_id, rngs=rngs
        )
        self.position_embeddings = Embed(config.max_position_embeddings, width, init, rngs=rngs)
        self.token_type_embeddings = Embed(config.type_vocab_size, width, init, rngs=rngs)
        self.LayerNorm = LayerNorm(width, config.layer_norm_eps)

    def __call__(
        self,
        input_ids_BxL: jax.Array,
        token_type_ids_BxL: jax.Array,
        position_ids_BxL: jax.Array,
        offset_BxLxD: jax.Array | None = None,
    ) -> jax.Array:
        words_BxLxD, types_BxLxD, positions_BxLxD = (
            self.split_rows(table(ids_BxL))
            for table, ids_BxL in (
                (self.word_embeddings, input_ids_BxL),
                (self.token_type_embeddings, token_type_ids_BxL),
                (self.position_embeddings, position_ids_BxL),
            )
        )
        if offset_BxLxD is not None:
            words_BxLxD = words_BxLxD + offset_BxLxD
        return self.LayerNorm(words_BxLxD + types_BxLxD + positions_BxLxD)


class SelfAttention(nnx.Module):
    """Multi-head attention; scores and softmax in float32."""

    def __init__(self, config: BertConfig, compute: Compute, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        width, dtype = config.hidden_size, compute.dtype
        self.query = Linear(width, width, init, dtype=dtype, rngs=rngs)
        self.key = Linear(width, width, init, dtype=dtype, rngs=rngs)
        self.value = Linear(width, width, init, dtype=dtype, rngs=rngs)
        self.heads = config.num_attention_heads
        self.dropout_rate = config.attention_probs_dropout_prob
        self.dtype, self.attend = dtype, compute.attend

    def __call__(
        self,
        x_BxLxD: jax.Array,
        segment_ids_BxL: jax.Array,
        key: jax.Array | None,
        prefix_Px2xD: jax.Array | None = None,
    ) -> jax.Array:
        """The prefix holds keys and values that every position sees beside its segment's."""
        B, L, D = x_BxLxD.shape

        def by_head(x_BxLxD: jax.Array) -> jax.Array:
            return x_BxLxD.reshape(B, L, self.heads, D // self.heads).swapaxes(1, 2)

        # Heads beside the batch before the products, not inside them: XLA's CPU backend is three times faster so.
        query_BxNxLxH, key_BxNxLxH = by_head(self.query(x_BxLxD, key)), by_head(self.key(x_BxLxD, key))
        value_BxNxLxH = by_head(self.value(x_BxLxD, key))
        drops = key is not None and self.dropout_rate > 0
        kernel = None if drops or prefix_Px2xD is not None else self.attend
        if kernel is not None and kernel.takes(self.heads, L, D // self.heads, self.dtype):
            mixed_BxNxLxH = kernel(query_BxNxLxH, key_BxNxLxH, value_BxNxLxH, segment_ids_BxL)
            return mixed_BxNxLxH.swapaxes(1, 2).reshape(B, L, D)
        # Padding is a segment too, so that no position is without one to look at: nothing reads what it computes.
        visible_Bx1xLxK = (segment_ids_BxL[:, :, None] == segment_ids_BxL[:, None, :])[:, None]
        key_BxNxKxH, value_BxNxKxH = key_BxNxLxH, value_BxNxLxH
        if prefix_Px2xD is not None:
            P = len(prefix_Px2xD)
            prefix_2xNxPxH = (
                prefix_Px2xD.astype(self.dtype).reshape(P, 2, self.heads, -1).transpose(1, 2, 0, 3)
            )
            before_2xBxNxPxH = jnp.broadcast_to(prefix_2xNxPxH[:, None], (2, B, *prefix_2xNxPxH.shape[1:]))
            key_BxNxKxH = jnp.concatenate([before_2xBxNxPxH[0], key_BxNxLxH], axis=2)
            value_BxNxKxH = jnp.concatenate([before_2xBxNxPxH[1], value_BxNxLxH], axis=2)
            visible_Bx1xLxK = jnp.concatenate([jnp.ones((B, 1, L, P), bool), visible_Bx1xLxK], axis=3)
        scores_BxNxLxK = jnp.einsum(
            "bnqh,bnkh->bnqk", query_BxNxLxH, key_BxNxKxH, preferred_element_type=jnp.float32
        ) * ((D // self.heads) ** -0.5)
        # The lowest float, not -inf: with segments each position sees itself, but no mask may ever give NaN.
        scores_BxNxLxK = jnp.where(visible_Bx1xLxK, scores_BxNxLxK, jnp.finfo(jnp.float32).min)
        weights_BxNxLxK = dropout(softmax(scores_BxNxLxK, self.dtype), self.dropout_rate, key)
        mixed_BxNxLxH = jnp.einsum("bnqk,bnkh->bnqh", weights_BxNxLxK, value_BxNxKxH)
        return mixed_BxNxLxH.swapaxes(1, 2).reshape(B, L, D)


class Output(nnx.Module):
    """Dense, dropout, sum with the residual, LayerNorm: what ends both halves of a layer."""

    def __init__(self, width_in: int, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.dense = Linear(width_in, config.hidden_size, init, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout_rate = config.hidden_dropout_prob

    def __call__(
        self,
        x_BxLxE: jax.Array,
        residual_BxLxD: jax.Array,
        key: jax.Array | None,
        factor_BxLx1: jax.Array | None = None,
    ) -> jax.Array:
        residual_BxLxD = residual_BxLxD.astype(jnp.float32)
        x_BxLxD = self.branch(x_BxLxE, residual_BxLxD, key)
        if factor_BxLx1 is not None:
            x_BxLxD = x_BxLxD * factor_BxLx1
        return self.LayerNorm(x_BxLxD + residual_BxLxD)

    def branch(self, x_BxLxE: jax.Array, residual_BxLxD: jax.Array, key: jax.Array | None) -> jax.Array:
        """What is summed with the residual, float32; methods of peft/ have more of it."""
        del residual_BxLxD
        return dropout(self.dense(x_BxLxE, key), self.dropout_rate, key).astype(jnp.float32)


class Attention(nnx.Module):
    """Self-attention and its output."""

    def __init__(self, config: BertConfig, compute: Compute, rngs: nnx.Rngs):
        self.self = SelfAttention(config, compute, rngs)
        self.output = Output(config.hidden_size, config, compute.dtype, rngs)


class Intermediate(nnx.Module):
    """The widening half of the feed-forward block."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.dense = Linear(config.hidden_size, config.intermediate_size, init, dtype=dtype, rngs=rngs)
        self.hidden_act = config.hidden_act

    def __call__(self, x_BxLxD: jax.Array, key: jax.Array | None) -> jax.Array:
        return ACTIVATIONS[self.hidden_act](self.dense(x_BxLxD, key))


class Layer(nnx.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: BertConfig, compute: Compute, rngs: nnx.Rngs):
        self.attention = Attention(config, compute, rngs)
        self.intermediate = Intermediate(config, compute.dtype, rngs)
        self.output = Output(config.intermediate_size, config, compute.dtype, rngs)
        self.dtype = compute.dtype

    def __call__(
        self,
        x_BxLxD: jax.Array,
        segment_ids_BxL: jax.Array,
        key: jax.Array | None,
        prefix_Px2xD: jax.Array | None = None,
        rate: jax.Array | None = None,
    ) -> jax.Array:
        """The rate is how often a residual branch is left out for a segment; it needs a key."""
        weights_key, attention_key, output_key = _split(key, 3)
        factors: list[jax.Array | None] = [None, None]
        if key is not None and rate is not None:
            factors = [_by_segment(k, rate, segment_ids_BxL) for k in (attention_key, output_key)]
        mixed_BxLxD = self.attention.self(x_BxLxD, segment_ids_BxL, weights_key, prefix_Px2xD)
        x_BxLxD = self.attention.output(mixed_BxLxD, x_BxLxD, attention_key, factors[0]).astype(self.dtype)
        wide_BxLxF = self.intermediate(x_BxLxD, output_key)
        return self.output(wide_BxLxF, x_BxLxD, output_key, factors[1]).astype(self.dtype)


def _by_segment(key: jax.Array | None, rate: jax.Array, segment_ids_BxL: jax.Array) -> jax.Array:
    """BxLx1: `surviving`, the same at all positions of a segment."""
    assert key is not None
    B, L = segment_ids_BxL.shape
    # Segments count from 1 and have a piece at least.
    factor_BxS = surviving(jax.random.fold_in(key, _DEPTH), rate, (B, L + 1))
    return jnp.take_along_axis(factor_BxS, segment_ids_BxL, axis=1)[:, :, None]


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, config: BertConfig, compute: Compute, rngs: nnx.Rngs):
        self.layer = nnx.List([Layer(config, compute, rngs) for _ in range(config.num_hidden_layers)])


class Pooler(nnx.Module):
    """tanh of a dense layer on the first token."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.dense = Linear(config.hidden_size, config.hidden_size, init, dtype=dtype, rngs=rngs)

    def __call__(self, x_BxSxD: jax.Array, key: jax.Array | None) -> jax.Array:
        return jnp.tanh(self.dense(x_BxSxD, key))


class Bert(nnx.Module):
    """Embeddings and encoder; the pooler where the head needs one.

    A method of peft/ may add `prefix`, a module that gives TxPx2xD: for each of T layers P keys and values that all positions see.
    They count as the positions before the first piece.
    """

    def __init__(self, config: BertConfig, *, with_pooler: bool, compute: Compute, rngs: nnx.Rngs):
        self.embeddings = Embeddings(config, compute, rngs)
        self.encoder = Encoder(config, compute, rngs)
        if with_pooler:
            self.pooler = Pooler(config, compute.dtype, rngs)
        self.dropout_rate = config.hidden_dropout_prob
        self.compute = compute

    def __call__(
        self,
        input_ids_BxL: jax.Array,
        token_type_ids_BxL: jax.Array,
        position_ids_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        key: jax.Array | None,
        offset_BxLxD: jax.Array | None = None,
    ) -> jax.Array:
        embeddings_key, encoder_key = _split(key, 2)
        prefix: Any = getattr(self, "prefix", None)
        prefix_TxPx2xD = None if prefix is None else prefix()
        if prefix_TxPx2xD is not None:
            position_ids_BxL = position_ids_BxL + prefix_TxPx2xD.shape[1]
        x_BxLxD = self.embeddings(input_ids_BxL, token_type_ids_BxL, position_ids_BxL, offset_BxLxD)
        x_BxLxD = dropout(x_BxLxD, self.dropout_rate, embeddings_key).astype(self.compute.dtype)
        return self._through_layers(x_BxLxD, segment_ids_BxL, encoder_key, prefix_TxPx2xD)

    def _through_layers(
        self,
        x_BxLxD: jax.Array,
        segment_ids_BxL: jax.Array,
        key: jax.Array | None,
        prefix_TxPx2xD: jax.Array | None,
    ) -> jax.Array:
        """All layers, in a row of copies or in a loop (all of them alike, then), with the same dropout either way."""
        graphdefs, weights = zip(*(nnx.split(layer) for layer in self.encoder.layer), strict=True)

        def run_layer(
            x_BxLxD: jax.Array,
            weights: nnx.State,
            index: jax.Array,
            prefix_Px2xD: jax.Array | None,
            segment_ids_BxL: jax.Array,
            key: Any,
            graphdef: Any,
        ) -> jax.Array:
            layer_key = None if key is None else jax.random.fold_in(key, index)
            last = self.compute.stochastic_depth
            # An array: layers that differ in their rate are one program.
            rate = depth_rate(last, index, len(graphdefs)) if last and key is not None else None
            x_BxLxD = nnx.merge(graphdef, weights)(x_BxLxD, segment_ids_BxL, layer_key, prefix_Px2xD, rate)
            return self.compute.split_rows(x_BxLxD)

        # Under jit a layer is traced once and called, if layers are alike (peft/ may change some of them only); each copy would
        # be traced for itself.
        runs = {
            graphdef: rematerialised(
                jax.jit(partial(run_layer, graphdef=graphdef)),
                self.compute.remat,
                in_scan=self.compute.scan_layers,
            )
            for graphdef in dict.fromkeys(graphdefs)
        }
        if self.compute.scan_layers:
            (run,) = runs.values()

            def scanned(
                x_BxLxD: jax.Array, layer: tuple[nnx.State, jax.Array, jax.Array | None]
            ) -> tuple[jax.Array, None]:
                return run(x_BxLxD, *layer, segment_ids_BxL, key), None

            layers = self._stacked(weights), jnp.arange(len(weights)), prefix_TxPx2xD
            return jax.lax.scan(scanned, x_BxLxD, layers)[0]
        for index, state in enumerate(weights):
            prefix_Px2xD = None if prefix_TxPx2xD is None else prefix_TxPx2xD[index]
            x_BxLxD = runs[graphdefs[index]](
                x_BxLxD, state, jnp.asarray(index), prefix_Px2xD, segment_ids_BxL, key
            )
        return x_BxLxD

    def _stacked(self, weights: Sequence[nnx.State]) -> nnx.State:
        """The weights of all layers, one beside the other; kernels as the products take them, which may be half the bytes."""

        def stack(path: tuple[Any, ...], *leaves: jax.Array) -> jax.Array:
            is_kernel = "kernel" in jax.tree_util.keystr(path)
            return jnp.stack([leaf.astype(self.compute.dtype) if is_kernel else leaf for leaf in leaves])

        return jax.tree_util.tree_map_with_path(stack, *weights)


class _Classifier(nnx.Module):
    """An encoder, and a linear head after dropout; the head's product is float32."""

    def __init__(
        self, config: BertConfig, num_labels: int, *, with_pooler: bool, compute: Compute, rngs: nnx.Rngs
    ):
        self.bert = Bert(config, with_pooler=with_pooler, compute=compute, rngs=rngs)
        init = nnx.initializers.normal(config.initializer_range)
        self.classifier = Linear(config.hidden_size, num_labels, init, dtype=jnp.float32, rngs=rngs)
        own = config.classifier_dropout
        self.dropout_rate = config.hidden_dropout_prob if own is None else own

    def head(self, features: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits, float32, of what `features` gave with the same key."""
        return self.classifier(dropout(features, self.dropout_rate, _split(dropout_key, 2)[1]))


class BertForSequenceClassification(_Classifier):
    """One row of logits for each segment."""

    def __init__(self, config: BertConfig, num_labels: int, *, compute: Compute = FLOAT32, rngs: nnx.Rngs):
        super().__init__(config, num_labels, with_pooler=True, compute=compute, rngs=rngs)

    def __call__(
        self,
        input_ids_BxL: jax.Array,
        token_type_ids_BxL: jax.Array,
        position_ids_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        first_BxS: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of every segment.

        Args:
            input_ids_BxL: Word pieces.
            token_type_ids_BxL: 0, or 1 for the second text of a pair.
            position_ids_BxL: Position within the segment.
            segment_ids_BxL: 0 for padding, 1, 2, ... for the examples of a row; only equal ids attend to each other.
            first_BxS: Position of each segment's [CLS]; any valid position where a row has fewer segments.
            dropout_key: None for none.

        Returns:
            logits_BxSxC, float32.
        """
        features_BxSxD = self.features(
            input_ids_BxL,
            token_type_ids_BxL,
            position_ids_BxL,
            segment_ids_BxL,
            first_BxS,
            dropout_key=dropout_key,
        )
        return self.head(features_BxSxD, dropout_key)

    def features(
        self,
        input_ids_BxL: jax.Array,
        token_type_ids_BxL: jax.Array,
        position_ids_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        first_BxS: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        offset_BxLxD: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads, BxSxD: the pooler's output for each segment; the offset is added to the word vectors."""
        bert_key, _ = _split(dropout_key, 2)
        x_BxLxD = self.bert(
            input_ids_BxL, token_type_ids_BxL, position_ids_BxL, segment_ids_BxL, bert_key, offset_BxLxD
        )
        split_rows = self.bert.compute.split_rows
        first_BxSxD = split_rows(jnp.take_along_axis(x_BxLxD, first_BxS[:, :, None], axis=1))
        return split_rows(self.bert.pooler(first_BxSxD, bert_key))


class _PerToken(nnx.Module):
    """An encoder whose head reads every position."""

    bert: Bert

    def __call__(
        self,
        input_ids_BxL: jax.Array,
        token_type_ids_BxL: jax.Array,
        position_ids_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """logits_BxLxC, float32; arguments as those of `BertForSequenceClassification`."""
        features_BxLxD = self.features(
            input_ids_BxL, token_type_ids_BxL, position_ids_BxL, segment_ids_BxL, dropout_key=dropout_key
        )
        return self.head(features_BxLxD, dropout_key)

    def features(
        self,
        input_ids_BxL: jax.Array,
        token_type_ids_BxL: jax.Array,
        position_ids_BxL: jax.Array,
        segment_ids_BxL: jax.Array,
        *,
        dropout_key: jax.Array | None = None,
        offset_BxLxD: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads, BxLxD: the encoder's output; the offset is added to the word vectors."""
        bert_key, _ = _split(dropout_key, 2)
        return self.bert(
            input_ids_BxL, token_type_ids_BxL, position_ids_BxL, segment_ids_BxL, bert_key, offset_BxLxD
        )

    def head(self, features: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits of what `features` gave."""
        raise NotImplementedError


class BertForTokenClassification(_Classifier, _PerToken):
    """One row of logits for each token."""

    def __init__(self, config: BertConfig, num_labels: int, *, compute: Compute = FLOAT32, rngs: nnx.Rngs):
        super().__init__(config, num_labels, with_pooler=False, compute=compute, rngs=rngs)


class _Transform(nnx.Module):
    """Dense, activation, LayerNorm."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        init = nnx.initializers.normal(config.initializer_range)
        self.dense = Linear(config.hidden_size, config.hidden_size, init, dtype=dtype, rngs=rngs)
        self.LayerNorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.hidden_act = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.LayerNorm(ACTIVATIONS[self.hidden_act](self.dense(x)))


class _Predictions(nnx.Module):
    """What is beside the word embeddings in the head of a masked language model."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.transform = _Transform(config, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))


class _Heads(nnx.Module):
    """Of pre-training; here the masked language model's alone."""

    def __init__(self, config: BertConfig, dtype: DTypeLike, rngs: nnx.Rngs):
        self.predictions = _Predictions(config, dtype, rngs)


class BertForMaskedLM(_PerToken):
    """For each token a logit for every entry of the vocabulary (Devlin et al. 2018, section 3.1); decoder and word
    embeddings are one table."""

    def __init__(self, config: BertConfig, *, compute: Compute = FLOAT32, rngs: nnx.Rngs):
        self.bert = Bert(config, with_pooler=False, compute=compute, rngs=rngs)
        self.cls = _Heads(config, compute.dtype, rngs)

    def head(self, features: jax.Array, dropout_key: jax.Array | None = None) -> jax.Array:
        """Logits [..., V], float32, of what `features` gave; nothing in it is dropped."""
        del dropout_key
        table_VxD = self.bert.embeddings.word_embeddings.embedding[...]
        logits = jnp.einsum("...d,vd->...v", self.cls.predictions.transform(features), table_VxD)
        return logits + self.cls.predictions.bias[...].reshape((1,) * (logits.ndim - 1) + (-1,))


def _split(key: jax.Array | None, count: int) -> list[jax.Array | None]:
    return [None] * count if key is None else list(jax.random.split(key, count))


def products(config: BertConfig, num_labels: int, rows: int, length: int, outputs: int) -> list[Product]:
    """Of the forward pass, in their order.

    Args:
        config: The network.
        num_labels: Width of the logits.
        rows: B
        length: L
        outputs: Positions with a row of logits: segments, or all tokens.
    """
    D, F, tokens = config.hidden_size, config.intermediate_size, rows * length
    before = "bert/embeddings"
    found = [Product(before, 0.0, (), "bert/embeddings/")]
    for index in range(config.num_hidden_layers):
        layer = f"bert/encoder/layer/{index}"
        read = [f"{layer}/attention/self/{name}" for name in ("query", "key", "value")]
        found += [Product(name, 2.0 * tokens * D * D, (before,), f"{name}/") for name in read]
        # A prefix's keys move the scores; what its rows take themselves is not counted.
        scores, mixed = f"{layer}/scores", f"{layer}/mixed"
        found.append(Product(scores, 2.0 * tokens * length * D, (read[0], read[1]), "bert/prefix/"))
        found.append(Product(mixed, 2.0 * tokens * length * D, (scores, read[2]), "bert/prefix/"))
        attended = f"{layer}/attention/output/dense"
        found.append(Product.dense(attended, 2.0 * tokens * D * D, mixed))
        beside = f"{layer}/attention"  # the residual branch; its sum is what the next layers read
        found.append(Product(beside, 0.0, (before, attended)))
        inner, outer = f"{layer}/intermediate/dense", f"{layer}/output/dense"
        found.append(Product.dense(inner, 2.0 * tokens * D * F, beside))
        found.append(Product.dense(outer, 2.0 * tokens * D * F, inner))
        found.append(Product(layer, 0.0, (beside, outer)))
        before = layer
    if outputs != tokens:
        found.append(Product.dense("bert/pooler/dense", 2.0 * outputs * D * D, before))
        before = "bert/pooler/dense"
    return [*found, Product.dense("classifier", 2.0 * outputs * D * num_labels, before)]
