"""Prints or runs the commands that train on a machine or a cluster, or prints the XLA flags for a chip.

    python -m hybridgen.launch --on tpu_vm --type v5litepod-256 --zone us-west4-a --name prior --bucket my-bucket \\
        --config configs/ar/raster.py:3b --workdir runs/prior --print
    python -m hybridgen.launch --flags v5e          # shell code that sets XLA_FLAGS and LIBTPU_INIT_ARGS

The scripts in launch/ do the work; this module fills in the hosts and topology of a TPU slice. A config that does not
load, or an unknown name, is refused here, before any machine is created. Arguments after `--` are passed to the trainer
unchanged.
"""

import json
import math
import os
import re
import shlex
import shutil
import string
import subprocess
import sys
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from hybridgen.cli import command, make_parser
from hybridgen.core import config as config_lib
from hybridgen.core.errors import UserError

# Flags by chip, each with its reason. They set schedules and limits only and never trade accuracy or determinism for
# speed: a run resumes bit for bit. They are published recommendations for dense transformers and were not measured with
# our models: compare with `hybridgen bench`. Values already in XLA_FLAGS or LIBTPU_INIT_ARGS take precedence.
OVERLAP = {
    "xla_tpu_enable_data_parallel_all_reduce_opt=true": "all-reduce gradients during the backward pass",
    "xla_tpu_data_parallel_opt_different_sized_ops=true": "also for parameters of different sizes, as ours are",
    "xla_enable_async_all_gather=true": "overlap all-gathers of sharded weights with the preceding matmul",
    "xla_tpu_enable_async_collective_fusion=true": "fuse collectives with neighbouring matmuls",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": "also the all-gathers of the fsdp axis",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true": "also over several of those matmuls",
    "xla_tpu_overlap_compute_collective_tc=true": "compute on the tensor core during a collective",
}
HOPPER = {
    "xla_gpu_enable_latency_hiding_scheduler=true": "start collectives early, overlap them with compute",
    "xla_gpu_enable_highest_priority_async_stream=true": "do not queue collectives behind compute",
    "xla_gpu_all_reduce_combine_threshold_bytes=134217728": "few large all-reduces instead of one per parameter",
    "xla_gpu_all_gather_combine_threshold_bytes=134217728": "the same for all-gathers of the fsdp axis",
    "xla_gpu_reduce_scatter_combine_threshold_bytes=67108864": "the same for the gradients of the fsdp axis",
    "xla_gpu_enable_pipelined_all_gather=true": "gather the next layer's weights during this layer, in the layer scan",
    "xla_gpu_enable_pipelined_reduce_scatter=true": "scatter the previous layer's gradients during this layer",
    "xla_gpu_enable_while_loop_double_buffering=true": "avoid copies of the pipelined buffers in the layer scan",
}
CHIPS: dict[str, dict[str, str]] = {
    "cpu": {
        # simulated devices share the cores: the last may reach a collective long after the first, mostly while
        # compiling
        "xla_cpu_collective_call_terminate_timeout_seconds=600": "the default, 40 s, aborts runs on busy machines",
    },
    "a100": HOPPER,
    "h100": HOPPER,
    "h200": HOPPER,
    "b200": HOPPER,
    "v4": OVERLAP,
    "v5e": OVERLAP,
    "v5p": OVERLAP | {"xla_tpu_megacore_fusion_allow_ags=false": "keep all-gathers asynchronous on two cores per chip"},
    "v6e": OVERLAP | {"xla_tpu_scoped_vmem_limit_kib=98304": "larger tiles, for a matmul unit twice as wide"},
}
TPU = ("v4", "v5e", "v5p", "v6e")
GOOGLE = "0x1ae0"  # PCI vendor and devices, to detect the chip of a host
PCI = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e"}


