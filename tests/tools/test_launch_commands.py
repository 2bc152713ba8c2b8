"""`hybridgen launch`: what it prints for each target, the JobSet against a strict schema, the flags of a chip."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybridgen import launch
from hybridgen.cli import COMMANDS
from hybridgen.core.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = "configs/tokenizers/vq.py:tiny"
RUN = ["--config", CONFIG, "--workdir", "runs/a b", "--config.batch=512"]
TRAINER = [*RUN, "--allow", "it's"]
ACROSS = [*RUN, "--config.mesh.dcn=2", "--allow", "it's"]  # two slices
GKE = ["--on", "gke", "--type", "v5litepod-256", "--image", "registry/a:1", "--bucket", "bk"]


def printed(capfd, monkeypatch, *words: str) -> str:
    """What `--print` prints, be it the process or a script that takes its place."""

    def execute(file: str, line: list[str], environment: dict[str, str]) -> None:
        raise SystemExit(subprocess.run([file, *line[1:]], env=environment).returncode)

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(os, "execvpe", execute)
    with pytest.raises(SystemExit, match="0"):
        raise SystemExit(launch.main([*words, *RUN, "--print", "--", "--allow", "it's"]))
    return capfd.readouterr().out


def test_local(capfd, monkeypatch):
    line = printed(capfd, monkeypatch, "--on", "local", "--processes", "2", "--restarts", "3")
    assert shlex.split(line) == ["launch/local.sh", "--processes=2", "--restarts=3", "--", *TRAINER]


def test_slurm(capfd, monkeypatch):
    line = printed(capfd, monkeypatch, "--on", "slurm", "--nodes", "4", "--name", "prior", "--restarts", "3")
    start = ["env", "RESTARTS=3", "sbatch", "--nodes=4", "--job-name=prior", "launch/slurm.sbatch"]
    assert shlex.split(line) == [*start, *TRAINER]


def test_tpu_vm(capfd, monkeypatch):
    words = ["--type", "v5litepod-256", "--zone", "z", "--name", "prior", "--slices", "2", "--bucket", "bk", "--spot"]
    lines = printed(capfd, monkeypatch, "--on", "tpu_vm", *words).splitlines()
    create, waiting, pack, copy, install, train = map(shlex.split, lines)
    gcloud = ["gcloud", "compute", "tpus", "queued-resources"]
    made = ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--node-count=2"]
    assert create == [*gcloud, "create", "prior", "--zone=z", *made, "--node-prefix=prior", "--spot"]
    assert waiting[0] == "until" and lines[1].count("describe prior --zone=z") == 1
    assert pack[:2] == ["bash", "-c"] and pack[-1] == copy[5]
    assert copy[4:] == ["scp", pack[-1], "prior:hybridgen.tar.gz", "--zone=z", "--node=all", "--worker=all"]
    for line in (install, train):
        assert line[:-1] == [*gcloud, "ssh", "prior", "--zone=z", "--node=all", "--worker=all"]
        script = line[-1].removeprefix("--command=")
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
    assert "gcsfuse --implicit-dirs --file-mode=600 --dir-mode=700 bk runs" in install[-1]
    inner = shlex.split(train[-1])[shlex.split(train[-1]).index("-c") + 1]  # of bash -c, on the far end
    command = inner.split(";")[1]
    assert shlex.split(command) == ["launch/local.sh", "--restarts=10", "--", *ACROSS, "--distributed"]


def test_xpk(capfd, monkeypatch):
    words = ["--type", "v6e-256", "--zone", "z", "--cluster", "c", "--image", "i", "--slices", "2", "--project", "p"]
    line = shlex.split(printed(capfd, monkeypatch, "--on", "xpk", *words))
    assert line[:3] == ["xpk", "workload", "create"]
    options = dict(word.removeprefix("--").split("=", 1) for word in line[3:])
    inside = shlex.split(options.pop("command"))
    assert inside == ["launch/local.sh", "--restarts=10", "--", *ACROSS, "--distributed"]
    known = {"workload": "hybridgen", "cluster": "c", "zone": "z", "tpu-type": "v6e-256", "num-slices": "2"}
    known |= {"docker-image": "i", "project": "p", "max-restarts": "1000", "termination-grace-period-seconds": "300"}
    assert options == known


# ---- GKE

NAME = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
COUNT = re.compile(r"[0-9]+")
LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?")


def quantity(value: Any) -> bool:
    return isinstance(value, str) and COUNT.fullmatch(value) is not None


def positive(value: Any) -> bool:
    return type(value) is int and value > 0


def natural(value: Any) -> bool:
    return type(value) is int and value >= 0


def strings(value: Any) -> bool:
    return isinstance(value, dict) and all(LABEL.fullmatch(k) and isinstance(v, str) for k, v in value.items())


TPU = {"google.com/tpu!": quantity}
CONTAINER = {
    "name!": NAME,
    "image!": str,
    "command": [str],
    "args": [str],
    "env": [{"name!": re.compile(r"[A-Z_]+"), "value!": str}],
    "ports": [{"containerPort!": positive}],
    "securityContext": {
        "allowPrivilegeEscalation!": bool,
        "readOnlyRootFilesystem!": bool,
        "capabilities!": {"drop!": [{"ALL"}]},
    },
    "resources!": {"requests!": TPU, "limits!": TPU},
    "volumeMounts": [{"name!": NAME, "mountPath!": re.compile(r"/[\w./-]+")}],
}
VOLUME = {
    "name!": NAME,
    "emptyDir": {"medium": {"Memory"}},
    "csi": {"driver!": str, "volumeAttributes": strings},
}
POD = {
    "restartPolicy!": {"Never"},  # what a Job with a pod failure policy needs
    "terminationGracePeriodSeconds": positive,
    "nodeSelector": strings,
    "automountServiceAccountToken": bool,
    "securityContext": {
        "runAsNonRoot!": bool,
        "runAsUser!": positive,
        "runAsGroup!": positive,
        "fsGroup": positive,
        "seccompProfile": {"type!": {"RuntimeDefault"}},
    },
    "containers!": [CONTAINER],
    "volumes": [VOLUME],
}
POD_RULE = {
    "action!": {"FailJob", "Ignore", "Count"},
    "onExitCodes": {"containerName": NAME, "operator!": {"In", "NotIn"}, "values!": [positive]},
    "onPodConditions": [{"type!": {"DisruptionTarget"}, "status!": {"True"}}],
}
JOB = {
    "parallelism!": positive,
    "completions!": positive,
    "completionMode": {"Indexed"},
    "backoffLimit!": natural,
    "podFailurePolicy": {"rules!": [POD_RULE]},
    "template!": {"metadata": {"annotations": strings}, "spec!": POD},
}
RULE = {
    "name!": re.compile(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?"),
    "action!": {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    "onJobFailureReasons": [{"BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"}],
    "onJobFailureMessagePatterns": [str],
}
JOBSET = {
    "apiVersion!": {"jobset.x-k8s.io/v1alpha2"},
    "kind!": {"JobSet"},
    "metadata!": {"name!": NAME, "annotations": strings},
    "spec!": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {
            "maxRestarts!": natural,
            "restartStrategy": {"Recreate", "BlockingRecreate"},
            "rules": [RULE],
        },
        "replicatedJobs!": [{"name!": NAME, "replicas!": positive, "template!": {"spec!": JOB}}],
    },
}


def faults(value: Any, schema: Any, where: str = "") -> list[str]:
    """What `value` has that the schema lacks, lacks that it needs ("name!"), or has otherwise."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{where}: not an object"]
        known = {name.rstrip("!"): part for name, part in schema.items()}
        bad = [f"{where}.{name}: unknown" for name in value if name not in known]
        bad += [f"{where}.{n[:-1]}: missing" for n in schema if n.endswith("!") and n[:-1] not in value]
        return bad + [line for n in value if n in known for line in faults(value[n], known[n], f"{where}.{n}")]
    if isinstance(schema, list):
        if not isinstance(value, list) or not value:
            return [f"{where}: not a list"]
        return [line for i, part in enumerate(value) for line in faults(part, schema[0], f"{where}[{i}]")]
    if isinstance(schema, set):
        good = value in schema
    elif isinstance(schema, re.Pattern):
        good = isinstance(value, str) and schema.fullmatch(value) is not None
    elif isinstance(schema, type):
        good = type(value) is schema
    else:
        assert isinstance(schema, Callable)
        good = schema(value)
    return [] if good else [f"{where}: {value!r}"]


