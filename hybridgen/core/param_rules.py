"""Sharding rules of parameters: an ordered table from a parameter's path and rank to the array axes to shard.

A rule names the axes of an array by letters, as shape comments do, and lists for each of the mesh axes `tensor` and
`fsdp` the array axes that it may shard, best first. The first one that the mesh axis divides evenly and that no other
mesh axis has taken is sharded. A rule without such letters replicates the array, which is an error for a large array.
There is no default rule: a parameter that no rule matches is an error.

A kernel is sharded by `fsdp` along its contracted axis `d` (it is gathered before use) and by `tensor` along its heads,
hidden units or vocabulary (which divides the work; Shoeybi et al. 2019, Megatron-LM).

Letters: d width, h heads, n several projections in one (q, k and v; gate and value; shift, scale and gate), k head
width, f hidden or output features, v vocabulary, p positions, y x positions in a kernel, c channels.
"""

import re
from typing import NamedTuple

from hybridgen.core.errors import UserError


class Rule(NamedTuple):
    """One sharding rule.

    path: regular expression for the last components of a path. axes: one letter for each axis of the array; a leading
    axis of stacked layers, which is never sharded, may be added. tensor, fsdp: letters of `axes`, best first.
    """

    path: str
    axes: str
    tensor: str = ""
    fsdp: str = ""


NORM = r"(\w+_)?norm(_\d+)?"
MAPS = r"(patches|pixels|plan|plan_pool|text_project|project|score|quant_map|post_map|skip|hidden)"
PATCHED = r"(stem|head_pixels|(up|down|lin)_\d+)"  # of convolutional tokenizers, and LPIPS
CONVOLUTIONS = r"(conv\w*|branch\w+|depthwise|expand|project|stem|top)"
TABLES = r"(tokens|words|start|labels|position)"

PARAM_RULES: list[Rule] = [
    # attention; in a convolutional autoencoder it has a single head
    Rule(r"attend_\w+/attention/qkv/kernel", "dhnk", fsdp="dk"),
    Rule(r"attend_\w+/attention/qkv/bias", "hnk"),
    Rule(r"attend_\w+/attention/out/kernel", "hnkd", fsdp="dk"),
    Rule(r"(\w+_)?(qkv|kv|q)/kernel", "dhnk", tensor="hk", fsdp="dk"),
    Rule(r"(\w+_)?(qkv|kv|q)/bias", "hnk", tensor="hk"),
    Rule(r"\w*attention/out/kernel", "hnkd", tensor="hk", fsdp="dk"),
    Rule(r"\w*attention/out/bias", "d"),
    Rule(r"relative", "nh", tensor="h"),
    # feed-forward layers and similar two-layer networks
    Rule(r"mlp/up/kernel", "dnf", tensor="f", fsdp="df"),
    Rule(r"mlp/up/bias", "nf", tensor="f"),
    Rule(r"mlp/down/kernel", "fd", tensor="f", fsdp="df"),
    Rule(r"(time/hidden|caption/up)/kernel", "df", tensor="f", fsdp="d"),
    Rule(r"(time/out|caption/down)/kernel", "fd", tensor="f", fsdp="d"),
    Rule(r"(mlp/down|time/hidden|time/out)/bias", "d"),
    # modulation and norms
    Rule(r"modulation/kernel", "dnf", tensor="f", fsdp="df"),
    Rule(r"modulation/bias", "nf", tensor="f"),
    Rule(rf"{NORM}/(scale|bias)", "d"),
    # embedding tables and logits
    Rule(rf"{TABLES}/table", "vd", tensor="v", fsdp="dv"),
    Rule(r"(\w+_)?position", "pd", fsdp="dp"),
    Rule(r"null(_plan)?", "pd"),
    Rule(r"codebook", "vd", fsdp="dv"),
    Rule(r"head/kernel", "dv", tensor="v", fsdp="dv"),
    Rule(r"head/bias", "v", tensor="v"),
    # projections into, out of and between blocks
    Rule(rf"({MAPS}|{PATCHED})/kernel", "df", fsdp="df"),
    Rule(rf"({MAPS}|{PATCHED})/bias", "f"),
    # convolutions, and batch norms folded into a scale and a bias
    Rule(rf"{CONVOLUTIONS}/kernel", "yxcf", fsdp="fc"),
    Rule(rf"{CONVOLUTIONS}/(scale|bias)", "f"),
]


def add_rules(*rules: Rule) -> None:
    """Adds rules for the parameters of a family outside this package, whose file calls this; rules above come first."""
    PARAM_RULES.extend(rule for rule in rules if rule not in PARAM_RULES)


def _example(path: str, shape: tuple[int, ...]) -> str:
    """A rule for a parameter: a matrix is sharded by fsdp, other arrays are replicated."""
    stacked = "layers" in path.split("/")
    axes = {0: "", 1: "f", 2: "df", 3: "dnf"}.get(len(shape) - stacked, "dhnkfvpycx"[: len(shape) - stacked])
    name = "/".join(path.split("/")[-2:])
    return f'Rule(r"{name}", "{axes}"' + (', fsdp="df")' if len(axes) in (2, 3) else ")")


def find_rule(path: str, shape: tuple[int, ...]) -> tuple[Rule, int]:
    """(rule, 1 if the array has a leading layer axis else 0) of a path "prior/blocks/layers/attention/qkv/kernel".

    Under `layers` every array has a layer axis; elsewhere it may have one. Raises UserError if no rule matches.
    """
    stacked = (1,) if "layers" in path.split("/") else (0, 1)
    for rule in PARAM_RULES:
        extra = len(shape) - len(rule.axes)
        if extra in stacked and re.search(f"(^|/)({rule.path})$", path):
            return rule, extra
    raise UserError(
        f"no sharding rule matches parameter {path!r} of shape {tuple(shape)}: in the file of your family call, for "
        f"example, param_rules.add_rules({_example(path, shape)}) (a family of hybridgen: add it to PARAM_RULES)"
    )
