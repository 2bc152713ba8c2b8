"""Run in a process of its own, with eight host devices: the same steps on several meshes, one line of JSON each.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded_cases.py prior float32 10 '{"data": 2}' ...
"""

import json
import sys

import jax
import numpy as np
import tiny

from hybridgen import trees

ROWS = 16
WIDE = {"width": 32, "heads": 4}  # heads, width and words divide by every mesh axis here


def system(name: str, mesh: dict, **changes):
    """An experiment of this name on this mesh."""
    if name == "toy":
        return tiny.experiment(tiny.toy, {}, None, mesh, **changes)
    if name in ("fsq", "moving"):
        model = {"fsq": tiny.FSQ | {"attention": True}, "moving": tiny.MOVING | {"revive_below": 0.3, "decay": 0.9}}[
            name
        ]
        return tiny.experiment("tokenizers.vq", model, None, mesh, **changes)
    tokenizer = tiny.tokenizer()
    parts = {"tokenizer": tokenizer}
    if name == "prior":
        return tiny.experiment("ar.raster", tiny.prior_options(tokenizer, **WIDE), parts, mesh, **changes)
    if name == "decoder":
        model = tiny.decoder_options(tokenizer, cross=True, corrupt=0.3, classes=tiny.CLASSES, **WIDE)
        return tiny.experiment("diffusion.dit", model, parts, mesh, **changes)
    model = tiny.cascade_options(tokenizer, WIDE, WIDE, own=0.5, rollout_every=4, mode="soft")
    return tiny.experiment("hybrid.cascade", model, parts, mesh, **changes)


def batch_of(name: str, step: int) -> dict:
    # a few batches in turn
    make = tiny.toy_batch if name == "toy" else tiny.batch
    return make(ROWS, ROWS * (step % 3))


def measure(name: str, dtype: str, steps: int, mesh: dict, **changes) -> dict:
    options = {"ema__decay": 0.9, "optim__lr": 1e-3, "optim__warmup": 5, "optim__decay": 0.1} | changes
    run = tiny.Run(system(name, mesh, **options), batch_of(name, 0), dtype)
    start = run.state
    losses = [run.step(batch_of(name, step))["loss"] for step in range(steps)]
    places = zip(jax.tree.leaves(run.abstract), jax.tree.leaves(run.state), strict=True)
    flat = trees.flatten(run.state)
    return {
        "mesh": mesh,
        "losses": losses,
        "pinned": all(want.sharding.is_equivalent_to(leaf.sharding, leaf.ndim) for want, leaf in places),
        "donated": all(leaf.is_deleted() for leaf in jax.tree.leaves(start)),
        "shards": {path: [leaf.shape, leaf.addressable_shards[0].data.shape] for path, leaf in flat.items()},
        "final": {
            path: np.asarray(leaf).tolist()
            for path, leaf in flat.items()
            if path.startswith(("extra/", "params/")) and leaf.size < 600
        },
    }


def main() -> None:
    name, dtype, steps, *meshes = sys.argv[1:]
    changes = {}
    for text in meshes:
        if text.startswith("--"):
            key, _, value = text[2:].partition("=")
            changes[key] = json.loads(value)
            continue
        with jax.enable_x64(dtype == "float64"):
            print(json.dumps(measure(name, dtype, int(steps), json.loads(text), **changes)), flush=True)


if __name__ == "__main__":
    main()