def manifest(capfd, monkeypatch, *words: str) -> dict:
    out = printed(capfd, monkeypatch, *GKE, *words)
    first, _, rest = out.partition("\n")
    assert first == "kubectl apply --filename - <<'END'" and rest.endswith("\nEND\n")
    return yaml.safe_load(rest.removesuffix("END\n"))


@pytest.mark.parametrize("slices", ["1", "2"])
def test_the_jobset(capfd, monkeypatch, slices):
    jobset = manifest(capfd, monkeypatch, "--slices", slices, "--name", "prior")
    assert faults(jobset, JOBSET) == []
    (part,) = jobset["spec"]["replicatedJobs"]
    job = part["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert part["replicas"] == int(slices) and job["parallelism"] == job["completions"] == 64
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": "4"}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
    }
    trainer = ACROSS if slices == "2" else TRAINER
    assert [*container["command"], *container["args"]] == ["launch/local.sh", *trainer, "--distributed"]
    assert len(f"prior-{part['name']}-{slices}-63") <= 63  # a pod's host name
    # mounts and volumes belong together, and the bucket is where the runs are
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "bk"


def test_what_the_jobset_does_after_an_exit_code(capfd, monkeypatch):
    """Played by the rules of JobSet: the first that matches reason and message, RestartJobSet if none does."""
    spec = manifest(capfd, monkeypatch)["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]

    def action(code: int, disrupted: bool = False) -> str:
        reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
        for rule in job["podFailurePolicy"]["rules"]:
            if code in rule.get("onExitCodes", {}).get("values", []) or (disrupted and "onPodConditions" in rule):
                what = "has condition DisruptionTarget" if disrupted else f"failed with exit code {code}"
                reason, message = "PodFailurePolicy", f"Pod default/prior-slice-0-1 {what} matching FailJob rule"
                break
        for rule in spec["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [""])
            if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in patterns):
                return rule["action"]
        return "RestartJobSet"

    assert job["backoffLimit"] == 0 and spec["failurePolicy"]["maxRestarts"] == 10
    assert action(2) == "FailJobSet"
    assert [action(code) for code in (1, 42, 130, 134, 137)] == ["RestartJobSet"] * 5
    assert action(130, disrupted=True) == action(137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda jobset: jobset["spec"].update(replicas=1), ".spec.replicas: unknown"),
        (lambda jobset: jobset["spec"]["replicatedJobs"][0].pop("name"), ".spec.replicatedJobs[0].name: missing"),
        (lambda jobset: jobset["metadata"].update(name="Prior"), ".metadata.name: 'Prior'"),
        (lambda jobset: jobset["spec"]["failurePolicy"].update(maxRestarts="3"), ".maxRestarts: '3'"),
    ],
)
def test_the_schema_is_strict(capfd, monkeypatch, change, says):
    jobset = manifest(capfd, monkeypatch)
    change(jobset)
    (fault,) = faults(jobset, JOBSET)
    assert fault.endswith(says)


