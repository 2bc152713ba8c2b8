"""InceptionV3 of FID, under the names of pytorch-fid's weights (pt_inception-2015-12-05-6726825d.pth).

The config has the options of its class `InceptionV3`; `preprocessing` is ours, see models/features/inception.py.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, conv, matrix
from hybridgen.weights.tables import About, Plan, _statistics

FAMILY = "features.inception"

SIDE = 299

ABOUT = About(
    "features of InceptionV3, the network of FID",
    "Apache-2.0",
    "23.9 M parameters, 2048 features; one preset for each preprocessing",
    {name: {"preprocessing": name} for name in ("pytorch_fid", "adm")},
)


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        blocks = options.counts("output_blocks", (3,), least=0)
        if len(blocks) != 1 or blocks[0] > 3:
            raise UserError(f"config: output_blocks {list(blocks)} is not supported, only one of 0, 1, 2, 3")
        model = {"block": blocks[0], "resize": options.flag("resize_input", True)}
        model |= {"preprocessing": options.only("preprocessing", "pytorch_fid", "adm")}
        options.only("normalize_input", True)
        options.only("use_fid_inception", True)
        options.skip("requires_grad")
    rules = [Rule("fc.weight", "params/head/kernel", matrix), Rule("fc.bias", "params/head/bias")]
    for official, ours in (
        (r"Conv2d_{n:\w+}", "conv_{n:\\w+}"),
        (r"Mixed_{m:\w+}.{branch:branch\w+}", r"mixed_{m:\w+}/{branch:branch\w+}"),
    ):
        rules += [Rule(f"{official}.conv.weight", f"params/{ours}/kernel", conv)]
        rules += _statistics.rules(f"{official}.bn", ours)
    return Plan(FAMILY, model, tuple(rules), {"image": (SIDE, SIDE, 3)}, _statistics.DROPPED, kept=_statistics.DROPPED)
