"""The entries that all stage configs share, with their meaning and defaults."""

from ml_collections import ConfigDict

ADAMW = {
    "kind": "adamw",  # adamw | adafactor | muon (hidden matrices; AdamW for the rest)
    "lr": 1e-3,
    "schedule": "cosine",  # constant | cosine | linear, after a linear warmup of `warmup` updates
    "warmup": 50,
    "final": 0.02,  # learning rate at the end, as a share of lr
    "clip": 1.0,  # gradient clipping by the global norm of the group; 0: none
    "decay": 0.0,  # weight decay of the parameters whose path matches `decay_on`
    "decay_on": "kernel$",
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "groups": {},  # name: {"match": path pattern, and entries that differ}
}

HEALTH = {
    "spike": 10.0,  # a step with a gradient norm this many times the average is bad; 0: no spike detection
    "streak": 3,  # after this many bad steps in a row the run restores a checkpoint and skips the bad batches
    "rollbacks": 5,  # largest number of such rollbacks
    "skip": (),  # intervals (first, end) of batches to skip from the start
    "hang": 1800,  # seconds without progress after which the process prints its stacks and exits; 0: never
}

# an untrained part for `bench`: 16 x 16 tokens of images at 32, with very little computation
UNTRAINED_256 = "configs/tokenizers/vq.py:tiny,model.patch=2,model.channels=(32,)"


def stage(family: str, model: dict, data: dict, **changes) -> ConfigDict:
    """A stage config: `family`, its `model` options, `data`, and `changes` to the defaults below ("optim.lr")."""
    config = ConfigDict(convert_dict=True)
    config.family = family
    config.model = ConfigDict(model, convert_dict=True)
    config.data = ConfigDict(data, convert_dict=True)
    config.seed = 0
    config.batch = 64  # global batch size, over all hosts and accumulation steps
    config.accumulate = 1
    config.steps = 1000
    config.parts = ConfigDict()  # name: run folder, such as "../tokenizer"
    config.init_from = ConfigDict()  # subtree here, or "all": "run" or "run:subtree"
    config.trainable = ()  # ordered (path pattern, whether it trains); the first match counts, the default is True
    config.frozen_dtype = "float32"
    config.optim = ConfigDict(ADAMW, convert_dict=True)
    config.ema = ConfigDict({"decay": 0.0, "skip": "^disc/"})
    config.mesh = ConfigDict({"dcn": 1, "data": -1, "fsdp": 1, "tensor": 1})
    config.health = ConfigDict(HEALTH)
    config.checkpoint = ConfigDict({"every": 500, "keep": 2, "keep_every": 0})  # 0: none is kept forever
    config.log = ConfigDict({"every": 50, "wandb": ""})  # steps; project of Weights & Biases to log to as well
    config.eval = ConfigDict({"every": 0, "batches": 4})
    config.sample = ConfigDict({"every": 0, "count": 16, "options": ConfigDict()})
    config.profile = ConfigDict({"start": 10, "steps": 0})
    for name, value in changes.items():
        *path, last = name.split("__")
        node = config
        for part in path:
            node = node[part]
        node[last] = ConfigDict(value, convert_dict=True) if isinstance(value, dict) else value
    return config


def shapes(**options) -> dict:
    """The `data` entries of the built-in captioned shapes; `options` are those of the source."""
    resolution = options.pop("resolution", 32)
    length = options.pop("length", 16)
    return {
        "source": "shapes",
        "options": options,
        "resolution": resolution,
        "flip": False,
        "workers": 0,
        "threads": 1,
        "retry": 120.0,  # seconds for which a file is read again while its storage fails
        "text": {"kind": "words", "length": length},
    }


# the demo's images: six shapes, eight colours, two sizes, nine positions, four relations, one or two objects
DEMO = {
    "shapes": ("circle", "square", "triangle", "cross", "diamond", "heart"),
    "templates": 2,
    "jitter": 0.02,
    "length": 14,
}

# all that the source `shapes` offers
FULL = {
    "resolution": 64,
    "sizes": ("small", "medium", "large"),
    "objects": (1, 2, 3, 4),
    "counts": True,
    "backgrounds": ("white", "black", "grey"),
    "languages": ("en", "zh"),
    "length": 52,
}


def unknown(variant: str, *known: str) -> ValueError:
    """The error for a variant that a config does not have."""
    return ValueError(f"unknown variant {variant!r}: one of {', '.join(known)}, or none")