class Slice(NamedTuple):
    """A TPU slice as Google Cloud describes it."""

    chips: int
    hosts: int
    accelerator: str  # GKE's node label
    topology: str  # chips along each axis


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CUBES |= {1024: "8x8x16", 2048: "8x16x16"}
# the number in the name of a v4 or v5p slice counts cores, two per chip; a host has four chips (or all of the slice)
SLICES = {f"v4-{2 * n}": Slice(n, n // 4, "tpu-v4-podslice", sides) for n, sides in CUBES.items()}
SLICES |= {f"v5p-{2 * n}": Slice(n, n // 4, "tpu-v5p-slice", sides) for n, sides in CUBES.items()}
for _kind, _label in (("v5litepod", "tpu-v5-lite-podslice"), ("v6e", "tpu-v6e-slice")):
    SLICES |= {f"{_kind}-{n}": Slice(n, max(1, n // 4) if n > 8 else 1, _label, s) for n, s in FLAT.items()}

ROOT = Path(__file__).parents[1]
# target -> (options it needs, options it takes)
TARGETS = {
    "local": ((), ("processes", "restarts")),
    "tpu_vm": (("type", "zone"), ("name", "slices", "project", "bucket", "spot", "do")),
    "gke": (("type", "image", "bucket"), ("name", "slices", "restarts")),
    "xpk": (("type", "zone", "cluster", "image"), ("name", "slices", "project", "restarts")),
    "slurm": ((), ("name", "nodes", "restarts")),
}
ACTIONS = ("up", "keep", "create", "wait", "copy", "install", "train", "status", "logs", "stop", "delete")
OPTIONS = {
    "type": "TPU slice, such as v5litepod-256",
    "zone": "zone of the slice",
    "project": "project of the slice (default: gcloud's)",
    "name": "name of the machine or job (default: hybridgen)",
    "slices": "number of slices, data parallel between them (default: 1)",
    "bucket": "bucket that is mounted as runs/ on every host",
    "image": "container image, built with launch/Dockerfile",
    "cluster": "cluster that was created with xpk",
    "nodes": "number of machines (default: 1)",
    "processes": "number of supervised processes on this machine",
    "restarts": "number of restarts after a crash",
    "do": f"one action: {', '.join(ACTIONS)} (up: create to train, the default; keep: up, repeated after preemptions)",
}
NUMBERS = ("slices", "nodes", "processes", "restarts")


# ---- flags


def flags(chip: str) -> dict[str, list[str]]:
    """{variable: flags for `chip` that this machine's XLA knows}, without flags that the environment already sets."""
    if chip == "auto":
        chip = detect()
    if chip not in CHIPS:
        hint = config_lib.hint(chip, CHIPS)
        raise UserError(f"--flags: unknown chip {chip!r}{hint}; known chips: auto, {', '.join(CHIPS)}")
    variable = "LIBTPU_INIT_ARGS" if chip in TPU else "XLA_FLAGS"
    by_hand = {_bare(flag) for flag in os.environ.get(variable, "").split()}
    wanted = [f"--{flag}" for flag in CHIPS[chip] if _bare(flag) not in by_hand]
    return {variable: known(variable, wanted)}


def detect() -> str:
    """The chip of this machine; "cpu" if it has no chip of the table."""
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text(encoding="utf-8").strip() == GOOGLE:
            device = vendor.with_name("device").read_text(encoding="utf-8").strip()
            if device in PCI:
                return PCI[device]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, encoding="utf-8", errors="replace").stdout.lower()
        return next((chip for chip in CHIPS if chip in names), "cpu")
    return "cpu"


# A process that starts XLA with the flags: XLA has no other way to list the flags that it knows, and aborts on an
# unknown one. The probe for TPUs loads libtpu's compiler only; it does not look for a TPU or occupy one.
PROBES = {
    "XLA_FLAGS": "import jax; jax.devices('cpu')",
    "LIBTPU_INIT_ARGS": "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', 'tpu')",
}
OFFLINE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def known(variable: str, wanted: list[str]) -> list[str]:
    """The flags of `wanted` that XLA accepts; a warning on stderr names the others."""
    if variable == "LIBTPU_INIT_ARGS" and find_spec("libtpu") is None:
        _warn(f"libtpu is not installed here: the flags in {variable} are not checked")
        return wanted
    left = list(wanted)
    while left and (complaint := _complaint(variable, left)) is not None:
        lines = " ".join(line for line in complaint.splitlines() if "nknown" in line)
        bad = [flag for flag in left if re.search(rf"\b{_bare(flag)}\b", lines)]
        if not bad and _complaint(variable, []) is not None:
            _warn(f"XLA does not start here: {variable} cannot be checked and is not changed")
            return []
        # refused for another reason, such as its value: test each flag alone
        bad = bad or [flag for flag in left if _complaint(variable, [flag]) is not None] or left
        for flag in bad:
            _warn(f"this XLA does not accept {flag}: it is left out")
        left = [flag for flag in left if flag not in bad]
    return left


def _bare(flag: str) -> str:
    return flag.removeprefix("--").split("=")[0]


def _complaint(variable: str, wanted: list[str]) -> str | None:
    """None if XLA starts with these flags, else its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "MEGASCALE_"))}
    clean |= OFFLINE | {"XLA_FLAGS": "", "LIBTPU_INIT_ARGS": ""} | {variable: " ".join(wanted)}
    command = [sys.executable, "-c", PROBES[variable]]
    try:
        done = subprocess.run(command, env=clean, capture_output=True, encoding="utf-8", errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        return "XLA did not start within two minutes"
    return None if done.returncode == 0 else done.stdout + done.stderr


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def exports(chosen: dict[str, list[str]]) -> str:
    """Shell code that puts the flags before those that the environment already has; XLA takes the last of two."""
    lines = []
    for variable, ours in chosen.items():
        if ours:
            value = " ".join([*ours, os.environ.get(variable, "")]).strip()
            lines.append(f"export {variable}={shlex.quote(value)}")
    return "\n".join(lines)


# ---- launches


def launch(on: str, args: Namespace, trainer: list[str]) -> tuple[list[str], dict[str, str], str | None]:
    """(command, its environment variables, text for its standard input) for one target."""
    if on == "local":
        options = [f"--{name}={getattr(args, name)}" for name in ("processes", "restarts") if getattr(args, name)]
        return ["launch/local.sh", *options, "--", *trainer], {}, None
    if on == "slurm":
        variables = {"RESTARTS": args.restarts} if args.restarts else {}
        words = ["sbatch", f"--nodes={args.nodes or 1}", f"--job-name={args.name}", "launch/slurm.sbatch"]
        return [*words, *trainer], variables, None
    names = ("name", "zone", "type", "slices", "project", "bucket", "image", "cluster", "restarts")
    variables = {name.upper(): getattr(args, name) for name in names if getattr(args, name)}
    if on == "xpk":
        return ["launch/xpk.sh", *trainer], variables, None
    if on == "tpu_vm":
        variables |= {"SPOT": "1"} if args.spot else {}
        return ["launch/tpu_vm.sh", args.do or "up", *trainer], variables, None
    return ["kubectl", "apply", "--filename", "-"], {}, manifest(args, trainer)


def manifest(args: Namespace, trainer: list[str]) -> str:
    """launch/jobset.yaml with its $names filled in; every text as JSON, which is valid YAML."""
    part = SLICES[args.type]
    numbers = {"slices": args.slices or "1", "restarts": args.restarts or "10", "hosts": part.hosts}
    texts = {"name": args.name, "image": args.image, "bucket": args.bucket}
    texts |= {"accelerator": part.accelerator, "topology": part.topology, "chips": str(part.chips // part.hosts)}
    filled = {name: json.dumps(text) for name, text in texts.items()} | numbers
    template = string.Template((ROOT / "launch" / "jobset.yaml").read_text(encoding="utf-8"))
    return template.substitute(filled, arguments=json.dumps([*trainer, "--distributed"]))


def check(on: str, args: Namespace) -> None:
    """Raises UserError for missing options, options that the target does not take, and invalid values."""
    if Path.cwd() != ROOT or not (ROOT / "launch").is_dir():
        raise UserError(f"the current folder {Path.cwd()} is not the root of the hybridgen clone {ROOT}: change to it")
    needed, taken = TARGETS[on]
    for name in [*OPTIONS, "spot"]:
        if getattr(args, name) and name not in needed + taken:
            raise UserError(f"--{name} does not apply to --on {on}, which takes {_listed((*needed, *taken))}")
    missing = [name for name in (*needed, *(("config", "workdir") if trains(args) else ())) if not getattr(args, name)]
    if missing:
        raise UserError(f"--on {on} needs {_listed(missing)}")
    if args.type and args.type not in SLICES:
        near = config_lib.hint(args.type.replace("v5e-", "v5litepod-"), SLICES)
        raise UserError(f"--type: unknown slice {args.type!r}{near}")
    if args.do and args.do not in ACTIONS:
        raise UserError(f"--do {args.do!r} is not one of {', '.join(ACTIONS)}{config_lib.hint(args.do, ACTIONS)}")
    for name in NUMBERS:
        value = getattr(args, name)
        if value and not (re.fullmatch(r"\d{1,5}", value) and (int(value) or name == "restarts")):
            raise UserError(f"--{name} {value!r} is not a number of at least {int(name != 'restarts')}")
    args.name = args.name or "hybridgen"
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        rule = "up to 40 lower-case letters, digits and dashes, starting with a letter"
        raise UserError(f"--name {args.name!r} is not a valid name: use {rule}")
    if on in ("tpu_vm", "gke") and trains(args):
        _check_workdir(args)


def trains(args: Namespace) -> bool:
    """Whether the requested action starts a training."""
    return args.do in (None, "up", "keep", "train")


def _check_workdir(args: Namespace) -> None:
    hosts = SLICES[args.type].hosts * int(args.slices or 1)
    inside = Path(args.workdir).parts[:1] == ("runs",) and ".." not in Path(args.workdir).parts
    if args.bucket and not inside:
        raise UserError(f"--workdir {args.workdir} is not below runs/, where the bucket {args.bucket} is mounted")
    if not args.bucket and hosts > 1 and not Path(args.workdir).is_absolute():
        raise UserError(f"--workdir {args.workdir} is a separate folder on each of the {hosts} hosts: give --bucket")


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"--{name}" for name in names) or "no options"


def shown(words: list[str], variables: dict[str, str], text: str | None) -> str:
    """The command as a line of shell code; standard input as a here-document."""
    line = shlex.join([*(["env"] if variables else []), *(f"{k}={v}" for k, v in variables.items()), *words])
    return line if text is None else f"{line} <<'END'\n{text.rstrip()}\nEND"


def run(words: list[str], variables: dict[str, str], text: str | None) -> int:
    """Runs the command; without text for its standard input it replaces this process, so that signals reach it."""
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is not installed, or not in PATH")
    environment = os.environ | {"PYTHON": os.environ.get("PYTHON", sys.executable)} | variables
    if text is None:
        sys.stdout.flush()
        os.execvpe(words[0], words, environment)
    return subprocess.run(words, input=text, encoding="utf-8", env=environment).returncode


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    words, after = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = make_parser("launch", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--on", metavar="TARGET", help=f"where to train: {', '.join(TARGETS)}")
    what.add_argument("--flags", metavar="CHIP", help=f"print the XLA flags for a chip: auto, {', '.join(CHIPS)}")
    parser.add_argument("--print", action="store_true", dest="show", help="print the commands and run nothing")
    parser.add_argument("--config", metavar="FILE[:VARIANT[,KEY=VALUE...]]", help="as in hybridgen train")
    parser.add_argument("--workdir", help="path of the run folder on the hosts")
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", help=f"{text} [{', '.join(_takers(name))}]")
    parser.add_argument("--spot", action="store_true", help="use spot capacity, which may be preempted [tpu_vm]")
    args, overrides = config_lib.parse(parser, words)
    if args.flags:
        print(exports(flags(args.flags)))
        return 0
    if args.on not in TARGETS:
        hint = config_lib.hint(args.on, TARGETS)
        raise UserError(f"--on: unknown target {args.on!r}{hint}; the targets are {', '.join(TARGETS)}")
    check(args.on, args)
    trainer = arguments(args, overrides, after) if trains(args) else []
    made = launch(args.on, args, trainer)
    if args.show and args.on in ("tpu_vm", "xpk"):  # these scripts print their own commands
        return run(made[0], made[1] | {"PRINT": "1"}, made[2])
    if args.show:
        print(shown(*made))
        return 0
    return run(*made)


def _takers(name: str) -> list[str]:
    return [target for target, (needed, taken) in TARGETS.items() if name in needed + taken]


def arguments(args: Namespace, overrides: list[str], after: list[str]) -> list[str]:
    """The trainer's arguments. Raises UserError if the config does not load, or is a recipe."""
    if Path(args.config).is_absolute() and args.on not in ("local", "slurm"):
        raise UserError(f"--config {args.config} must be a path relative to the clone, which is copied to the hosts")
    config = config_lib.load(args.config, overrides)
    if "family" not in config:
        raise UserError(f"--config {args.config} has no `family`, as a recipe has none: launch the config of a model")
    settings = [f"--config.{setting}" for setting in overrides]
    if args.type:
        settings += _across(config, args.type, int(args.slices or 1))
    return ["--config", args.config, "--workdir", args.workdir, *settings, *after]


def _across(config: Any, kind: str, slices: int) -> list[str]:
    """Overrides that lay the mesh over all slices. Raises UserError if the mesh or the batch do not divide."""
    mesh, devices = config.mesh.to_dict(), SLICES[kind].chips * slices
    words = [f"--config.mesh.dcn={slices}"] if mesh["dcn"] == 1 < slices else []
    mesh |= {"dcn": slices} if words else {}
    if mesh["dcn"] not in (slices, -1):
        raise UserError(f"config key 'mesh.dcn' is {mesh['dcn']}, but --slices is {slices}: they must be equal")
    fixed = math.prod(size for size in mesh.values() if size != -1)
    if devices % fixed or (fixed != devices and -1 not in mesh.values()):
        raise UserError(f"mesh {mesh} needs {fixed} devices, but {slices} x {kind} have {devices}")
    ways = devices // (mesh["tensor"] if mesh["tensor"] != -1 else devices // fixed)
    if config.batch % config.accumulate or config.batch // config.accumulate % ways:
        says = f"batch {config.batch} in {config.accumulate} accumulation steps does not divide over {ways}"
        raise UserError(f"{says} data-parallel devices of {slices} x {kind}")
    return words


if __name__ == "__main__":
    command(main)
