"""Feed-forward layers, gated (Shazeer 2020) or plain. Gate and value are one product: `up [d, 1 or 2, f]`.

Letters: b batch, n tokens, d width, f hidden.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from hybridgen.core.errors import UserError
from hybridgen.core.sharding import shard
from hybridgen.nn.linear import Linear, fan_in

ACTIVATIONS = {
    "gelu": nn.gelu,  # tanh form
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "relu": nn.relu,
    "silu": nn.silu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "leaky_relu": nn.leaky_relu,
    "mish": lambda x: x * jnp.tanh(nn.softplus(x)),
    "tanh": jnp.tanh,
    "sigmoid": nn.sigmoid,
}
GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_exact": "gelu_exact", "reglu": "relu"}
GATED |= {"quick_geglu": "quick_gelu"}
GATED |= {f"{name}_glu": name for name in ("relu2", "leaky_relu", "mish", "tanh", "sigmoid")}
KINDS = (*GATED, *ACTIVATIONS)


class MLP(nn.Module):
    """`x [b, n, d] -> [b, n, d]`. `kind`: one of `GATED` or `ACTIVATIONS`."""

    hidden: int
    kind: str = "swiglu"
    bias: bool = False
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind not in KINDS:
            raise UserError(f"mlp kind {self.kind!r} is not one of {', '.join(KINDS)}")
        branches = 2 if self.kind in GATED else 1
        activation = ACTIVATIONS[GATED.get(self.kind, self.kind)]
        parts = Linear((branches, self.hidden), parts=(1,) * branches, bias=self.bias, dtype=self.dtype, name="up")(x)
        parts = [shard(part[..., 0, :], "batch", None, "mlp") for part in parts]  # b n f
        y = activation(parts[0]) * parts[1] if branches == 2 else activation(parts[0])
        return Linear(x.shape[-1], bias=self.bias, dtype=self.dtype, init=fan_in(self.out_scale), name="down")(y)