def test_it_is_applied(tmp_path):
    """Without --print: kubectl gets the manifest, and its exit code is passed on."""
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >{tmp_path}/words\ncat >{tmp_path}/manifest\nexit 7\n')
    kubectl.chmod(0o755)
    command = [sys.executable, "-m", "hybridgen.launch", *GKE, *RUN]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 7 and (tmp_path / "words").read_text() == "apply --filename -\n"
    assert faults(yaml.safe_load((tmp_path / "manifest").read_text()), JOBSET) == []


# ---- slices and flags


def test_slices_are_whole():
    for name, part in launch.SLICES.items():
        sides = [int(side) for side in part.topology.split("x")]
        chips = 1
        for side in sides:
            chips *= side
        cores = 2 if name.startswith(("v4", "v5p")) else 1
        assert chips == part.chips and int(name.rpartition("-")[2]) == chips * cores, name
        assert part.chips % part.hosts == 0 and part.chips // part.hosts in (1, 4, 8), name


def test_unknown_flags_are_dropped_with_a_warning(monkeypatch, capsys):
    """With the real XLA: all of two tables, one that no XLA has, and one that is set by hand."""
    table = launch.CHIPS["h100"] | launch.CHIPS["cpu"]
    more = {"xla_made_up=true": "to be dropped", "xla_dump_to=x": "is set by hand"}
    monkeypatch.setitem(launch.CHIPS, "h100", table | more)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=mine")
    chosen = launch.flags("h100")
    assert chosen == {"XLA_FLAGS": [f"--{flag}" for flag in table]}
    assert capsys.readouterr().err == "warning: this XLA does not accept --xla_made_up=true: it is left out\n"
    (line,) = launch.exports(chosen).splitlines()
    assert shlex.split(line) == ["export", "XLA_FLAGS=" + " ".join([*chosen["XLA_FLAGS"], "--xla_dump_to=mine"])]


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `tpu`")
@pytest.mark.parametrize("chip", launch.TPU)
def test_libtpu_knows_the_flags(chip, monkeypatch, capsys):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    table = launch.CHIPS[chip]
    monkeypatch.setitem(launch.CHIPS, chip, table | {"xla_tpu_made_up=true": "to be dropped"})
    assert launch.flags(chip) == {"LIBTPU_INIT_ARGS": [f"--{flag}" for flag in table]}
    assert "does not accept --xla_tpu_made_up=true" in capsys.readouterr().err


