"""Counts the FLOPs of a program from its trace: those of the model, independent of the compiler.

Every matmul and convolution counts by its shape, a multiply-add as 2. A loop counts its body times its trip count, a
conditional its most expensive branch. Attention counts the pairs of query and key that its mask allows: half of them if
it is causal. In training a matmul counts once more for each operand that needs a gradient: 3x if both train, 2x after
raw inputs or with frozen weights, 1x in frozen parts. Recomputation by remat is counted separately. Norms, softmax,
lookups and the optimizer are not counted. This is the convention of MFU (PaLM, Chowdhery et al. 2022, appendix B).

XLA's `cost_analysis` is not used: it counts the body of a loop once, so only one of all layers and tokens.

A count is {"matmul", "attention", "convolution"}: FLOPs of one call over all devices.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

PRODUCTS = {"dot_general": "matmul", "conv_general_dilated": "convolution"}
# opaque kernels, used in attention only; the last is nn.flash's, by the name of the jitted function around it
KERNELS = ("dot_product_attention_fwd", "dot_product_attention_fwd_wrapper", "flash_attention")

REMAT = ("remat2", "checkpoint")
AGAIN = "again"  # key of a count in progress: FLOPs that remat computes again


def forward(function: Callable, *args: Any) -> Counter:
    """FLOPs of `function(*args)`; arguments may be abstract."""
    jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _walk(jaxpr, [False] * len(jaxpr.invars), "", 0)[0]


def training(loss: Callable, trainable: Any, *args: Any) -> tuple[Counter, float]:
    """(FLOPs of `loss(trainable, *args)` and its gradient with respect to `trainable`, FLOPs recomputed by remat)."""
    jaxpr = jax.make_jaxpr(loss)(trainable, *args).jaxpr
    count = len(jax.tree.leaves(trainable))
    total = _walk(jaxpr, [True] * count + [False] * (len(jaxpr.invars) - count), "", 0)[0]
    again = total.pop(AGAIN, 0)
    return total, again


def _walk(jaxpr: Any, needs: list[bool], scope: str, turns: int) -> tuple[Counter, list[bool]]:
    """(count of a jaxpr, which results need a gradient), given which arguments do.

    `turns`: trip count of the outermost loop around it, such as the tokens of a decoding loop.
    """
    total: Counter = Counter()
    marked = {var for var, need in zip(jaxpr.invars, needs, strict=True) if need}
    for eqn in jaxpr.eqns:
        given = [not isinstance(var, core.Literal) and var in marked for var in eqn.invars]
        inner = f"{scope}/{eqn.source_info.name_stack}"
        count, out = _equation(eqn, given, inner, turns)
        total.update(count)
        marked |= {var for var, need in zip(eqn.outvars, out, strict=True) if need and _real(var)}
    return total, [not isinstance(var, core.Literal) and var in marked for var in jaxpr.outvars]


def _real(var: Any) -> bool:
    return jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _equation(eqn: Any, given: list[bool], scope: str, turns: int) -> tuple[Counter, list[bool]]:
    name, all_batched = _name(eqn), [any(given)] * len(eqn.outvars)
    if name in PRODUCTS or name in KERNELS:
        return _product(eqn, given, scope, turns), all_batched
    if name == "stop_gradient":
        return Counter(), [False] * len(eqn.outvars)
    if name == "scan":
        return _scan(eqn, given, scope, turns)
    if name == "while":  # the trip count is unknown: count once
        carried = given[eqn.params["cond_nconsts"] :]
        return _walk(eqn.params["body_jaxpr"].jaxpr, carried, scope, turns)[0], all_batched
    if name == "cond":
        branches = [_walk(branch.jaxpr, given[1:], scope, turns) for branch in eqn.params["branches"]]
        return max((count for count, _ in branches), key=Counter.total), [
            any(needs) for needs in zip(*(out for _, out in branches), strict=True)
        ]
    for value in eqn.params.values():  # jit, remat, custom_jvp, ...: one inner program over the same arguments
        body = getattr(value, "jaxpr", value)
        if isinstance(body, core.Jaxpr):
            needs = given if len(body.invars) == len(given) else [any(given)] * len(body.invars)
            count, out = _walk(body, needs, scope, turns)
            if name in REMAT and any(given):
                count[AGAIN] += _recomputed(eqn.params["policy"], body, scope, turns)
            return count, out
    return Counter(), all_batched


def _recomputed(policy: Callable | None, body: Any, scope: str, turns: int) -> float:
    """FLOPs that remat recomputes: the forward pass, or only attention if the policy keeps unbatched matmuls."""
    forward = _walk(body, [False] * len(body.invars), scope, turns)[0]
    plain = {"dimension_numbers": (((1,), (0,)), ((), ()))}
    kept = policy is not None and policy(jax.lax.dot_general_p, **plain)
    return forward["attention"] if kept else forward.total()


def _name(eqn: Any) -> str:
    inner = eqn.params.get("name")
    return inner if inner in KERNELS else eqn.primitive.name


def _scan(eqn: Any, given: list[bool], scope: str, turns: int) -> tuple[Counter, list[bool]]:
    body, length = eqn.params["jaxpr"].jaxpr, eqn.params["length"]
    # the numbers of constants and carries: scanned inputs and stacked outputs have one more dimension outside the loop;
    # the parameters with these numbers have different names in different versions of JAX
    carries = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, body.outvars, strict=True))
    first = sum(a.aval.ndim == b.aval.ndim for a, b in zip(eqn.invars, body.invars, strict=True)) - carries
    needs = list(given)
    while True:  # a carry may need a gradient only from the second iteration on
        count, out = _walk(body, needs, scope, turns or length)
        carried = [a or b for a, b in zip(needs[first : first + carries], out[:carries], strict=True)]
        if carried == needs[first : first + carries]:
            return Counter({kind: length * size for kind, size in count.items()}), out
        needs[first : first + carries] = carried


def _product(eqn: Any, given: list[bool], scope: str, turns: int) -> Counter:
    """FLOPs of a product: once, and once more for each operand that needs a gradient."""
    left, right, out = eqn.invars[0].aval, eqn.invars[1].aval, eqn.outvars[0].aval
    attend = re.search(r"attend\.(\d+)x(\d+)\.(\d+|loop)", scope)
    name = _name(eqn)
    if name == "dot_general":
        (inner, _), _ = eqn.params["dimension_numbers"]
        size = 2 * out.size * math.prod(left.shape[i] for i in inner)
    elif name == "conv_general_dilated":
        features = eqn.params["dimension_numbers"].rhs_spec[0]  # the kernel's axis of output channels
        size = 2 * out.size * right.size // right.shape[features]
    elif attend:
        size = 4 * left.size * int(attend[2])  # q k, and weights v
    else:
        raise NotImplementedError(f"the FLOPs of {name} are unknown outside attention ({scope})")
    # the two products of a kernel: queries with keys, and attention weights with values
    sides = (sum(given[:3]) + any(given[:2])) / 2 if name in KERNELS else sum(given[:2])
    if not attend:
        return Counter({PRODUCTS[name]: size * (1 + sides)})
    t, s = int(attend[1]), int(attend[2])
    # one query at a time with a cache: the loop fills the last positions of the cache
    pairs = s - (min(turns, s) - 1) / 2 if attend[3] == "loop" else int(attend[3])
    return Counter({"attention": size * (1 + sides) * pairs / (t * s)})
