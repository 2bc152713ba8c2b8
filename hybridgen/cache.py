"""Precomputes tokens, latents and text features of a data source with frozen models, into ArrayRecord shards.

    python -m hybridgen.cache --run runs/tokenizer --config configs/recipes/imagefolder.py --out cached --views flip

The source "records" reads them, so that a prior or a decoder trains without the tokenizer's forward pass. Training
refuses a cache that was made with another tokenizer than the config's. Entries by kind of run:

- a tokenizer with a codebook: `tokens`;
- a tokenizer with a continuous latent: `latent`. Of a Gaussian latent both mean and standard deviation are stored:
  training samples from it with a key of the sample's number, evaluation uses the mean;
- a text encoder: `text_features`, `text_features_mask` and, if it has pooled features, `text_pooled`. The number of
  positions is the encoder's, or `data.text.length` for an encoder without a limit.

Views of an image: "one" stores it once; "flip" also mirrored; "ten" stores the corners and the centre of the image
scaled by `crop`, each also mirrored (Krizhevsky et al. 2012; LlamaGen, Sun et al. 2024, with the crops 1.1 and 1.05).
`captions`: how many captions of each image are encoded, from the first on.

Letters: k views, r records of a batch, H W image.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridgen.cli import command, parser_of
from hybridgen.core import config as config_lib
from hybridgen.core import distributed, meshes, placement
from hybridgen.core.arguments import VIEWS
from hybridgen.core.errors import UserError
from hybridgen.core.progress import doing, progress
from hybridgen.data import sources, transforms
from hybridgen.data.prepare import write as write_lib
from hybridgen.data.sources import records
from hybridgen.models import contract
from hybridgen.models.contract import Part, find
from hybridgen.runs.experiment import part_shardings, read_by
from hybridgen.runs.reading import Run, find_run, load

OPTIONS = {
    "splits": ("train", "validation"),
    "views": "one",
    "crop": (1.1,),
    "captions": 1,
    "pictures": False,
    "batch": 64,
    "shards": 1,
}


class Encoder(NamedTuple):
    """A frozen model: `run(arrays [b, ...]) -> {entry: [b, ...]}`, compiled; it reads images or text."""

    reads: str  # "image" or "text"
    entry: str
    run: Any
    text: Any
    digest: str


def encoder(run: Run, mesh: Any, data: Mapping) -> Encoder:
    """The encoder of a run, for `data`. Raises UserError for a run that is no tokenizer and no text encoder."""
    run.check_finite()
    family, model, part = find(run.part.family), run.part.model, run.part
    placed = placement.put(part, part_shardings(part, mesh))
    roles = contract.roles(family)
    if "tokenizer" in roles:
        entry, program = ("tokens", _tokens) if model.vocab else ("latent", _latents)
        return Encoder("image", entry, functools.partial(jax.jit(program), placed), None, run.digest)
    if "text" in roles:
        if run.text is None:
            raise UserError(f"the {run.part.family} run has no text tokenizer (text.json), so it cannot read captions")
        text, features = read_by({"text": run}, data), functools.partial(jax.jit(_features), placed)
        return Encoder("text", "text_features", features, text, run.digest)
    raise UserError(f"a {run.part.family} run encodes neither images nor text: give a tokenizer or text encoder")


def _tokens(part: Part, image: jax.Array) -> dict[str, jax.Array]:
    tokens = part.call("encode", image)
    return {"tokens": tokens.astype("uint16") if part.model.vocab <= 2**16 else tokens}  # batches convert to int32


def _latents(part: Part, image: jax.Array) -> dict[str, jax.Array]:
    latent = part.call("encode", image)
    if not contract.optional(find(part.family), "moments"):
        return {"latent": latent}
    _, log_variance = part.call("moments", image)  # b h w d
    return {"latent": latent, "latent_std": jax.numpy.exp(0.5 * log_variance) * abs(part.model.scale)}


def _features(part: Part, ids: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    features, seen = part.call("encode", ids, mask)
    out = {"text_features": features, "text_features_mask": seen}
    if contract.optional(find(part.family), "pooled"):
        out["text_pooled"] = part.call("pooled", ids, mask)
    return {name: x.astype("float32") if x.dtype == "bfloat16" else x for name, x in out.items()}


def views_of(items: list[Mapping], resolution: int, views: str) -> np.ndarray:
    """A record's images, one per crop size -> k R R 3 uint8: all views; a mirrored view follows its original."""
    if views == "ten":
        plain = np.concatenate([transforms.crops(item["image"], resolution) for item in items])
    else:
        plain = items[0]["image"][None]
    return plain if views == "one" else np.stack([plain, plain[:, :, ::-1]], 1).reshape(-1, *plain.shape[1:])


