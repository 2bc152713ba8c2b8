"""The ranges of the entries that every stage config has (configs/common.py), and of options that many models have."""

from hybridgen.core.ranges import FLAG, LARGE, MOST, Range, count, number, one_of, share

RATE = 1 - 1e-9  # the largest decay of a moving average: with 1 it would never move
DTYPES = ("float32", "bfloat16", "float64")
MANY = 2**20  # the largest number of pictures, batches or threads that can be meant

OPTIM: dict[str, Range] = {
    "lr": number(0.0, 1e3),
    "warmup": count(),
    "final": share(),
    "clip": number(),
    "decay": number(0.0, 1e4),
    "b1": number(0.0, RATE),
    "b2": number(0.0, RATE),
    "eps": number(1e-30, 1.0),
}
STAGE: dict[str, Range] = {
    "seed": count(),
    "batch": count(1, 2**24),
    "accumulate": count(1, 2**24),
    "steps": count(),
    "frozen_dtype": one_of(*DTYPES),
    "data.resolution": count(1, 2**16),
    "data.workers": count(0, 4096),
    "data.threads": count(0, 4096),
    "data.retry": number(0.0, 1e6),
    "data.flip": FLAG,
    "data.text.length": count(1, 2**16),
    "data.text.max_words": count(1, 2**24),
    "checkpoint.every": count(),
    "checkpoint.keep": count(1),
    "checkpoint.keep_every": count(),
    "health.streak": count(1),
    "health.rollbacks": count(),
    "health.spike": number(0.0, LARGE),
    "health.hang": number(0.0, MOST),
    "ema.decay": share(),
    "log.every": count(1),
    "eval.every": count(),
    "eval.batches": count(1, MANY),
    "sample.every": count(),
    "sample.count": count(1, MANY),
    "count": count(1, MANY),
    "profile.start": count(),
    "profile.steps": count(),
}
STAGE |= {f"mesh.{axis}": count(-1) for axis in ("dcn", "data", "fsdp", "tensor")}
STAGE |= {f"optim.{name}": known for name, known in OPTIM.items()}

# of a model and of the models within it, by the last word of the name: checked when a config is read, because the
# checks of a family (its RANGES) need the data and the parts; one value or a tuple of them
SIZES = ("heads", "kv_heads", "depth", "patch", "width", "blocks", "codebook_size", "channels")
MODEL: dict[str, Range] = dict.fromkeys(SIZES, count(1, none=True, least=1, most=64))
MODEL |= {"levels": count(2, none=True, least=1, most=64), "dtype": one_of(*DTYPES)}

SIZE = count(1, 2**16, least=2, most=2)  # of a picture: the side of a square, or height and width
WEIGHT = number(0.0, 1e6)  # of a term of a loss
DTYPE = {"dtype": one_of(*DTYPES)}
TRANSFORMER: dict[str, Range] = DTYPE | {
    "width": count(1, 2**20),
    "depth": count(1, 2**14),
    "heads": count(1, 2**14),
    "hidden": count(0, 2**24),
    "remat": one_of("none", "full", "dots"),
    "unroll": count(-1, 2**14),
}
TEXT: dict[str, Range] = {"text_vocab": count(0, 2**24), "text_length": count(0, 2**20), "text_depth": count(0, 2**14)}
CLASSES: dict[str, Range] = {"classes": count(0, 2**24), "cond_drop_prob": share()}
