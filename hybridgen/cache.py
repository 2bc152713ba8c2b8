"""Caches what frozen models make of a source: tokens, latents and text features, in ArrayRecord shards.

    python -m hybridgen.cache --run runs/tokenizer --config configs/recipes/imagefolder.py --out cached --views flip

The source "records" gives batches with them, so that a prior or a decoder trains without the tokenizer's forward pass
(and refuses to train with another tokenizer than theirs). A run with a codebook gives `tokens`, one with a continuous
latent `latent` (of a Gaussian one mean and deviation: training draws from it by the sample's own number, an evaluation
takes the mean), a text tower `text_features`, `text_features_mask` and, where it has one, `text_pooled`, of as many
positions as it reads, or, where it has no bound, as `data.text.length` says.

Views of a picture: "one"; "flip", also mirrored; "ten", the corners and the centre of the picture `crop` times as large
and each mirrored (Krizhevsky et al. 2012; LlamaGen, Sun et al. 2024, with the crops 1.1 and 1.05). Captions: the first
so many of each picture.

Letters: k views, r records of a batch, H W picture.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from hybridgen.cli import command, make_parser
from hybridgen.core import config as config_lib
from hybridgen.core import distributed, meshes, placement
from hybridgen.core.errors import UserError
from hybridgen.core.progress import progress
from hybridgen.data import sources, transforms
from hybridgen.data.prepare import write as write_lib
from hybridgen.data.sources import records
from hybridgen.models import contract
from hybridgen.models.contract import Part, find
from hybridgen.runs.experiment import part_shardings, read_by
from hybridgen.runs.reading import Run, find_run, load

VIEWS = ("one", "flip", "ten")
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
    """A frozen model: `run(arrays [b, ...]) -> {entry: [b, ...]}`, compiled, for arrays of one kind."""

    reads: str  # "image" or "text"
    entry: str
    run: Any
    text: Any
    digest: str


def encoder(run: Run, mesh: Any, data: Mapping) -> Encoder:
    """The encoder in a run, for `data`. Raises UserError for a run that encodes nothing."""
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
    raise UserError(f"a {run.part.family} run encodes neither pictures nor text: there is nothing of it to cache")


def _tokens(part: Part, image: jax.Array) -> dict[str, jax.Array]:
    tokens = part.call("encode", image)
    return {"tokens": tokens.astype("uint16") if part.model.vocab <= 2**16 else tokens}  # a batch has them as int32


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
    """A record's pictures, one for each crop -> k R R 3 uint8: each view, and mirrored if they are, next to it."""
    if views == "ten":
        plain = np.concatenate([transforms.crops(item["image"], resolution) for item in items])
    else:
        plain = items[0]["image"][None]
    return plain if views == "one" else np.stack([plain, plain[:, :, ::-1]], 1).reshape(-1, *plain.shape[1:])


def data_sources(data: Mapping, split: str, options: Mapping) -> list:
    """The source of a split, one for each crop. Raises UserError for a source of cached entries."""
    sizes = [data["resolution"]]
    if options["views"] == "ten":
        sizes = [round(data["resolution"] * crop) for crop in options["crop"]]
    built = [sources.build(dict(data) | {"resolution": size, "flip": False}, split) for size in sizes]
    if sources.encoders(built[0]):
        raise UserError("these records hold cached entries already: cache all of them at once, with several runs")
    return built


def about(data: Mapping, split: str, options: Mapping, encoders: list[Encoder], source: Any) -> dict[str, Any]:
    """What the index says of a cache, besides its records: what it was made of, and how."""
    how = {name: options[name] for name in ("views", "crop", "captions", "pictures")}
    made = write_lib.about(data, source, split)
    return made | {"encoders": {one.entry: one.digest for one in encoders}, "cache": config_lib.plain(how)}


def rows(built: list, resolution: int, options: Mapping, threads: int) -> Iterator[tuple[dict, np.ndarray, list]]:
    """(item, its views k R R 3 uint8, its captions) of every record."""
    for pairs in zip(*(write_lib.read_all(source, threads) for source in built), strict=True):
        items = [item for item, _ in pairs]
        texts = items[0].get("texts") or (items[0]["text"],)
        yield (
            items[0],
            views_of(items, resolution, options["views"]),
            [texts[i % len(texts)] for i in range(options["captions"])],
        )


