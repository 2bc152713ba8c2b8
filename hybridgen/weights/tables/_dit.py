"""Shared by the tables of diffusion transformers: views of patches, modulation and feed-forward, rules of blocks.

Letters: d width, p patch, c channels, f hidden, h heads, k head width.
"""

from typing import Any

import numpy as np

from hybridgen.weights.rules import Part, Rule, Views, heads, matrix, same


def sampling(guided: bool, channels: int, timesteps: int = 1000) -> dict[str, Any]:
    """Sampling options; `channels` of the latent are guided (0: all)."""
    draw = {"solver": "ddpm", "steps": min(250, timesteps), "guidance": 4.0 if guided else 1.0}
    return {"decoder": draw | {"guidance_channels": channels}}


def patches(p: int) -> Views:
    """Kernel `[ppc, d]` over patches -> weight `[d, c, p, p]` of the convolution with their stride."""
    return lambda x: (x.reshape(p, p, -1, x.shape[-1]).transpose(3, 2, 0, 1),)


def rows(x: np.ndarray) -> tuple[Part]:
    """Kernel `[d, n, f]` -> weight `[nf, d]`; bias `[n, f]` -> `[nf]`: shift, scale and gate concatenated."""
    if x.ndim == 2:
        return (Part(x, (x.size,)),)
    return (Part(np.moveaxis(x, 0, -1), (x.shape[1] * x.shape[2], x.shape[0])),)


def gated(x: np.ndarray) -> tuple[Part]:
    """Like `rows`, with the value before its gate."""
    return rows(x[..., ::-1, :])


def fused(x: np.ndarray) -> tuple[Part]:
    """Kernel `[d, h, 3, k]` of attention -> weight `[3hk, d]`, all queries first; bias `[h, 3, k]` likewise."""
    if x.ndim == 3:
        return (Part(x.swapaxes(0, 1), (x.size,)),)
    return (Part(x.transpose(2, 1, 3, 0), (x[0].size, x.shape[0])),)


def linear(official: str, ours: str, weight: Views = matrix, bias: Views = same, stack: str = "") -> tuple[Rule, Rule]:
    """The rules of a linear layer: `official` has weight and bias, `ours` kernel and bias."""
    return (
        Rule(f"{official}.weight", f"params/{ours}/kernel", weight, stack=stack),
        Rule(f"{official}.bias", f"params/{ours}/bias", bias, stack=stack),
    )


def block(official: str, modulation: str, out: str, up: str, down: str, gate: bool = False) -> tuple[Rule, ...]:
    """The rules of a block, except those of queries, keys and values."""
    layers, view = "blocks/layers", gated if gate else rows
    return (
        *linear(f"{official}.{modulation}", f"{layers}/modulation", rows, rows, "i"),
        *linear(f"{official}.{out}", f"{layers}/attention/out", heads, stack="i"),
        *linear(f"{official}.{up}", f"{layers}/mlp/up", view, view, "i"),
        *linear(f"{official}.{down}", f"{layers}/mlp/down", stack="i"),
    )
