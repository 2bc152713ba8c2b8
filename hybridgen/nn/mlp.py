"""Feed-forward layers: SwiGLU (Shazeer 2020) and GELU. Gate and value are one product: `up [d, 1 or 2, f]`.

Letters: b batch, n tokens, d width, f hidden.
"""

import flax.linen as nn
import jax

from hybridgen.errors import UserError
from hybridgen.nn.linear import Linear, fan_in
from hybridgen.sharding import shard


class MLP(nn.Module):
    """`x [b, n, d] -> [b, n, d]`. `kind`: "swiglu" or "gelu" (tanh form)."""

    hidden: int
    kind: str = "swiglu"
    bias: bool = False
    dtype: str = "float32"
    out_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind not in ("swiglu", "gelu"):
            raise UserError(f"mlp kind {self.kind!r} is not one of 'swiglu', 'gelu'")
        branches = 2 if self.kind == "swiglu" else 1
        parts = Linear((branches, self.hidden), parts=(1,) * branches, bias=self.bias, dtype=self.dtype, name="up")(x)
        parts = [shard(part[..., 0, :], "batch", None, "mlp") for part in parts]  # b n f
        y = nn.silu(parts[0]) * parts[1] if branches == 2 else nn.gelu(parts[0])
        return Linear(x.shape[-1], bias=self.bias, dtype=self.dtype, init=fan_in(self.out_scale), name="down")(y)
