"""Virtual tokens: keys and values before every layer's own (prefix-tuning), or word vectors before the text's (prompt tuning)."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from finetune_jax.models.layers import Embed


class Prefix(nnx.Module):
    """TxPx2xD: for each of T layers, P keys and values that every position sees (prefix-tuning, Li and Liang 2021, arXiv:2101.00190, eq. 2).

    Either the numbers themselves, `prefix` [P, T * 2 * D], or re-parametrised (section 4.3): a table [P, D] through a layer of `hidden`
    units with tanh and one to all. Exported are the numbers that come out.
    """

    def __init__(
        self, tokens: int, layers: int, width: int, hidden: int | None, deviation: float, rngs: nnx.Rngs
    ):
        """
        Args:
            tokens: P
            layers: T
            width: D
            hidden: Units of the re-parametrisation; None does without.
            deviation: Of the normal distribution that the numbers, or the table, start with.
            rngs: For them.
        """

        def normal(deviation: float, *shape: int) -> nnx.Param:
            return nnx.Param(deviation * jax.random.normal(rngs.params(), shape, jnp.float32))

        size = layers * 2 * width
        self.layers, self.width, self.through = layers, width, hidden is not None
        if hidden is None:
            self.prefix = normal(deviation, tokens, size)
            return
        self.prefix_table = normal(1.0, tokens, width)
        self.prefix_in = normal(1 / math.sqrt(width), width, hidden)
        self.prefix_in_bias = nnx.Param(jnp.zeros(hidden, jnp.float32))
        self.prefix_out = normal(deviation / math.sqrt(hidden), hidden, size)
        self.prefix_out_bias = nnx.Param(jnp.zeros(size, jnp.float32))

    def __call__(self) -> jax.Array:
        prefix_PxN = self.prefix[...] if not self.through else self._numbers()
        return prefix_PxN.reshape(-1, self.layers, 2, self.width).swapaxes(0, 1)

    def _numbers(self) -> jax.Array:
        names = ("prefix_table", "prefix_in", "prefix_in_bias", "prefix_out", "prefix_out_bias")
        return numbers(*(getattr(self, name)[...] for name in names))


def numbers(
    table_PxD: jax.Array,
    in_DxH: jax.Array,
    in_bias_H: jax.Array,
    out_HxN: jax.Array,
    out_bias_N: jax.Array,
) -> jax.Array:
    """PxN: what the re-parametrisation gives."""
    hidden_PxH = jnp.tanh(jnp.dot(table_PxD, in_DxH) + in_bias_H[None])
    return jnp.dot(hidden_PxH, out_HxN) + out_bias_N[None]


class PromptEmbed(Embed):
    """Word vectors, and after the last of the vocabulary trained ones: ids V, V + 1, ... (prompt tuning, Lester et al. 2021, arXiv:2104.08691).

    `prompt` [P, D]. The data put those ids before every text.
    """

    def __init__(self, base: Embed, tokens: int, deviation: float, rngs: nnx.Rngs):
        """
        Args:
            base: Its table is taken over.
            tokens: P
            deviation: Of the normal distribution that they start with, where no vocabulary is loaded to start from.
            rngs: For them.
        """
        self.embedding, self.frozen_row = base.embedding, base.frozen_row
        shape = (tokens, base.embedding.shape[1])
        self.prompt = nnx.Param(deviation * jax.random.normal(rngs.params(), shape, jnp.float32))

    def __call__(self, ids_BxL: jax.Array) -> jax.Array:
        vocabulary, count = self.embedding.shape[0], self.prompt.shape[0]
        virtual_BxL = (ids_BxL >= vocabulary) & (ids_BxL < vocabulary + count)
        words_BxLxD = super().__call__(jnp.where(virtual_BxL, 0, ids_BxL))
        prompt_BxLxD = jnp.take(self.prompt[...], ids_BxL - vocabulary, axis=0, mode="clip")
        return jnp.where(virtual_BxL[:, :, None], prompt_BxLxD, words_BxLxD)
