"""Rules of the residual autoencoder (nn/autoencoder.py), for the layer names of several official implementations.

Letters: l level, i block of a level.
"""

from collections.abc import Mapping
from typing import NamedTuple

from hybridgen.core.errors import UserError
from hybridgen.weights.rules import Rule, as_convs, conv, heads, pointwise, qkv, same

NET = "params/net"


class Names(NamedTuple):
    """The layer names that differ between official implementations; those from `place_norm` on are a `Place`'s."""

    down: str  # a level of the encoder
    up: str  # and of the decoder
    middle: tuple[str, str, str]  # block, attention, block
    block: str = "block"
    shortcut: str = "nin_shortcut"
    downsample: str = "downsample.conv"
    upsample: str = "upsample.conv"
    attend: str = "attn"
    norm: str = "norm_out"
    place_norm: str = "norm"
    qkv: tuple[str, str, str] = ("q", "k", "v")
    out: str = "proj_out"
    convs: bool = True  # the projections of attention are 1x1 convolutions


TAMING = Names("encoder.down.{l}", "decoder.up.{l}", ("mid.block_1", "mid.attn_1", "mid.block_2"))


def rules(names: Names, flip: Mapping[str, int]) -> tuple[Rule, ...]:
    """Rules of all tensors. flip: {"l": levels} if the decoder's levels are counted from the lowest resolution."""
    out: list[Rule] = []
    for side, level in (("encoder", names.down), ("decoder", names.up)):
        ours, flips = f"{NET}/{side}", flip if side == "decoder" else {}
        out += _conv(f"{side}.conv_in", f"{ours}/conv_in") + _conv(f"{side}.conv_out", f"{ours}/conv_out")
        out += _norm(f"{side}.{names.norm}", f"{ours}/norm")
        out += _block(f"{level}.{names.block}.{{i}}", f"{ours}/block_{{l}}_{{i}}", names, flips)
        out += _place(f"{level}.{names.attend}.{{i}}", f"{ours}/attend_{{l}}_{{i}}", names, flips)
        for number, name in enumerate((names.middle[0], names.middle[2])):
            out += _block(f"{side}.{name}", f"{ours}/middle_{number}", names, {})
        out += _place(f"{side}.{names.middle[1]}", f"{ours}/attend_middle", names, {})
    out += _conv(f"{names.down}.{names.downsample}", f"{NET}/encoder/conv_down_{{l}}")
    out += _conv(f"{names.up}.{names.upsample}", f"{NET}/decoder/conv_up_{{l}}", flip)
    out += _map("quant_conv", f"{NET}/quant_map") + _map("post_quant_conv", f"{NET}/post_map")
    return tuple(out)


def _conv(name: str, ours: str, flip: Mapping[str, int] | None = None) -> list[Rule]:
    flip = flip or {}
    return [Rule(f"{name}.weight", f"{ours}/kernel", conv, flip=flip), Rule(f"{name}.bias", f"{ours}/bias", flip=flip)]


def _map(name: str, ours: str, flip: Mapping[str, int] | None = None) -> list[Rule]:
    flip = flip or {}
    weight = Rule(f"{name}.weight", f"{ours}/kernel", pointwise, flip=flip)
    return [weight, Rule(f"{name}.bias", f"{ours}/bias", flip=flip)]


def _norm(name: str, ours: str, flip: Mapping[str, int] | None = None) -> list[Rule]:
    flip = flip or {}
    return [Rule(f"{name}.weight", f"{ours}/scale", flip=flip), Rule(f"{name}.bias", f"{ours}/bias", flip=flip)]


def _block(name: str, ours: str, names: Names, flip: Mapping[str, int]) -> list[Rule]:
    out = _norm(f"{name}.norm{{n:1|2}}", f"{ours}/norm_{{n:1|2}}", flip)
    out += _conv(f"{name}.conv{{n:1|2}}", f"{ours}/conv_{{n:1|2}}", flip)
    return out + _map(f"{name}.{names.shortcut}", f"{ours}/skip", flip)


def _place(name: str, ours: str, names: Names, flip: Mapping[str, int]) -> list[Rule]:
    weights, biases = (tuple(f"{name}.{part}.{end}" for part in names.qkv) for end in ("weight", "bias"))
    shaped = as_convs if names.convs else (lambda views: views)
    return [
        *_norm(f"{name}.{names.place_norm}", f"{ours}/norm", flip),
        Rule(weights, f"{ours}/attention/qkv/kernel", shaped(qkv), flip=flip),
        Rule(biases, f"{ours}/attention/qkv/bias", qkv, flip=flip),
        Rule(f"{name}.{names.out}.weight", f"{ours}/attention/out/kernel", shaped(heads), flip=flip),
        Rule(f"{name}.{names.out}.bias", f"{ours}/attention/out/bias", same, flip=flip),
    ]


def levels_at(resolution: int, levels: int, wanted: tuple[int, ...], down: bool = True) -> tuple[int, ...]:
    """The levels with a size in `wanted`: halved from `resolution` if `down`, else doubled from the lowest size."""
    lowest = resolution // 2 ** (levels - 1)
    if not lowest:
        raise UserError(f"resolution {resolution} cannot be halved {levels - 1} times")
    sizes = [resolution // 2**i if down else lowest * 2 ** (levels - 1 - i) for i in range(levels)]
    return tuple(i for i, size in enumerate(sizes) if size in wanted)
