"""The commands that start a training on a machine or a cluster: printed, or run; and the XLA flags of a chip.

    python -m hybridgen.launch --on tpu_vm --type v5litepod-256 --zone us-west4-a --name prior --bucket my-bucket \\
        --config configs/ar/raster.py:3b --workdir runs/prior --print
    python -m hybridgen.launch --flags v5e          # shell code that sets XLA_FLAGS and LIBTPU_INIT_ARGS

The scripts in launch/ do the work; this fills in what a slice is made of. A config that does not load, or a name that
is not known, is refused here, before anything is paid for. What follows `--` goes to the trainer as it is.
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

# Flags by chip; the words are why. Only schedules and limits, nothing that trades accuracy or determinism for speed: a
# run resumes bit for bit. They are what others publish for dense transformers, not measured with our models: try yours
# with `hybridgen bench`. What is set in XLA_FLAGS or LIBTPU_INIT_ARGS already wins over a flag here.
OVERLAP = {
    "xla_tpu_enable_data_parallel_all_reduce_opt=true": "gradients of a data axis are summed while others are computed",
    "xla_tpu_data_parallel_opt_different_sized_ops=true": "also where leaves differ in size, as ours do",
    "xla_enable_async_all_gather=true": "a gather of sharded weights does not hold up the matmul before it",
    "xla_tpu_enable_async_collective_fusion=true": "collectives run inside the matmuls beside them",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather=true": "the gathers of an fsdp axis too",
    "xla_tpu_enable_async_collective_fusion_multiple_steps=true": "and over several of those matmuls",
    "xla_tpu_overlap_compute_collective_tc=true": "the tensor core goes on while a collective is under way",
}
HOPPER = {
    "xla_gpu_enable_latency_hiding_scheduler=true": "collectives start early and end late, compute in between",
    "xla_gpu_enable_highest_priority_async_stream=true": "so that they are not queued behind compute",
    "xla_gpu_all_reduce_combine_threshold_bytes=134217728": "few large sums instead of one a leaf",
    "xla_gpu_all_gather_combine_threshold_bytes=134217728": "the same for weights of an fsdp axis",
    "xla_gpu_reduce_scatter_combine_threshold_bytes=67108864": "the same for their gradients",
    "xla_gpu_enable_pipelined_all_gather=true": "the next layer's weights while this layer computes, in the layer scan",
    "xla_gpu_enable_pipelined_reduce_scatter=true": "the last layer's gradients likewise",
    "xla_gpu_enable_while_loop_double_buffering=true": "without it the scan copies what the pipeline holds",
}
CHIPS: dict[str, dict[str, str]] = {
    "cpu": {
        # fake devices share the cores: one may reach a collective long after the first, most of all while compiling
        "xla_cpu_collective_call_terminate_timeout_seconds=600": "the default, 40 s, ends runs on busy machines",
    },
    "a100": HOPPER,
    "h100": HOPPER,
    "h200": HOPPER,
    "b200": HOPPER,
    "v4": OVERLAP,
    "v5e": OVERLAP,
    "v5p": OVERLAP | {"xla_tpu_megacore_fusion_allow_ags=false": "gathers stay asynchronous on a chip of two cores"},
    "v6e": OVERLAP | {"xla_tpu_scoped_vmem_limit_kib=98304": "larger tiles for a matmul unit twice as wide"},
}
TPU = ("v4", "v5e", "v5p", "v6e")
GOOGLE = "0x1ae0"  # PCI vendor and devices, for a host that does not say what it is
PCI = {"0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e"}


class Slice(NamedTuple):
    """A TPU slice as its clouds describe it."""

    chips: int
    hosts: int
    accelerator: str  # GKE's node label
    topology: str  # chips along each side


FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
CUBES |= {1024: "8x8x16", 2048: "8x16x16"}
# the number in the name of a v4 or v5p is that of its cores, two a chip; a host has four chips (or all that there are)
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
    "zone": "its zone",
    "project": "its project, if not gcloud's own",
    "name": "name of the machine or job (hybridgen)",
    "slices": "number of such slices, data parallel between them (1)",
    "bucket": "bucket that appears as runs/ on every host",
    "image": "container image, built with launch/Dockerfile",
    "cluster": "cluster that xpk made",
    "nodes": "machines (1)",
    "processes": "processes on this machine, supervised",
    "restarts": "how often to start again after a crash",
    "do": f"part of the work: {', '.join(ACTIONS)} (up: create to train; keep: up, and again after a preemption)",
}
NUMBERS = ("slices", "nodes", "processes", "restarts")


# ---- flags


def flags(chip: str) -> dict[str, list[str]]:
    """{variable: flags of `chip` that this machine's XLA knows}, without those that are set by hand."""
    if chip == "auto":
        chip = detect()
    if chip not in CHIPS:
        raise UserError(f"unknown chip {chip!r}{config_lib.hint(chip, CHIPS)}; they are auto, {', '.join(CHIPS)}")
    variable = "LIBTPU_INIT_ARGS" if chip in TPU else "XLA_FLAGS"
    by_hand = {_bare(flag) for flag in os.environ.get(variable, "").split()}
    wanted = [f"--{flag}" for flag in CHIPS[chip] if _bare(flag) not in by_hand]
    return {variable: known(variable, wanted)}


def detect() -> str:
    """The chip of this machine; "cpu" where there is none that the table knows."""
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        if vendor.read_text().strip() == GOOGLE:
            device = vendor.with_name("device").read_text().strip()
            if device in PCI:
                return PCI[device]
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True).stdout.lower()
        return next((chip for chip in CHIPS if chip in names), "cpu")
    return "cpu"


