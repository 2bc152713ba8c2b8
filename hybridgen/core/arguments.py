"""The arguments of the commands, apart from the modules that execute them: `--help` imports neither JAX nor Flax.

`launch` has its own: it imports nothing large.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from hybridgen.core import config as config_lib

VIEWS = ("one", "flip", "ten")  # of an image, in cache
WHAT = ("train", "sample")  # programs, in bench and preflight
DTYPES = ("float32", "float16", "bfloat16", "int8")  # of a bundle's parameters
TOPOLOGIES = (
    "v5e:2x2 to v5e:16x16, v6e:2x2 to v6e:16x16, v4:2x2x1, v5p:2x2x1 to v5p:16x16x24, tpu7x:2x2x1, "
    "h100:8, h100:4x8 (also a100, h200, b200)"
)
SAMPLING = "A run's model has further sampling options: `--run RUN --help` lists them."

# ---------------------------------------------------------------- types


def a_path(text: str) -> Path:
    """An argparse type: a path. Refuses an empty one, as from an unset shell variable: it means the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; for the current folder give '.'")
    return Path(text)


def a_folder(text: str) -> Path:
    """An argparse type: the path of an output folder."""
    path = a_path(text)
    if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp") and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is the name of an image; give a folder for the images")
    return path


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least 1")
    return int(text)


