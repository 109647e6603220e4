"""The convolutions of ResNet-18 one by one: XLA's, other ways to the same, and torch's.

    python benchmarks/convolutions.py

Each is called alone, 16 images, float32, median of `--calls`; the gradient is of the sum of the outputs. "One product" multiplies
the shifted copies of the input that a kernel's taps see, side by side, with the output's gradient; "a product a tap" each by itself.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro

from finetune_jax.environment import ask_for_huge_pages

CASES = {
    "7x7, stride 2, 3 to 64, 224x224": (16, 224, 3, 64, 7, 2),
    "3x3, 64 to 64, 56x56": (16, 56, 64, 64, 3, 1),
    "3x3, 128 to 128, 28x28": (16, 28, 128, 128, 3, 1),
    "3x3, 256 to 256, 14x14": (16, 14, 256, 256, 3, 1),
    "3x3, 512 to 512, 7x7": (16, 7, 512, 512, 3, 1),
    "tiny": (1, 6, 2, 3, 3, 1),
}
"""Images, side, channels in and out, side of the kernel, stride."""


@dataclass(frozen=True)
class Arguments:
    """What to time, and how often."""

    cases: tuple[str, ...] = tuple(CASES)[:-1]
    """Which convolutions."""
    calls: int = 5
    """Of each, after one that warms up."""


def milliseconds(call: Callable[[], Any], calls: int) -> float:
    """Median of a call."""
    call()
    seconds = []
    for _ in range(calls):
        since = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - since)
    return 1e3 * statistics.median(seconds)


def ours(case: str, calls: int) -> dict[str, float]:
    """Milliseconds by way."""
    count, side, c_in, c_out, size, stride = CASES[case]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.random((count, side, side, c_in)), jnp.float32)
    kernel = jnp.asarray(rng.random((size, size, c_in, c_out)), jnp.float32)
    around = [(size // 2, size // 2)] * 2
    names = ("NHWC", "HWIO", "NHWC")

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (stride, stride), around, dimension_numbers=names)

    y = convolve(x, kernel)
    out, gradient = y.shape[1], jnp.ones_like(y)
    end = stride * (out - 1) + 1

    def copies(x: jax.Array) -> list[jax.Array]:
        x = jnp.pad(x, ((0, 0), *around, (0, 0)))
        return [x[:, i : i + end : stride, j : j + end : stride] for i in range(size) for j in range(size)]

    ways = {
        "forward": (convolve, x, kernel),
        "forward, one product": (
            lambda x, kernel: jnp.concatenate(copies(x), -1) @ kernel.reshape(-1, c_out),
            x,
            kernel,
        ),
        "kernel": (lambda x, g: jax.vjp(lambda k: convolve(x, k), kernel)[1](g), x, gradient),
        "kernel, one product": (
            lambda x, g: (
                jnp.concatenate(copies(x), -1).reshape(-1, size * size * c_in).T @ g.reshape(-1, c_out)
            ),
            x,
            gradient,
        ),
        "kernel, a product a tap": (
            lambda x, g: jnp.stack([c.reshape(-1, c_in).T @ g.reshape(-1, c_out) for c in copies(x)]),
            x,
            gradient,
        ),
    }
    if c_in > 3:  # nothing asks for the gradient of pixels
        ways["input"] = (lambda k, g: jax.vjp(lambda x: convolve(x, k), x)[1](g), kernel, gradient)
    found = {}
    for name, (function, *values) in ways.items():
        compiled = jax.jit(function).lower(*values).compile()
        found[name] = milliseconds(lambda c=compiled, v=values: jax.block_until_ready(c(*v)), calls)
    return found


def theirs(case: str, calls: int) -> dict[str, float]:
    """torch's, channels last."""
    count, side, c_in, c_out, size, stride = CASES[case]
    last: Any = torch.channels_last
    x = torch.rand(count, c_in, side, side).contiguous(memory_format=last)
    kernel = torch.rand(c_out, c_in, size, size).contiguous(memory_format=last)
    forward = lambda: torch.nn.functional.conv2d(x, kernel, stride=stride, padding=size // 2)  # noqa: E731
    gradient = torch.ones_like(forward())
    rest = (None, [stride] * 2, [size // 2] * 2, [1, 1], False, [0, 0], 1)
    backward: Any = torch.ops.aten.convolution_backward
    found = {"forward": milliseconds(forward, calls)}
    for name, mask in (("input", [True, False, False]), ("kernel", [False, True, False])):
        if name == "kernel" or c_in > 3:
            found[name] = milliseconds(lambda m=mask: backward(gradient, x, kernel, *rest, m), calls)
    return found


def main(args: Arguments) -> None:
    """Prints a table: forward, gradient by the input, gradient by the kernel."""
    print(
        "| convolution | XLA | torch, channels last | forward as one product | kernel gradient as one product | as a product a tap |"
    )
    print("|---|---|---|---|---|---|")
    for case in args.cases:
        mine, other = ours(case, args.calls), theirs(case, args.calls)
        cells = [
            ", ".join(f"{of[part]:.0f}" if part in of else "-" for part in ("forward", "input", "kernel"))
            for of in (mine, other)
        ]
        ways = ("forward, one product", "kernel, one product", "kernel, a product a tap")
        print(
            f"| {case} | {' | '.join(cells)} | {' | '.join(f'{mine[way]:.0f}' for way in ways)} |", flush=True
        )


if __name__ == "__main__":
    ask_for_huge_pages()
    main(tyro.cli(Arguments, description=__doc__))