# a process that starts XLA with the flags: nobody else can say which it knows, and one that it does not know ends it.
# The one for the TPU loads libtpu's compiler, looks for no TPU and takes none.
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
    """Those of `wanted` that XLA starts with; a warning on stderr names the others."""
    if variable == "LIBTPU_INIT_ARGS" and find_spec("libtpu") is None:
        _warn("libtpu is not installed here: the flags are not checked")
        return wanted
    left = list(wanted)
    while left and (complaint := _complaint(variable, left)) is not None:
        lines = " ".join(line for line in complaint.splitlines() if "nknown" in line)
        bad = [flag for flag in left if re.search(rf"\b{_bare(flag)}\b", lines)]
        if not bad and _complaint(variable, []) is not None:
            _warn(f"XLA does not start here, so {variable} cannot be checked and is left alone")
            return []
        # refused for another reason, such as its value: each by itself says which
        bad = bad or [flag for flag in left if _complaint(variable, [flag]) is not None] or left
        for flag in bad:
            _warn(f"this XLA does not know {flag}: dropped")
        left = [flag for flag in left if flag not in bad]
    return left


def _bare(flag: str) -> str:
    return flag.removeprefix("--").split("=")[0]


def _complaint(variable: str, wanted: list[str]) -> str | None:
    """None if XLA starts with these flags, else what it says."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "MEGASCALE_"))}
    clean |= OFFLINE | {"XLA_FLAGS": "", "LIBTPU_INIT_ARGS": ""} | {variable: " ".join(wanted)}
    command = [sys.executable, "-c", PROBES[variable]]
    try:
        done = subprocess.run(command, env=clean, capture_output=True, text=True, errors="replace", timeout=120)
    except subprocess.TimeoutExpired:
        return "it does not start within two minutes"
    return None if done.returncode == 0 else done.stdout + done.stderr


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def exports(chosen: dict[str, list[str]]) -> str:
    """Shell code that sets the flags in front of what is set by hand; XLA takes the last of two."""
    lines = []
    for variable, ours in chosen.items():
        if ours:
            value = " ".join([*ours, os.environ.get(variable, "")]).strip()
            lines.append(f"export {variable}={shlex.quote(value)}")
    return "\n".join(lines)


# ---- launches


def launch(on: str, args: Namespace, trainer: list[str]) -> tuple[list[str], dict[str, str], str | None]:
    """(command, variables that it needs, text for its standard input) for one target."""
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
    """launch/jobset.yaml with its $names filled in; every text as JSON, which is YAML too."""
    part = SLICES[args.type]
    numbers = {"slices": args.slices or "1", "restarts": args.restarts or "10", "hosts": part.hosts}
    texts = {"name": args.name, "image": args.image, "bucket": args.bucket}
    texts |= {"accelerator": part.accelerator, "topology": part.topology, "chips": str(part.chips // part.hosts)}
    filled = {name: json.dumps(text) for name, text in texts.items()} | numbers
    template = string.Template((ROOT / "launch" / "jobset.yaml").read_text(encoding="utf-8"))
    return template.substitute(filled, arguments=json.dumps([*trainer, "--distributed"]))


def check(on: str, args: Namespace) -> None:
    """Raises UserError for options that a target lacks, does not take, or that cannot work."""
    if Path.cwd() != ROOT or not (ROOT / "launch").is_dir():
        raise UserError(f"the current folder, {Path.cwd()}, is not a clone of hybridgen: its files are what runs")
    needed, taken = TARGETS[on]
    for name in [*OPTIONS, "spot"]:
        if getattr(args, name) and name not in needed + taken:
            raise UserError(f"--{name} is not for --on {on}; it takes {_listed((*needed, *taken))}")
    missing = [name for name in (*needed, *(("config", "workdir") if trains(args) else ())) if not getattr(args, name)]
    if missing:
        raise UserError(f"--on {on} needs {_listed(missing)}")
    if args.type and args.type not in SLICES:
        near = config_lib.hint(args.type.replace("v5e-", "v5litepod-"), SLICES)
        raise UserError(f"unknown slice {args.type!r}{near}")
    if args.do and args.do not in ACTIONS:
        raise UserError(f"--do {args.do!r} is not one of {', '.join(ACTIONS)}{config_lib.hint(args.do, ACTIONS)}")
    for name in NUMBERS:
        value = getattr(args, name)
        if value and not (re.fullmatch(r"\d{1,5}", value) and (int(value) or name == "restarts")):
            raise UserError(f"--{name} {value!r} is not a number from {int(name != 'restarts')} on")
    args.name = args.name or "hybridgen"
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
        raise UserError(f"--name {args.name!r} is not up to 40 small letters, digits and dashes, a letter first")
    if on in ("tpu_vm", "gke") and trains(args):
        _check_workdir(args)


def trains(args: Namespace) -> bool:
    """Whether what is asked for ends in a training, rather than in one of the other actions."""
    return args.do in (None, "up", "keep", "train")


def _check_workdir(args: Namespace) -> None:
    hosts = SLICES[args.type].hosts * int(args.slices or 1)
    inside = Path(args.workdir).parts[:1] == ("runs",) and ".." not in Path(args.workdir).parts
    if args.bucket and not inside:
        raise UserError(f"--workdir {args.workdir} is not under runs/, where the bucket {args.bucket} is mounted")
    if not args.bucket and hosts > 1 and not Path(args.workdir).is_absolute():
        raise UserError(f"--workdir {args.workdir} is another folder on each of {hosts} hosts: --bucket is one for all")


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(f"--{name}" for name in names) or "no options"


def shown(words: list[str], variables: dict[str, str], text: str | None) -> str:
    """The command as one would type it; standard input as a here-document."""
    line = shlex.join([*(["env"] if variables else []), *(f"{k}={v}" for k, v in variables.items()), *words])
    return line if text is None else f"{line} <<'END'\n{text.rstrip()}\nEND"


def run(words: list[str], variables: dict[str, str], text: str | None) -> int:
    """Runs the command; without standard input of ours it takes this process's place, so that signals reach it."""
    if shutil.which(words[0]) is None:
        raise UserError(f"{words[0]} is not installed, or not to be found in PATH")
    environment = os.environ | {"PYTHON": os.environ.get("PYTHON", sys.executable)} | variables
    if text is None:
        sys.stdout.flush()
        os.execvpe(words[0], words, environment)
    return subprocess.run(words, input=text, text=True, env=environment).returncode


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    words, after = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = make_parser("launch", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--on", metavar="TARGET", help=f"where: {', '.join(TARGETS)}")
    what.add_argument("--flags", metavar="CHIP", help=f"print the XLA flags of auto, {', '.join(CHIPS)}")
    parser.add_argument("--print", action="store_true", dest="show", help="print the commands, run nothing")
    parser.add_argument("--config", metavar="FILE[:VARIANT[,KEY=VALUE...]]", help="as for hybridgen train")
    parser.add_argument("--workdir", help="run folder, as the hosts see it")
    for name, text in OPTIONS.items():
        parser.add_argument(f"--{name}", help=f"{text} [{', '.join(_takers(name))}]")
    parser.add_argument("--spot", action="store_true", help="capacity that may be taken back [tpu_vm]")
    args, overrides = config_lib.parse(parser, words)
    if args.flags:
        print(exports(flags(args.flags)))
        return 0
    if args.on not in TARGETS:
        raise UserError(f"unknown target {args.on!r}{config_lib.hint(args.on, TARGETS)}; they are {', '.join(TARGETS)}")
    check(args.on, args)
    trainer = arguments(args, overrides, after) if trains(args) else []
    made = launch(args.on, args, trainer)
    if args.show and args.on in ("tpu_vm", "xpk"):  # these know themselves what they would run
        return run(made[0], made[1] | {"PRINT": "1"}, made[2])
    if args.show:
        print(shown(*made))
        return 0
    return run(*made)


def _takers(name: str) -> list[str]:
    return [target for target, (needed, taken) in TARGETS.items() if name in needed + taken]


def arguments(args: Namespace, overrides: list[str], after: list[str]) -> list[str]:
    """The trainer's own arguments. Raises UserError if the config does not load, or has nothing to train."""
    if Path(args.config).is_absolute() and args.on not in ("local", "slurm"):
        raise UserError(f"--config {args.config} is not a path in the clone: the hosts would not have it")
    config = config_lib.load(args.config, overrides)
    if "family" not in config:
        raise UserError(f"{args.config} has no family to train; launch its stages one after the other")
    settings = [f"--config.{setting}" for setting in overrides]
    if args.type:
        settings += _across(config, args.type, int(args.slices or 1))
    return ["--config", args.config, "--workdir", args.workdir, *settings, *after]


def _across(config: Any, kind: str, slices: int) -> list[str]:
    """What lays the mesh over so many slices. UserError if mesh or batch do not divide: hosts would find out later."""
    mesh, devices = config.mesh.to_dict(), SLICES[kind].chips * slices
    words = [f"--config.mesh.dcn={slices}"] if mesh["dcn"] == 1 < slices else []
    mesh |= {"dcn": slices} if words else {}
    if mesh["dcn"] not in (slices, -1):
        raise UserError(f"config key 'mesh.dcn' {mesh['dcn']} is not the number of slices, {slices}")
    fixed = math.prod(size for size in mesh.values() if size != -1)
    if devices % fixed or (fixed != devices and -1 not in mesh.values()):
        raise UserError(f"mesh {mesh} takes {fixed} devices, and {slices} x {kind} have {devices}")
    ways = devices // (mesh["tensor"] if mesh["tensor"] != -1 else devices // fixed)
    if config.batch % config.accumulate or config.batch // config.accumulate % ways:
        says = f"batch {config.batch} in {config.accumulate} accumulation steps does not divide over {ways}"
        raise UserError(f"{says} data-parallel devices of {slices} x {kind}")
    return words


if __name__ == "__main__":
    command(main)