def seed_list(text: str) -> tuple[int, ...]:
    """The value of --seeds: different whole numbers, separated by commas."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise argparse.ArgumentTypeError(f"{text!r} must be different whole numbers, separated by commas")
    return tuple(map(int, parts))


def program_names(text: str) -> tuple[str, ...]:
    """An argparse type: some of `WHAT`, separated by commas."""
    given = text.split(",")
    if not set(given) <= set(WHAT):
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(WHAT)} and {','.join(WHAT)}")
    return tuple(name for name in WHAT if name in given)


# ---------------------------------------------------------------- groups that several commands have


def add_processes(parser: argparse.ArgumentParser) -> None:
    """The options of a command that runs in several processes."""
    group = parser.add_argument_group("multiple processes", "run the same command on every host, with its --process-id")
    group.add_argument("--distributed", action="store_true", help="detect the other processes (TPU pod or SLURM)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 listens")
    group.add_argument("--num-processes", type=int, metavar="N", help="total number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, 0 to N - 1")
    group.add_argument(
        "--init-timeout", type=int, default=300, metavar="SECONDS", help="time to wait for the others (default 300)"
    )


def _config_or_run(parser: argparse.ArgumentParser) -> None:
    """`--config` and `--from`, of which a command takes one."""
    group = parser.add_mutually_exclusive_group(required=True)
    config_lib.add_argument(group, required=False)
    text = "fine-tune this run, bundle or imported checkpoint, on the images in --config.path=FOLDER"
    group.add_argument("--from", dest="start", metavar="RUN", help=text)


def _checkpoint(parser: argparse.ArgumentParser) -> None:
    text = "training step of the checkpoint to load (default: the newest valid one)"
    parser.add_argument("--checkpoint", type=int, metavar="N", help=text)
    parser.epilog = SAMPLING


def _programs(parser: argparse.ArgumentParser) -> None:
    """The options that bench and preflight share."""
    config_lib.add_argument(parser)
    parser.add_argument("--stage", help="the stage of the recipe, if the config is one")
    text = "train, sample or train,sample (default: both)"
    parser.add_argument("--what", type=program_names, metavar="NAMES", help=text)
    parser.add_argument("--count", type=int, metavar="N", help="images per sampling call (default: the config's)")
    parser.add_argument("--cached", action="store_true", help="use cached tokens or latents instead of encoding images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")


# ---------------------------------------------------------------- commands


def _train(parser: argparse.ArgumentParser) -> None:
    _config_or_run(parser)
    parser.add_argument("--workdir", required=True, type=a_path, help="run folder: checkpoints, metrics, sample grids")
    parser.add_argument("--allow", default="", metavar="KEY,...", help="config keys that may differ on resume")
    add_processes(parser)


def _recipe(parser: argparse.ArgumentParser) -> None:
    _config_or_run(parser)
    parser.add_argument("--workdir", required=True, type=a_path, help="folder with one run folder per stage")
    text = "run the recipe once for each of these seeds, and compare the results"
    parser.add_argument("--seeds", type=seed_list, metavar="N,N,...", help=text)
    parser.add_argument("--allow", default="", metavar="KEY,...", help="config keys that may differ on resume")
    add_processes(parser)


def _sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="run folder or bundle of a cascade or another generative model")
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be given several times")
    parser.add_argument("--prompts", type=Path, help="a text file with one prompt per line")
    text = "a class, for a class-conditional model; may be given several times"
    parser.add_argument("--label", action="append", type=int, help=text)
    parser.add_argument("--count", type=int, default=1, help="images per prompt (default: 1)")
    parser.add_argument("--size", metavar="HxW", help="image size, one of those that a run with buckets was trained on")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images (default: 0)")
    parser.add_argument("--batch", type=int, default=16, help="images generated at a time (default: 16)")
    parser.add_argument("--out", type=a_folder, default=Path("samples"), help="output folder (default: samples)")
    parser.add_argument("--draft", action="store_true", help="show the tokenizer's draft next to each render")
    add_processes(parser)
    _checkpoint(parser)


def _evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", required=True, help="run folder")
    parser.add_argument("--splits", default="validation", help="comma-separated: train, validation, holdout")
    parser.add_argument("--count", type=int, default=256, help="captions per split (default: 256)")
    parser.add_argument("--batch", type=int, default=64, help="images generated at a time (default: 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generated images (default: 0)")
    parser.add_argument("--out", type=Path, help="folder of the report (default: RUN/evaluation)")
    parser.add_argument("--features", metavar="RUN", help="run of a feature network, for distances such as FID")
    text = "what distances are measured to: a split, a folder of images or an .npz file of ADM (default: train)"
    parser.add_argument("--reference", help=text)
    text = "largest number of reference images (default: --count)"
    parser.add_argument("--reference-count", type=int, metavar="N", help=text)
    add_processes(parser)
    _checkpoint(parser)


def _preflight(parser: argparse.ArgumentParser) -> None:
    _programs(parser)
    text = f"target of the compilation: {TOPOLOGIES} (default: this machine)"
    parser.add_argument("--topology", metavar="CHIP:SIDES", help=text)
    text = "number of slices of the topology (default: 1), data parallel between them (mesh axis dcn)"
    parser.add_argument("--slices", type=int, default=1, metavar="N", help=text)
    text = "compile training steps for TPUs with all of XLA's optimizations, as the run will (slower)"
    parser.add_argument("--exact", action="store_true", help=text)
    parser.add_argument("--suggest", action="store_true", help="search meshes, remat policies and batches for training")


def _bench(parser: argparse.ArgumentParser) -> None:
    _programs(parser)
    parser.add_argument("--steps", type=positive, default=10, help="timed runs of each program (default: 10)")
    parser.add_argument("--against", choices=("torch",), help="also time the same model in PyTorch; implies --cached")


def _cache(parser: argparse.ArgumentParser) -> None:
    text = "run folder of a tokenizer or text encoder; may be given several times"
    parser.add_argument("--run", action="append", required=True, help=text)
    parser.add_argument("--config", metavar="FILE[:VARIANT]", help="config whose data is cached (default: first run's)")
    parser.add_argument("--stage", help="stage whose data is cached, if the config is a recipe")
    parser.add_argument("--out", required=True, type=Path, help="output folder, with one folder of records per split")
    parser.add_argument("--split", default="train,validation", help="comma-separated (default: train,validation)")
    parser.add_argument("--views", default="one", help=f"views of each image: {', '.join(VIEWS)} (default: one)")
    parser.add_argument("--crop", default="1.1", metavar="SIZES", help="scales of view ten, such as 1.1,1.05")
    parser.add_argument("--captions", type=int, default=1, metavar="N", help="captions encoded per image (default: 1)")
    parser.add_argument("--pictures", action="store_true", help="store the images too, for decoders and evaluations")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="images encoded at a time (default: 64)")
    parser.add_argument("--shards", type=int, default=1, metavar="N", help="files per split (default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="threads that read images")
    add_processes(parser)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", help="name of the official model family; see --list")
    parser.add_argument("input", nargs="?", type=Path, help="file or folder of weights; with --export a run folder")
    parser.add_argument("out", nargs="?", type=Path, help="new run folder; with --export a new .safetensors file")
    text = "official config: a JSON file or a preset (default: config.json in the folder of the weights)"
    parser.add_argument("--config", help=text)
    text = "run of a model that this one needs, such as tokenizer=runs/vq; may be given several times"
    parser.add_argument("--part", action="append", default=[], metavar="NAME=RUN", help=text)
    text = "folder of the text tokenizer (default: the folder of the weights)"
    parser.add_argument("--text", type=Path, metavar="FOLDER", help=text)
    parser.add_argument("--export", action="store_true", help="write a run folder as official weights")
    parser.add_argument("--list", action="store_true", help="list sources, licences and sizes")


def _export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="run folder; its parts must be where its config says")
    parser.add_argument("out", type=Path, help="new folder")
    text = f"dtype of the stored parameters: {', '.join(DTYPES)} (default: float32)"
    parser.add_argument("--dtype", default="float32", help=text)
    parser.add_argument("--checkpoint", type=int, metavar="N", help="step to export (default: the newest valid one)")


def _verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="name of the official model family, with any suffix")
    parser.add_argument("folder", type=Path, help="folder with config.json, weights.safetensors and io.npz")


ADD: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "train": _train,
    "recipe": _recipe,
    "sample": _sample,
    "evaluate": _evaluate,
    "preflight": _preflight,
    "bench": _bench,
    "cache": _cache,
    "convert": _convert,
    "export": _export,
    "verify": _verify,
}
