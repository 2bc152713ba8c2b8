"""Run in a process of its own, with eight host devices: the same steps on several meshes, one line of JSON each.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/sharded_cases.py prior float32 10 '{"data": 2}' ...

HOSTS="127.0.0.1:PORT 2 0" makes it process 0 of 2.
"""

import argparse
import json
import math
import os
import re
import sys

import jax
import numpy as np
import tiny

from hybridgen.core import distributed, meshes, placement, sharding, trees
from hybridgen.nn.attention import Mask
from hybridgen.nn.blocks import AdaLNBlock, LlamaBlock

ROWS = 16
WIDE = {"width": 32, "heads": 4}  # heads, width and words divide by every mesh axis here
OPTIONS = {"ema__decay": 0.9, "optim__lr": 1e-3, "optim__warmup": 5, "optim__decay": 0.1}


def system(name: str, mesh: dict, heads: int = 4, **changes):
    """An experiment of this name on this mesh."""
    wide = WIDE | {"heads": heads}
    if name == "toy":
        return tiny.experiment(tiny.toy, {}, None, mesh, **changes)
    if name == "fsq":
        return tiny.experiment("tokenizers.vq", tiny.FSQ | {"attention": True}, None, mesh, **changes)
    if name == "moving":
        model = tiny.quantised(tiny.MOVING, revive_below=0.3, decay=0.9)
        return tiny.experiment("tokenizers.vq", model, None, mesh, **changes)
    tokenizer = tiny.tokenizer()
    parts = {"tokenizer": tokenizer}
    if name == "prior":
        return tiny.experiment("ar.raster", tiny.prior_options(tokenizer, **wide), parts, mesh, **changes)
    if name == "decoder":
        model = tiny.decoder_options(tokenizer, cross=True, token_corruption=0.3, classes=tiny.CLASSES, **wide)
        return tiny.experiment("diffusion.dit", model, parts, mesh, **changes)
    # a gradient from the decoder to the prior, the prior's own plans, and a true rollout at steps 0, 4, 8 ...
    model = tiny.cascade_options(tokenizer, wide, wide, mode="features", own=0.5, rollout_every=4)
    return tiny.experiment("hybrid.cascade", model, parts, mesh, **changes)


def batch_of(name: str, step: int) -> dict:
    # a few batches in turn
    make = tiny.toy_batch if name == "toy" else tiny.batch
    return make(ROWS, ROWS * (step % 3))


def measure(name: str, dtype: str, steps: int, mesh: dict, **changes) -> dict:
    run = tiny.Run(system(name, mesh, **OPTIONS | changes), batch_of(name, 0), dtype)
    start = run.state
    losses = [run.step(batch_of(name, step))["loss"] for step in range(steps)]
    places = zip(jax.tree.leaves(run.abstract), jax.tree.leaves(run.state), strict=True)
    flat = trees.flatten(run.state)
    return {
        "mesh": mesh,
        "losses": losses,
        "dtype": sorted({str(leaf.dtype) for path, leaf in flat.items() if path.startswith("params/")}),
        "skipped": int(run.state["health"]["skipped"]),
        "pinned": all(want.sharding.is_equivalent_to(leaf.sharding, leaf.ndim) for want, leaf in places),
        "donated": all(leaf.is_deleted() for leaf in jax.tree.leaves(start)),
        "devices": sorted({len(leaf.devices()) for leaf in flat.values()}),
        "shards": {path: [leaf.shape, leaf.addressable_shards[0].data.shape] for path, leaf in flat.items()},
        "copies": all(copies_agree(leaf) for leaf in flat.values()),
        "final": {
            path: placement.whole(leaf).tolist()
            for path, leaf in flat.items()
            if path.startswith(("extra/", "params/")) and (leaf.size < 600 or path.startswith("extra/"))
        },
    }


def copies_agree(leaf: jax.Array) -> bool:
    """Devices that hold the same part of an array hold the same bits."""
    seen: dict[str, bytes] = {}
    return all(
        seen.setdefault(str(part.index), np.asarray(part.data).tobytes()) == np.asarray(part.data).tobytes()
        for part in leaf.addressable_shards
    )


def memory(mesh: dict) -> dict:
    """Bytes of one device that a step of the toy needs on this mesh, besides arguments and results."""
    batch = tiny.toy_batch(64, n=64, d=16)
    run = tiny.Run(system("toy", mesh), batch)
    with jax.set_mesh(run.experiment.mesh):
        placed = placement.to_global(batch, run.experiment.mesh)
    return {"mesh": mesh, "temporary": run.memory(placed).temp_size_in_bytes}


def gathers(sizes: dict) -> dict:
    """Elements of the largest array that a block gathers: Llama's in a step of decoding, adaLN's of many rows."""
    mesh, rows, width = meshes.make_mesh(sizes), 4, 64
    options = {"heads": 2, "head_width": 32, "hidden": 96}  # two heads do not divide over four devices
    condition = {"condition": jax.ShapeDtypeStruct((rows, width), "float32", sharding=placement.batch_sharding(mesh))}
    step = largest_gather(LlamaBlock(**options), mesh, (rows, 1, width), {})
    return {"step": step, "rows": largest_gather(AdaLNBlock(**options), mesh, (rows, 512, width), condition)}


def largest_gather(block, mesh, shape: tuple, inputs: dict) -> int:
    x = jax.ShapeDtypeStruct(shape, "float32", sharding=placement.batch_sharding(mesh))
    make = lambda x, inputs: block.init(jax.random.key(0), x, Mask(), **inputs)["params"]  # noqa: E731
    params = jax.eval_shape(make, x, inputs)
    places = sharding.param_shardings(params, mesh)
    placed = jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=to), params, places)
    run = jax.jit(lambda params, x, inputs: block.apply({"params": params}, x, Mask(), **inputs)[0])
    with jax.set_mesh(mesh):
        text = run.lower(placed, x, inputs).compile().as_text()
    shapes = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text)
    return max(math.prod(int(side) for side in shape.split(",")) for shape in shapes)


def places(sizes: dict) -> dict:
    """Where rows of a batch of 16 lie on a mesh of all devices."""
    mesh = meshes.make_mesh(sizes)
    batch = placement.to_global({"x": np.arange(32).reshape(16, 2)}, mesh)["x"]
    rows = [[shard.device.id, np.asarray(shard.data)[:, 0].tolist()] for shard in batch.addressable_shards]
    return {"shape": dict(mesh.shape), "rows": rows, "local": placement.local_rows(mesh, 16)}


def main() -> None:
    name, dtype, steps, *rest = sys.argv[1:]
    changes = dict(text.removeprefix("--").split("=") for text in rest if text.startswith("--"))
    changes = {key: json.loads(value) for key, value in changes.items()}
    if "HOSTS" in os.environ:  # "coordinator count process"
        coordinator, count, process = os.environ["HOSTS"].split()
        options = {"coordinator": coordinator, "num_processes": int(count), "process_id": int(process)}
        distributed.start(argparse.Namespace(**options, init_timeout=60, distributed=False))
    for mesh in (json.loads(text) for text in rest if not text.startswith("--")):
        with jax.enable_x64(dtype == "float64"):
            if name in ("memory", "places", "gathers"):
                out = {"memory": memory, "places": places, "gathers": gathers}[name](mesh)
            else:
                out = measure(name, dtype, int(steps), mesh, **changes)
        print(json.dumps(out), flush=True)


if __name__ == "__main__":
    main()
