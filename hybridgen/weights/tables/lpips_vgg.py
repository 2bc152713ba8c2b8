"""LPIPS on VGG16 (Zhang et al. 2018), version 0.1: the backbone's `features.N` and the heads' `lin{0..4}.model.1`.

One file contains both: torchvision's VGG16 with the heads added, the state of the official class `LPIPS` or of the one
in VQGAN's code (`net.slice{1..5}.N`), or a VQGAN checkpoint, which includes it (`loss.perceptual_loss`). The config is
the preset, or has `width`, which official code fixes at 64.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, conv, pointwise
from hybridgen.weights.tables import About, Plan

FAMILY = "features.perceptual"

ABOUT = About(
    "perceptual distance of pictures, LPIPS 0.1 on VGG16",
    "BSD-2-Clause (heads), BSD-3-Clause (VGG16 of torchvision)",
    "14.7 M parameters",
    {"v0.1": {}},
    ("state_dict.loss.perceptual_loss", "loss.perceptual_loss", "perceptual_loss", "state_dict"),
)
# torchvision numbers all convolutions, activations and poolings: these are the convolutions, by stage
NUMBERS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        model = {"width": options.count("width", 64)}
        options.only("net", "vgg", "vgg16")
        options.only("version", "0.1")
    sliced = any(name.startswith("net.slice") for name in shapes)
    rules = []
    for stage, numbers in enumerate(NUMBERS):
        for i, number in enumerate(numbers):
            name = f"net.slice{stage + 1}.{number}" if sliced else f"features.{number}"
            ours = f"params/conv_{stage}_{i}"
            rules += [Rule(f"{name}.weight", f"{ours}/kernel", conv), Rule(f"{name}.bias", f"{ours}/bias")]
        rules.append(Rule(f"lin{stage}.model.1.weight", f"params/lin_{stage}/kernel", pointwise))
    # the classifier; the official class's second copy of the heads and its input constants
    dropped = (r"classifier\..*", r"lins\.\d\.model\.1\.weight", r"scaling_layer\.(shift|scale)")
    return Plan(FAMILY, model, tuple(rules), {"image": (64, 64, 3)}, dropped, kept=dropped[1:])