def data_sources(data: Mapping, split: str, options: Mapping) -> list:
    """The source of a split, once per crop size. Raises UserError for a source of cached entries."""
    sizes = [data["resolution"]]
    if options["views"] == "ten":
        sizes = [round(data["resolution"] * crop) for crop in options["crop"]]
    built = [sources.build(dict(data) | {"resolution": size, "flip": False}, split) for size in sizes]
    if sources.encoders(built[0]):
        raise UserError("these records already hold cached entries: cache all entries at once, with several --run")
    return built


def about(data: Mapping, split: str, options: Mapping, encoders: list[Encoder], source: Any) -> dict[str, Any]:
    """The entries of the index that describe how the cache was made: source, encoders and options."""
    how = {name: options[name] for name in ("views", "crop", "captions", "pictures")}
    made = write_lib.about(data, source, split)
    return made | {"encoders": {one.entry: one.digest for one in encoders}, "cache": config_lib.plain(how)}


def rows(built: list, resolution: int, options: Mapping, threads: int) -> Iterator[tuple[dict, np.ndarray, list]]:
    """Yields (item, its views k R R 3 uint8, its captions) for every record."""
    for pairs in zip(*(write_lib.read_all(source, threads) for source in built), strict=True):
        items = [item for item, _ in pairs]
        texts = items[0].get("texts") or (items[0]["text"],)
        yield (
            items[0],
            views_of(items, resolution, options["views"]),
            [texts[i % len(texts)] for i in range(options["captions"])],
        )