def encoded(given: Iterator, encoders: list[Encoder], mesh: Any, batch: int, pictures: bool) -> Iterator[dict]:
    """Items with their cached entries, `[k, ...]`; `batch`: most pictures or captions at a time, in one shape."""
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
    """What one encoder makes of r records: {entry: r k ...}."""
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
    """Caches what `runs` make of `data` (None: that of the first run). What is there and fits is left as it is."""
    options, mesh = checked(options), meshes.make_mesh({"data": -1})
    data = runs[0].config.data if data is None else data
    encoders = [encoder(run, mesh, data) for run in runs]
    if len({one.entry for one in encoders}) < len(encoders):
        raise UserError(f"the runs give {', '.join(one.entry for one in encoders)}: each entry can come from one only")
    for run in runs:
        size = getattr(run.part.model, "resolution", data["resolution"])
        if size != data["resolution"]:
            raise UserError(
                f"the {run.part.family} run reads pictures at {size}, and data.resolution is {data['resolution']}"
            )
    for split in options["splits"]:
        built = data_sources(data, split, options)
        description, count = about(data, split, options, encoders, built[0]), len(built[0])
        if (out / split / records.INDEX).is_file():
            compare(out, split, description)
            continue
        given = encoded(
            rows(built, data["resolution"], options, threads), encoders, mesh, options["batch"], options["pictures"]
        )
        writes = jax.process_index() == 0  # the others help to encode
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
                print(f"{split}: {count} records in {out / split}, each {entries}, digest {index['digest']}")


def compare(out: Path, split: str, description: Mapping) -> None:
    """Raises UserError where a cache that is there was made of something else."""
    found = records.read_index(out, split)
    for name in ("encoders", "source", "resolution", "cache"):
        if found.get(name) != description[name]:
            raise UserError(
                f"{out / split} is a cache of something else: its {name} is {found.get(name)}, and "
                f"{description[name]} is requested; remove it or give another folder"
            )
    print(f"{split}: {found['count']} records in {out / split} are there already")


def checked(options: Mapping) -> dict[str, Any]:
    """Options with what is left out; UserError for one out of range."""
    out = OPTIONS | dict(options)
    out["crop"] = tuple(out["crop"]) if isinstance(out["crop"], list | tuple) else (out["crop"],)
    if out["views"] not in VIEWS:
        raise UserError(f"views {out['views']!r} is not one of {', '.join(VIEWS)}")
    if not out["crop"] or not all(isinstance(crop, int | float) and 1 <= crop <= 2 for crop in out["crop"]):
        raise UserError(f"crop {out['crop']} is not within 1 and 2")
    for name, most in (("captions", 64), ("batch", 2**16), ("shards", 2**16)):
        if type(out[name]) is not int or not 1 <= out[name] <= most:
            raise UserError(f"{name} {out[name]!r} is not within 1 and {most}")
    return out


def stage(config: Mapping, place: Path) -> None:
    """The `cache` stage of a recipe: {"cache": run or runs, and of `OPTIONS` and "data" what differs}."""
    wrong = [name for name in config if name not in (*OPTIONS, "cache", "data")]
    if wrong:
        raise UserError(f"unknown key {wrong[0]!r} of a cache stage{config_lib.hint(wrong[0], OPTIONS)}")
    runs = [config["cache"]] if isinstance(config["cache"], str) else list(config["cache"])
    options = {name: config[name] for name in config if name in OPTIONS}
    cache([load(find_run(run, place)) for run in runs], config.get("data"), place, options)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser("cache", __doc__)
    parser.add_argument("--run", action="append", required=True, help="run of a tokenizer or text tower; or several")
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="whose data is cached (default: the first run's)")
    parser.add_argument("--stage", help="the stage whose data it is, if the config is a recipe")
    parser.add_argument("--out", required=True, type=Path, help="folder that gets a folder of records for each split")
    parser.add_argument("--split", default="train,validation", help="comma-separated (default: train,validation)")
    parser.add_argument("--views", default="one", help=f"of each picture: {', '.join(VIEWS)} (default: one)")
    parser.add_argument("--crop", default="1.1", metavar="SIZES", help="of view ten: how much larger, such as 1.1,1.05")
    parser.add_argument("--captions", type=int, default=1, metavar="N", help="of each picture, for a text tower")
    parser.add_argument("--pictures", action="store_true", help="keep the pictures too, for a decoder and evaluations")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="pictures encoded at a time")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files a split (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="that read and decode")
    distributed.add_arguments(parser)
    args, overrides = config_lib.parse(parser, argv)
    options = {name: getattr(args, name) for name in ("views", "captions", "pictures", "batch", "shards")}
    options |= {"splits": tuple(args.split.split(",")), "crop": _numbers(args.crop)}
    data = write_lib.data_of(config_lib.load(args.config, overrides), args.stage) if args.config else None
    distributed.start(args)
    cache([load(find_run(run, None)) for run in args.run], data, args.out, checked(options), max(args.threads, 1))
    return 0


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--crop {text!r} is no list of numbers") from None


if __name__ == "__main__":
    command(main)
