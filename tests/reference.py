"""The residual autoencoder of the official code in numpy and float64, on a state dict with official names.

Written from the official sources, not from ours: what our module, options and tables are held against where there is no
recording. Letters: b batch, c channels, h w places.
"""

import numpy as np

ACTS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "mish": lambda x: x * np.tanh(np.logaddexp(0, x)),
}
TAMING = {"down": "down.{}", "up": "up.{}", "block": "block.{}", "attn": "attn.{}", "short": "nin_shortcut"}
TAMING |= {"mid": ("mid.block_1", "mid.attn_1", "mid.block_2"), "norm_out": "norm_out", "norm": "norm"}
TAMING |= {"downsample": "downsample.conv", "upsample": "upsample.conv", "qkvo": ("q", "k", "v", "proj_out")}
LLAMAGEN = TAMING | {"down": "conv_blocks.{}", "up": "conv_blocks.{}", "block": "res.{}"}
LLAMAGEN |= {"mid": ("mid.0", "mid.1", "mid.2")}
DIFFUSERS = {"down": "down_blocks.{}", "up": "up_blocks.{}", "block": "resnets.{}", "attn": "attentions.{}"}
DIFFUSERS |= {"short": "conv_shortcut", "norm_out": "conv_norm_out", "norm": "group_norm"}
DIFFUSERS |= {"downsample": "downsamplers.0.conv", "upsample": "upsamplers.0.conv"}
DIFFUSERS |= {"mid": ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")}
DIFFUSERS |= {"qkvo": ("to_q", "to_k", "to_v", "to_out.0")}
OLD = DIFFUSERS | {"qkvo": ("query", "key", "value", "proj_attn")}


class Reference:
    """Encoder and decoder by a state dict; `used` collects the names that were looked at."""

    def __init__(self, state, names, *, groups=32, act="silu"):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}
        self.names, self.groups, self.act, self.used = names, groups, ACTS[act], set()

    def get(self, name):
        self.used.add(name)
        return self.state[name]

    def has(self, name):
        return f"{name}.weight" in self.state

    def conv(self, name, x, stride=1, pad=((1, 1), (1, 1))):
        weight = self.get(f"{name}.weight")
        weight = weight.reshape(*weight.shape, *(1,) * (4 - weight.ndim))
        if weight.shape[-1] > 1:
            x = np.pad(x, ((0, 0), (0, 0), *pad))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], (2, 3))[:, :, ::stride, ::stride]
        return np.einsum("bchwij,fcij->bfhw", windows, weight, optimize=True) + self.get(f"{name}.bias")[:, None, None]

    def norm(self, name, x):
        y = x.reshape(x.shape[0], self.groups, -1)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
        return y.reshape(x.shape) * self.get(f"{name}.weight")[:, None, None] + self.get(f"{name}.bias")[:, None, None]

    def block(self, name, x):
        y = self.conv(f"{name}.conv1", self.act(self.norm(f"{name}.norm1", x)))
        y = self.conv(f"{name}.conv2", self.act(self.norm(f"{name}.norm2", y)))
        short = f"{name}.{self.names['short']}"
        return y + (self.conv(short, x) if y.shape[1] != x.shape[1] else x)

    def place(self, name, x):
        b, c, h, w = x.shape
        q, k, v, out = (f"{name}.{part}" for part in self.names["qkvo"])
        y = self.norm(f"{name}.{self.names['norm']}", x)
        q, k, v = (self.conv(part, y).reshape(b, c, h * w) for part in (q, k, v))
        scores = np.einsum("bci,bcj->bij", q, k) * c**-0.5
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        return x + self.conv(out, np.einsum("bij,bcj->bci", scores, v).reshape(x.shape))

    def level(self, prefix, x, blocks):
        for i in range(blocks):
            x = self.block(f"{prefix}.{self.names['block'].format(i)}", x)
            attn = f"{prefix}.{self.names['attn'].format(i)}"
            if self.has(f"{attn}.{self.names['norm']}"):
                x = self.place(attn, x)
        return x

    def middle(self, side, x):
        first, attn, second = (f"{side}.{name}" for name in self.names["mid"])
        x = self.block(first, x)
        if self.has(f"{attn}.{self.names['norm']}"):
            x = self.place(attn, x)
        return self.block(second, x)

    def end(self, side, x):
        silu = ACTS["silu"]
        return self.conv(f"{side}.conv_out", silu(self.norm(f"{side}.{self.names['norm_out']}", x)))

    def hidden(self, x, levels, blocks, resample=True):
        x = self.conv("encoder.conv_in", x)
        for level in range(levels):
            prefix = f"encoder.{self.names['down'].format(level)}"
            x = self.level(prefix, x, blocks)
            if level < levels - 1 and resample:
                x = self.conv(f"{prefix}.{self.names['downsample']}", x, 2, ((0, 1), (0, 1)))
            elif level < levels - 1:
                b, c, h, w = x.shape
                x = x[:, :, : h // 2 * 2, : w // 2 * 2].reshape(b, c, h // 2, 2, w // 2, 2).mean((3, 5))
        return self.middle("encoder", x)

    def encode(self, x, levels, blocks, resample=True):
        x = self.end("encoder", self.hidden(x, levels, blocks, resample))
        return self.conv("quant_conv", x) if self.has("quant_conv") else x

    def decode(self, z, levels, blocks, resample=True, from_lowest=False):
        z = self.conv("post_quant_conv", z) if self.has("post_quant_conv") else z
        x = self.middle("decoder", self.conv("decoder.conv_in", z))
        for number in range(levels):
            index = number if from_lowest else levels - 1 - number
            prefix = f"decoder.{self.names['up'].format(index)}"
            x = self.level(prefix, x, blocks + 1)
            if number < levels - 1:
                x = x.repeat(2, 2).repeat(2, 3)
                x = self.conv(f"{prefix}.{self.names['upsample']}", x) if resample else x
        return self.end("decoder", x)