def test_flags_that_cannot_be_checked_are_left_alone(monkeypatch, capsys):
    monkeypatch.setitem(launch.PROBES, "XLA_FLAGS", "raise SystemExit(1)")
    assert launch.flags("h100") == {"XLA_FLAGS": []} and launch.exports({"XLA_FLAGS": []}) == ""
    assert "cannot be checked" in capsys.readouterr().err


# ---- what is refused


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--on", "gk"], "--on: unknown target 'gk'; did you mean 'gke'?"),
        (["--flags", "v5"], "--flags: unknown chip 'v5'; did you mean 'v5p'?"),
        ([*GKE, *RUN, "--type", "v5e-256"], "--type: unknown slice 'v5e-256'; did you mean 'v5litepod-256'?"),
        (["--on", "gke", *RUN], "--on gke needs --type, --image, --bucket"),
        (["--on", "slurm"], "--on slurm needs --config, --workdir"),
        (["--on", "slurm", "--zone", "z", *RUN], "--zone does not apply to --on slurm, which takes --name, --nodes"),
        (["--on", "slurm", "--nodes", "0", *RUN], "--nodes '0' is not a number of at least 1"),
        (["--on", "slurm", "--name", "A b", *RUN], "--name 'A b' is not a valid name: use up to 40 lower-case letters"),
        ([*GKE, *RUN, "--workdir", "out"], "--workdir out is not below runs/, where the bucket bk is mounted"),
        ([*GKE, *RUN, "--config.optim.lrr=1"], "did you mean 'optim.lr'?"),
        ([*GKE, *RUN, "--slices", "2", "--config.mesh.dcn=4"], "'mesh.dcn' is 4, but --slices is 2: "),
        ([*GKE, *RUN, "--config.mesh.fsdp=3"], "needs 3 devices, but 1 x v5litepod-256 have 256"),
        ([*GKE, *RUN, "--config.mesh.data=16"], "needs 16 devices, but 1 x v5litepod-256 have 256"),
        ([*GKE, *RUN, "--config.batch=64"], "batch 64 in 1 accumulation steps does not divide over 256 data-parallel"),
        ([*GKE, *RUN, "--config.mesh.tensor=4", "--config.accumulate=3"], "does not divide over 64 data-parallel"),
        ([*GKE, *RUN, "--config", f"{ROOT}/{CONFIG}"], "must be a path relative to the clone"),
        (["--on", "local", *RUN[2:4], "--config", "configs/recipes/shapes.py:tiny"], "shapes.py:tiny has no `family`"),
        (["--on", "tpu_vm", "--type", "v6e-16", "--zone", "z", *RUN], "is a separate folder on each of the 4 hosts"),
        (["--on", "tpu_vm", "--type", "v6e-8", "--zone", "z", "--do", "stpo"], "did you mean 'stop'?"),
        (["--on", "local", *RUN, "--proceses", "2"], "did you mean '--processes'?"),
    ],
)
def test_what_is_refused(words, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        launch.main([*words, "--print"])
    assert says in str(error.value) and "\n" not in str(error.value)


def test_elsewhere_it_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is not the root of the hybridgen clone"):
        launch.main(["--on", "local", *RUN])


def test_it_is_a_command():
    assert "launch" in COMMANDS