def encoded(given: Iterator, encoders: list[Encoder], mesh: Any, batch: int, pictures: bool) -> Iterator[dict]:
    """Yields items with their cached entries `[k, ...]`; `batch`: images or captions encoded at a time, padded."""
    first = next(given)
    given, size = itertools.chain([first], given), max(batch // max(len(first[1]), len(first[2])), 1)
    while group := list(itertools.islice(given, size)):
        made = [_run(one, group, mesh, batch) for one in encoders]
        for number, (item, images, _) in enumerate(group):
            out = {name: value for name, value in item.items() if not isinstance(value, np.ndarray)}
            out |= {"image": images} if pictures else {}
            for arrays in made:
                out |= {name: value[number] for name, value in arrays.items()}
            yield out


def _run(one: Encoder, group: list, mesh: Any, batch: int) -> dict[str, np.ndarray]:
    """The output of one encoder for r records: {entry: r k ...}."""
    if one.reads == "image":
        inputs = [transforms.to_float(np.concatenate([images for _, images, _ in group]))]  # r*k R R 3
    else:
        pairs = [one.text.encode(text) for _, _, texts in group for text in texts]
        inputs = [np.stack(part) for part in zip(*pairs, strict=True)]  # r*k l
    given = {str(i): x for i, x in enumerate(inputs)}
    pieces = list(placement.by_batches(lambda given: one.run(*given.values()), given, batch, mesh))
    out = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    return {name: value.reshape(len(group), -1, *value.shape[1:]) for name, value in out.items()}


def cache(runs: list[Run], data: Mapping | None, out: Path, options: Mapping, threads: int = 4) -> None:
    """Caches the outputs of `runs` for `data` (None: that of the first run) in `out`; keeps matching splits there.

    `options`: some of `OPTIONS`; `threads`: that read and decode. Raises UserError for options out of range, runs that
    do not fit each other or the data, and for another cache in `out`.
    """
    options, mesh = checked(options), meshes.make_mesh({"data": -1})
    data = runs[0].config.data if data is None else data
    encoders = [encoder(run, mesh, data) for run in runs]
    if len({one.entry for one in encoders}) < len(encoders):
        given = ", ".join(one.entry for one in encoders)
        raise UserError(f"the runs compute the entries {given}: each entry must come from one run only")
    for run in runs:
        size = getattr(run.part.model, "resolution", data["resolution"])
        if size != data["resolution"]:
            raise UserError(
                f"data.resolution is {data['resolution']}, but the {run.part.family} run reads images of size {size}"
            )
    for split in options["splits"]:
        with doing(f"listing the records of {split}"):
            built = data_sources(data, split, options)
        description, count = about(data, split, options, encoders, built[0]), len(built[0])
        if (out / split / records.INDEX).is_file():
            compare(out, split, description)
            continue
        given = encoded(
            rows(built, data["resolution"], options, threads), encoders, mesh, options["batch"], options["pictures"]
        )
        writes = jax.process_index() == 0  # all processes encode, the first one writes
        with (
            records.writing(out, split, count, min(options["shards"], count))
            if writes
            else contextlib.nullcontext() as writer,
            jax.set_mesh(mesh),
        ):
            for item in progress(given, f"caching {split}", count):
                if writes:
                    writer.add(item)
            if writes:
                index = writer.finish(description)
                entries = ", ".join(f"{name} {about['shape']}" for name, about in index["fields"].items())
                print(f"{split}: wrote {count} records to {out / split} with {entries}, digest {index['digest']}")


def compare(out: Path, split: str, description: Mapping) -> None:
    """Raises UserError if the existing cache was made from other data, with other runs or options."""
    found = records.read_index(out, split)
    for name in ("encoders", "source", "resolution", "cache"):
        if found.get(name) != description[name]:
            raise UserError(
                f"{out / split} already holds a different cache: its {name} is {found.get(name)}, requested is "
                f"{description[name]}; remove it or give another folder"
            )
    print(f"{split}: {out / split} already holds these {found['count']} records")


def checked(options: Mapping) -> dict[str, Any]:
    """The options with defaults filled in. Raises UserError for a value out of range."""
    out = OPTIONS | dict(options)
    out["crop"] = tuple(out["crop"]) if isinstance(out["crop"], list | tuple) else (out["crop"],)
    if out["views"] not in VIEWS:
        raise UserError(f"views {out['views']!r} is not one of {', '.join(VIEWS)}")
    if not out["crop"] or not all(isinstance(crop, int | float) and 1 <= crop <= 2 for crop in out["crop"]):
        raise UserError(f"crop {out['crop']} must be numbers from 1 to 2")
    for name, most in (("captions", 64), ("batch", 2**16), ("shards", 2**16)):
        if type(out[name]) is not int or not 1 <= out[name] <= most:
            raise UserError(f"{name} {out[name]!r} is not an integer from 1 to {most}")
    return out


def stage(config: Mapping, place: Path) -> None:
    """Runs the `cache` stage of a recipe: {"cache": a run or several, "data" and any of `OPTIONS`: optional}."""
    wrong = [name for name in config if name not in (*OPTIONS, "cache", "data")]
    if wrong:
        raise UserError(f"unknown key {wrong[0]!r} in a cache stage{config_lib.hint(wrong[0], OPTIONS)}")
    runs = [config["cache"]] if isinstance(config["cache"], str) else list(config["cache"])
    options = {name: config[name] for name in config if name in OPTIONS}
    cache([load(find_run(run, place)) for run in runs], config.get("data"), place, options)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of("cache")
    args, overrides = config_lib.parse(parser, argv)
    options = {name: getattr(args, name) for name in ("views", "captions", "pictures", "batch", "shards")}
    options |= {"splits": tuple(args.split.split(",")), "crop": _numbers(args.crop)}
    data = write_lib.data_of(config_lib.load(args.config, overrides), args.stage) if args.config else None
    distributed.start(args)
    with doing(f"loading {', '.join(args.run)}"):
        runs = [load(find_run(run, None)) for run in args.run]
    cache(runs, data, args.out, checked(options), max(args.threads, 1))
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--crop {text!r} is not a comma-separated list of numbers, such as 1.1,1.05") from None


if __name__ == "__main__":
    command(main)
