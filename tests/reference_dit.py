"""What DiT and its process compute, in numpy and float64, by an official state dict: published or of diffusers.

Latents are `[b, c, H, W]`. `used` collects the names that were looked at.
"""

import math

import numpy as np

GELU = np.vectorize(lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x):
    return x * sigmoid(x)


def norm(x, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def features(t, half, slowest):
    """Angles in float32, as official code has them: of t = 1000 their last bits show."""
    frequency = np.exp((np.float32(-np.log(10_000)) * np.arange(half, dtype=np.float32) / slowest).astype(np.float64))
    angles = (np.asarray(t, np.float32)[:, None] * frequency.astype(np.float32)).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def places(side, d):
    """The sine-cosine table: columns in the first half of the width, rows in the second."""
    frequency = 10_000.0 ** (-np.arange(d // 4) / (d // 4))
    row, column = np.divmod(np.arange(side * side), side)
    angles = [place[:, None] * frequency for place in (column, row)]
    return np.concatenate([part(angle) for angle in angles for part in (np.sin, np.cos)], -1)


class Reference:
    """`it(x, t, y)` for either naming, which the names decide."""

    def __init__(self, state, heads, act="gelu-approximate", eps=1e-6):
        self.state = {name: np.asarray(value, np.float64) for name, value in state.items()}
        self.heads, self.act, self.eps, self.used = heads, act, eps, set()
        self.published = "x_embedder.proj.weight" in state

    def get(self, name):
        self.used.add(name)
        return self.state[name]

    def linear(self, name, x):
        bias = f"{name}.bias"
        return x @ self.get(f"{name}.weight").T + (self.get(bias) if bias in self.state else 0)

    def patches(self, x):
        weight = self.get("x_embedder.proj.weight" if self.published else "pos_embed.proj.weight")
        bias = self.get("x_embedder.proj.bias" if self.published else "pos_embed.proj.bias")
        d, _, p, _ = weight.shape
        windows = np.lib.stride_tricks.sliding_window_view(x, (p, p), (2, 3))[:, :, ::p, ::p]
        y = np.einsum("bchwij,dcij->bhwd", windows, weight) + bias
        return y.reshape(len(x), -1, d), p

    def condition(self, t, y, i):
        """Time and label for block i, after a SiLU."""
        if self.published:
            names, slowest = ("t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder"), 128
        else:
            parts = ("timestep_embedder.linear_1", "timestep_embedder.linear_2", "class_embedder")
            names, slowest = [f"transformer_blocks.{i}.norm1.emb.{part}" for part in parts], 127
        time = self.linear(names[1], silu(self.linear(names[0], features(t, 128, slowest))))
        return silu(time + self.get(f"{names[2]}.embedding_table.weight")[y])

    def attention(self, i, x):
        if self.published:
            q, k, v = np.split(self.linear(f"blocks.{i}.attn.qkv", x), 3, -1)
        else:
            q, k, v = (self.linear(f"transformer_blocks.{i}.attn1.to_{part}", x) for part in "qkv")
        q, k, v = (part.reshape(*part.shape[:2], self.heads, -1) for part in (q, k, v))
        scores = np.einsum("bthk,bshk->bhts", q, k) * q.shape[-1] ** -0.5
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("bhts,bshk->bthk", scores / scores.sum(-1, keepdims=True), v).reshape(x.shape)
        return self.linear(f"blocks.{i}.attn.proj" if self.published else f"transformer_blocks.{i}.attn1.to_out.0", out)

    def mlp(self, i, x):
        first, last = ("mlp.fc1", "mlp.fc2") if self.published else ("ff.net.0.proj", "ff.net.2")
        prefix = f"blocks.{i}." if self.published else f"transformer_blocks.{i}."
        y = self.linear(prefix + first, x)
        if self.act in ("geglu", "swiglu"):
            value, gate = np.split(y, 2, -1)
            y = value * (GELU(gate) if self.act == "geglu" else silu(gate))
        else:
            acts = {"gelu": GELU, "gelu-approximate": gelu_tanh, "linear-silu": silu}
            acts["geglu-approximate"] = lambda x: x * sigmoid(1.702 * x)
            y = acts[self.act](y)
        return self.linear(prefix + last, y)

    def block(self, i, x, reported):
        name = f"blocks.{i}.adaLN_modulation.1" if self.published else f"transformer_blocks.{i}.norm1.linear"
        parts = np.split(self.linear(name, reported)[:, None], 6, -1)
        x = x + parts[2] * self.attention(i, norm(x, 1e-6) * (1 + parts[1]) + parts[0])
        y = norm(x, self.eps)
        if (scale := f"transformer_blocks.{i}.norm3.weight") in self.state:
            y = y * self.get(scale) + self.get(scale.replace("weight", "bias"))
        return x + parts[5] * self.mlp(i, y * (1 + parts[4]) + parts[3])

    def __call__(self, x, t, y):
        x = np.asarray(x, np.float64)
        b, side = len(x), x.shape[-1]
        h, p = self.patches(x)
        h = h + (self.get("pos_embed") if self.published else places(side // p, h.shape[-1]))
        depth = 1 + max(int(name.split(".")[1]) for name in self.state if name.split(".")[0].endswith("blocks"))
        for i in range(depth):
            h = self.block(i, h, self.condition(t, y, i))
        ends = ("proj_out_1", "proj_out_2")
        ends = ("final_layer.adaLN_modulation.1", "final_layer.linear") if self.published else ends
        shift, scale = np.split(self.linear(ends[0], self.condition(t, y, 0))[:, None], 2, -1)
        h = self.linear(ends[1], norm(h, 1e-6) * (1 + scale) + shift)
        h = h.reshape(b, side // p, side // p, p, p, -1)
        return np.einsum("nhwpqc->nchpwq", h).reshape(b, -1, side, side)


class Process:
    """The diffusion along kept timesteps: betas of the chain that is left, its posterior, samples and losses."""

    def __init__(self, betas, kept, learned):
        bar = np.cumprod(1 - betas)[kept]
        self.kept, self.learned, self.bar = kept, learned, bar
        self.before = np.append(1.0, bar[:-1])
        self.betas = 1 - bar / self.before
        posterior = self.betas * (1 - self.before) / (1 - bar)
        self.low = np.log(np.append(posterior[1], posterior[1:]))
        self.large = np.log(np.append(posterior[1], self.betas[1:]))

    def mean(self, x, x_t, i):
        """Of q(x_{i-1} | x_t, x)."""
        beta, bar, before = self.betas[i], self.bar[i], self.before[i]
        return (beta * np.sqrt(before) * x + (1 - before) * np.sqrt(1 - beta) * x_t) / (1 - bar)

    def model(self, out, x_t, i):
        """(predicted x, eps, log-variance) of an output."""
        c = x_t.shape[1]
        eps = out[:, :c]
        share = (out[:, c:] + 1) / 2
        log_var = share * np.log(self.betas[i]) + (1 - share) * self.low[i] if self.learned else self.large[i]
        return (x_t - np.sqrt(1 - self.bar[i]) * eps) / np.sqrt(self.bar[i]), eps, log_var

    def ancestral(self, network, x, noise):
        trail = [x]
        for step, i in enumerate(reversed(range(len(self.kept)))):
            clean, _, log_var = self.model(network(x, self.kept[i]), x, i)
            x = self.mean(clean, x, i) + (i > 0) * np.exp(log_var / 2) * noise[step]
            trail.append(x)
        return np.stack(trail)

    def ddim(self, network, x):
        trail = [x]
        for i in reversed(range(len(self.kept))):
            clean, eps, _ = self.model(network(x, self.kept[i]), x, i)
            x = np.sqrt(self.before[i]) * clean + np.sqrt(1 - self.before[i]) * eps
            trail.append(x)
        return np.stack(trail)

    def losses(self, out, x, noise, i):
        """(squared error, bits) of one picture at timestep i of all."""
        x_t = np.sqrt(self.bar[i]) * x + np.sqrt(1 - self.bar[i]) * noise
        clean, eps, log_var = self.model(out, x_t, i)
        true, mean = self.mean(x, x_t, i), self.mean(clean, x_t, i)
        bits = 0.5 * (
            -1 + log_var - self.low[i] + np.exp(self.low[i] - log_var) + (true - mean) ** 2 * np.exp(-log_var)
        )
        if i == 0:
            below = [
                0.5 + 0.5 * np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))
                for z in (np.exp(-log_var / 2) * (x - mean + side / 255) for side in (1, -1))
            ]
            inside = np.where(x < -0.999, below[0], np.where(x > 0.999, 1 - below[1], below[0] - below[1]))
            bits = -np.log(np.maximum(inside, 1e-12))
        return np.square(noise - eps).mean(), bits.mean() / np.log(2)
