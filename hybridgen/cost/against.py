"""The raster prior in PyTorch, timed in turns with ours: `hybridgen bench --against torch` (needs the extra `dev`).

    python -m hybridgen.bench --config configs/ar/raster.py:bench --against torch

The PyTorch twin computes the same as `models/ar/raster.py` with the same weights, in idiomatic eager PyTorch, float32:
RMSNorm, one matmul for queries, keys and values, rotary positions, scaled_dot_product_attention, SwiGLU, fused AdamW.
Its decoding preallocates a cache of the full length, of which a step reads the filled part, runs guided images as rows
of one batch, and keeps no gradients. Our training step also computes metrics, checks the gradient and applies the
schedule. Steps of the two alternate, with a pause in which the threads of the last one stop spinning. Only this file
imports PyTorch, when it is used.

Letters: b rows, l text positions, n image tokens, t new positions, s cached positions, h key heads, g queries per key
head, k head width, d width, v codes.
"""

import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from hybridgen.core import trees
from hybridgen.core.errors import UserError
from hybridgen.cost import programs
from hybridgen.runs.reading import inference_params
from hybridgen.sampling import guidance

EPS = 1e-6  # of the norms
PAUSE = 0.05  # seconds before a turn


def find_torch() -> Any:
    """The module `torch`. Raises UserError if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError as error:
        raise UserError(f"--against torch needs PyTorch: pip install -e '.[dev]' ({error})") from None


def check(built: programs.Programs) -> None:
    """Raises UserError for a config that the PyTorch twin does not support."""
    config, mesh = built.experiment.config, built.experiment.mesh
    if config.family != "ar.raster":
        raise UserError(f"--against torch supports the family ar.raster, not {config.family}")
    differing = {
        "model.dtype": (built.dtype, "float32"),
        "accumulate": (config.accumulate, 1),
        "optim.kind": (config.optim.kind, "adamw"),
        "the number of devices": (mesh.devices.size, 1),
        "the platform": (mesh.devices.flat[0].platform, "cpu"),
    }
    for name, (value, twin) in differing.items():
        if value != twin:
            raise UserError(f"--against torch: {name} is {value}, but must be {twin}")


class Twin:
    """`Raster` in PyTorch: `forward`, `prefill` and `step`, with the same weights."""

    def __init__(self, model: Any, params: Mapping):
        self.torch = find_torch()
        self.model, self.weights = model, {}
        self.group = model.heads // (model.kv_heads or model.heads)
        for path, array in trees.flatten(params).items():
            stack = np.asarray(array) if "/layers/" in path else np.asarray(array)[None]
            for number, leaf in enumerate(stack):
                if path.endswith("kernel"):  # in x out in Flax, out x in in PyTorch
                    ins = int(np.prod(leaf.shape[:3])) if "attention/out" in path else leaf.shape[0]
                    leaf = leaf.reshape(ins, -1).T
                name = path.replace("/layers/", f"/{number}/")
                self.weights[name] = self.torch.tensor(np.ascontiguousarray(leaf), requires_grad=True)
        self.tables = [self.torch.tensor(np.asarray(table)) for table in model.rotary()]  # cos, sin: s k/2
        reach = np.tril(np.ones((len(self.tables[0]),) * 2, bool))
        if model.prefix_mask:
            reach[: model.prefix, : model.prefix] = True
        self.reach = self.torch.tensor(reach)

    def parameters(self) -> list:
        return list(self.weights.values())

    def norm(self, x: Any, name: str) -> Any:
        return self.torch.nn.functional.rms_norm(x, x.shape[-1:], self.weights[f"{name}/scale"], EPS)

    def linear(self, x: Any, name: str) -> Any:
        return self.torch.nn.functional.linear(x, self.weights[f"{name}/kernel"])

    def rotate(self, x: Any, at: int) -> Any:
        """Rotary embedding of `x [b, t, heads, k]` at the positions from `at` on."""
        cos, sin = (table[at : at + x.shape[1], None] for table in self.tables)  # t 1 k/2
        one, two = x.chunk(2, -1)
        return self.torch.cat([one * cos - two * sin, two * cos + one * sin], -1)

    def block(self, x: Any, name: str, seen: Any, heads: int, group: int, at: int = 0, cache: Any = None) -> Any:
        """One layer on `x [b, t, d]`; `cache`: a pair of `[b, h, s, k]`, which is filled from position `at` on."""
        functional = self.torch.nn.functional
        b, t, _ = x.shape
        y = self.linear(self.norm(x, f"{name}/attention_norm"), f"{name}/attention/qkv")
        q, k, v = y.view(b, t, heads, group + 2, -1).split((group, 1, 1), 3)
        q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)  # b t heads k
        if f"{name}/attention/q_norm/scale" in self.weights:
            q, k = self.norm(q, f"{name}/attention/q_norm"), self.norm(k, f"{name}/attention/k_norm")
        if not name.startswith("text"):
            q, k = self.rotate(q, at), self.rotate(k, at)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        if cache is not None:
            for kept, new in zip(cache, (k, v), strict=True):
                kept[:, :, at : at + t] = new
            k, v = (kept[:, :, : at + t] for kept in cache)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=group > 1)
        x = x + self.linear(y.transpose(1, 2).flatten(2), f"{name}/attention/out")
        gate, value = self.linear(self.norm(x, f"{name}/mlp_norm"), f"{name}/mlp/up").chunk(2, -1)
        return x + self.linear(functional.silu(gate) * value, f"{name}/mlp/down")

    def condition(self, cond: Mapping, drop: Any) -> tuple[Any, Any]:
        """Prefix and start `[b, l + 1, d]`, and which of them are visible `[b, l + 1]`; `drop [b]` bool."""
        torch, model = self.torch, self.model
        kind = cond["label"] if model.classes else torch.full(drop.shape, model.classes)
        start = self.weights["start/table"][torch.where(drop, model.classes + 1, kind)][:, None]
        ones = torch.ones((len(drop), 1), dtype=torch.bool)
        if not model.text_vocab:
            return start, ones
        mask = cond["text_mask"] & ~drop[:, None]  # b l
        x = self.weights["text/words/table"][cond["text"]] + self.weights["text/position"]
        # each position attends to itself, so that no softmax row is empty; no other position attends to padding
        seen = (mask[:, None] | torch.eye(mask.shape[1], dtype=torch.bool))[:, None]
        for number in range(model.text_depth):
            x = self.block(x, f"text/blocks/{number}", seen, max(x.shape[-1] // 64, 1), 1)
        text = self.linear(self.norm(x, "text/norm"), "text_project")
        return torch.cat([text, start], 1), torch.cat([mask, ones], 1)

    def layers(self, x: Any, seen: Any, at: int = 0, cache: Any = None) -> Any:
        """Hidden states `[b, t, d]` after all layers and the last norm."""
        heads = self.model.kv_heads or self.model.heads
        for number in range(self.model.depth):
            kept = None if cache is None else cache[number]
            x = self.block(x, f"blocks/{number}", seen, heads, self.group, at, kept)
        return self.norm(x, "norm")

    def seen(self, valid: Any) -> Any:
        """Attention mask `[b, 1, t, t]` of the first t positions, of which `valid [b, t]` are visible."""
        t = valid.shape[1]
        own = self.torch.eye(t, dtype=self.torch.bool)
        return ((self.reach[:t, :t] & valid[:, None]) | own)[:, None]

    def forward(self, tokens: Any, cond: Mapping, drop: Any) -> Any:
        """Teacher-forced logits `[b, n, v]`."""
        prefix, valid = self.condition(cond, drop)
        x = self.torch.cat([prefix, self.weights["tokens/table"][tokens[:, :-1]]], 1)
        valid = self.torch.nn.functional.pad(valid, (0, x.shape[1] - valid.shape[1]), value=True)
        return self.linear(self.layers(x, self.seen(valid))[:, self.model.prefix :], "head")

    def prefill(self, cond: Mapping, drop: Any) -> tuple[Any, Any, Any]:
        """(logits of the first token `[b, v]`, the cache, which of its positions are valid `[b, 1, 1, s]`)."""
        torch, model = self.torch, self.model
        prefix, valid = self.condition(cond, drop)
        b, length = len(drop), model.prefix + model.length
        shape = (2, b, model.kv_heads or model.heads, length, model.width // model.heads)
        cache = [torch.zeros(shape) for _ in range(model.depth)]
        hidden = self.layers(prefix, self.seen(valid), 0, cache)
        whole = torch.nn.functional.pad(valid, (0, length - valid.shape[1]), value=True)
        return self.linear(hidden[:, -1], "head"), cache, whole[:, None, None]

    def step(self, cache: Any, whole: Any, at: int, token: Any) -> Any:
        """Logits `[b, v]` after `token [b]` at position `at` of the cache."""
        x = self.weights["tokens/table"][token][:, None]
        return self.linear(self.layers(x, whole[..., : at + 1], at, cache)[:, 0], "head")


def train_turns(twin: Twin, batch: Mapping, optim: Mapping) -> Iterator[float]:
    """Endless training steps on one batch; yields the loss."""
    torch, functional = twin.torch, twin.torch.nn.functional
    given, parameters = as_torch(torch, batch), twin.parameters()
    options = {"betas": (optim["b1"], optim["b2"]), "eps": optim["eps"], "weight_decay": 0.0, "fused": True}
    rule = torch.optim.AdamW(parameters, lr=optim["lr"], **options)
    tokens = given["tokens"]
    while True:
        drop = torch.rand(len(tokens)) < twin.model.cond_drop_prob
        loss = functional.cross_entropy(twin.forward(tokens, given, drop).flatten(0, 1), tokens.flatten())
        loss.backward()
        if optim["clip"]:
            torch.nn.utils.clip_grad_norm_(parameters, optim["clip"])
        rule.step()
        rule.zero_grad(set_to_none=True)
        yield loss.item()


def plan(twin: Twin, cond: Mapping, count: int, options: Mapping, forced: Any = None) -> tuple[Any, Any]:
    """(tokens `[count, n]`, sampled with a cache and guidance, their logits); `forced`: tokens to use instead."""
    torch, model = twin.torch, twin.model
    scale = options.get("guidance", 1.0)
    guided = guidance.is_on(scale)
    given = as_torch(torch, cond)
    if guided:
        given = {name: torch.cat([value, value]) for name, value in given.items()}
    drop = torch.arange(count * (1 + guided)) >= count
    tokens, seen = [], []
    with torch.inference_mode():
        logits, cache, whole = twin.prefill(given, drop)
        for position in range(model.length):
            if position:
                logits = twin.step(cache, whole, model.prefix + position, tokens[-1].repeat(1 + guided))
            if guided:
                one, two = logits.chunk(2)
                logits = one + (scale - 1) * (one - two)
            chances = torch.softmax(logits / options.get("temperature", 1.0), -1)
            tokens.append(torch.multinomial(chances, 1)[:, 0] if forced is None else forced[:, position])
            seen.append(logits)
    return torch.stack(tokens, 1), seen


def plan_turns(twin: Twin, cond: Mapping, count: int, options: Mapping) -> Iterator[Any]:
    """Endless decoding; yields tokens."""
    while True:
        yield plan(twin, cond, count, options)[0]


def as_torch(torch: Any, entries: Mapping) -> dict[str, Any]:
    """The batch entries that the prior reads, as tensors."""
    names = ("tokens", "text", "text_mask", "label")
    arrays = {name: np.asarray(entries[name]) for name in names if name in entries}
    return {name: torch.tensor(x if x.dtype == bool else x.astype(np.int64)) for name, x in arrays.items()}


def compare(built: programs.Programs, given: tuple, what: tuple[str, ...], runs: int) -> tuple[dict[str, Any], dict]:
    """(the entry "against" of bench's report, the state after it): times training steps and decoding of both.

    `given`: (state, batch, parts, cond, keys) from `built.make`, with tokens in the batch.
    """
    state, batch, parts, cond, keys = given
    torch, config = find_torch(), built.experiment.config
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads)
    twin = Twin(built.experiment.model, state["params"])
    report: dict[str, Any] = {"torch": torch.__version__, "threads": threads}
    if "sample" in what:
        decoding = built.decoding()
        options = decoding.options
        if options.get("top_k", 0) or options.get("top_p", 1.0) < 1 or callable(options.get("guidance")):
            raise UserError(f"--against torch supports a guidance scale and temperature only, not {dict(options)}")
        arguments = built.sample_arguments()
        compiled = decoding.plan.lower(*arguments).compile()
        params = inference_params(state["params"], state["ema"]), state["extra"], parts, cond, keys
        theirs = plan_turns(twin, cond, len(keys), options)
        report["decode"] = turns(lambda: compiled(*params), lambda: next(theirs), runs)
    if "train" in what:
        step = built.step.lower(*built.train_arguments()).compile()

        def ours() -> Any:
            nonlocal state
            state, metrics = step(state, batch, parts)
            return metrics

        theirs = train_turns(twin, batch, config.optim)
        report["train"] = turns(ours, lambda: next(theirs), runs)
    return report, state


def turns(ours: Callable, theirs: Callable, runs: int) -> dict[str, Any]:
    """{"ours", "theirs": median seconds, "ratio": theirs / ours, "cpu_ratio", "load"}; two warm-up turns, then `runs`.

    "cpu_ratio" compares the CPU time of a turn over all threads: other processes hardly change it, but it includes
    spinning threads.
    """
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    spent: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(runs + 2):
        for name, turn in (("ours", ours), ("theirs", theirs)):
            time.sleep(PAUSE)
            start, before = time.perf_counter(), time.process_time()
            jax.block_until_ready(turn())
            if number >= 2:
                seconds[name].append(time.perf_counter() - start)
                spent[name].append(time.process_time() - before)
    wall, cpu = ({name: statistics.median(kept[name]) for name in kept} for kept in (seconds, spent))
    ratios = {"ratio": wall["theirs"] / wall["ours"], "cpu_ratio": cpu["theirs"] / max(cpu["ours"], 1e-9)}
    return wall | ratios | {"seconds": seconds, "load": os.getloadavg()[0]}


def lines(report: Mapping) -> list[str]:
    """The lines that bench prints, one per program."""
    human = programs.human
    return [
        f"against torch {report['torch']}, {name}: ours {human(entry['ours'], 's')}, theirs "
        f"{human(entry['theirs'], 's')}, ratio {entry['ratio']:.2f}x, of CPU time {entry['cpu_ratio']:.2f}x (median "
        f"of {len(entry['seconds']['ours'])} in turns, {report['threads']} threads, load {entry['load']:.1f})"
        for name, entry in report.items()
        if isinstance(entry, dict)
    ]
