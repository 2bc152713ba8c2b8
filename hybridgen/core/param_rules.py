"""Where parameters lie: one ordered table from a parameter's path and rank to the array axes that a mesh divides.

A rule names the axes of an array by letters, as shape comments do, and for each of the mesh axes `tensor` and `fsdp`
the array axes that it may divide, best first. The first one that divides evenly and that no other mesh axis has taken
is divided; a rule that names none keeps the array whole on every device, which is refused for a large array. There is
no rule for whatever is left: a parameter that no rule matches is an error.

A product keeps its contracted axis `d` on `fsdp`, which gathers kernels before use, and its heads, hidden units or
vocabulary on `tensor`, which divides the work (Shoeybi et al. 2019, Megatron-LM).

Letters: d width, h heads, n several maps in one (q, k and v; gate and value; shift, scale and gate), k head width,
f hidden or output features, v vocabulary, p positions, y x places of a kernel, c channels.
"""

import re
from typing import NamedTuple

from hybridgen.core.errors import UserError


class Rule(NamedTuple):
    """`path`: a regular expression for the last components of a path; `axes`: a letter an axis of the array, to which a
    stacked layer axis in front, never divided, may be added; `tensor`, `fsdp`: letters of `axes`, best first.
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
    # attention; a convolutional autoencoder's has a single head
    Rule(r"attend_\w+/attention/qkv/kernel", "dhnk", fsdp="dk"),
    Rule(r"attend_\w+/attention/qkv/bias", "hnk"),
    Rule(r"attend_\w+/attention/out/kernel", "hnkd", fsdp="dk"),
    Rule(r"(\w+_)?(qkv|kv|q)/kernel", "dhnk", tensor="hk", fsdp="dk"),
    Rule(r"(\w+_)?(qkv|kv|q)/bias", "hnk", tensor="hk"),
    Rule(r"\w*attention/out/kernel", "hnkd", tensor="hk", fsdp="dk"),
    Rule(r"\w*attention/out/bias", "d"),
    Rule(r"relative", "nh", tensor="h"),
    # feed-forward, and its like
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
    # tables and logits
    Rule(rf"{TABLES}/table", "vd", tensor="v", fsdp="dv"),
    Rule(r"(\w+_)?position", "pd", fsdp="dp"),
    Rule(r"null(_plan)?", "pd"),
    Rule(r"codebook", "vd", fsdp="dv"),
    Rule(r"head/kernel", "dv", tensor="v", fsdp="dv"),
    Rule(r"head/bias", "v", tensor="v"),
    # maps into, out of and between blocks
    Rule(rf"({MAPS}|{PATCHED})/kernel", "df", fsdp="df"),
    Rule(rf"({MAPS}|{PATCHED})/bias", "f"),
    # convolutions, and what a batch norm left of itself
    Rule(rf"{CONVOLUTIONS}/kernel", "yxcf", fsdp="fc"),
    Rule(rf"{CONVOLUTIONS}/(scale|bias)", "f"),
]


def add_rules(*rules: Rule) -> None:
    """Rules for the parameters of a family outside of this package, to be called by its file. Those here come first."""
    PARAM_RULES.extend(rule for rule in rules if rule not in PARAM_RULES)


def find_rule(path: str, shape: tuple[int, ...]) -> tuple[Rule, int]:
    """(rule, 1 if a layer axis is in front else 0) of a parameter ("prior/blocks/layers/attention/qkv/kernel").

    Under `layers` every array has a layer axis; elsewhere it may. UserError if no rule matches.
    """
    stacked = (1,) if "layers" in path.split("/") else (0, 1)
    for rule in PARAM_RULES:
        extra = len(shape) - len(rule.axes)
        if extra in stacked and re.search(f"(^|/)({rule.path})$", path):
            return rule, extra
    raise UserError(
        f"no sharding rule matches parameter {path!r} of shape {tuple(shape)}: "
        f"add one to PARAM_RULES in hybridgen/core/param_rules.py, or with add_rules in the file of your family"
    )
