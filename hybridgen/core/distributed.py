"""Multi-process programs: connecting the processes, exchanging text and agreeing on numbers. Hangs: watchdog.py.

    hybridgen train ... --coordinator 10.0.0.2:8476 --num-processes 2 --process-id 0   # and with 1 on the other host
    hybridgen train ... --distributed                                         # TPU pods and SLURM, which JAX detects

All hosts run the same command on the same files (a shared run folder). Before JAX connects, the processes register at
the coordinator's address, so that the program can name a missing process and the command that starts it. Text between
processes goes through JAX's coordination service, which any thread may use; numbers that decide about the next step go
through a collective that every process issues at the same point of the program (`Agreement`).
"""

import argparse
import collections
import json
import os
import re
import select
import shlex
import socket
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybridgen.core.errors import PeerError, UserError

HEARTBEAT = 30  # seconds without a heartbeat after which JAX considers a process dead
PATIENCE = 5.0  # seconds between messages that name the missing processes


def start(args: argparse.Namespace) -> None:
    """Connects this process with the others, if there are any. Call it before any use of a device.

    Raises UserError for inconsistent options, PeerError if the other processes do not connect in time.
    """
    given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(args, name) is not None]
    if not given:
        if args.distributed or _detected():
            _connect_detected(args.init_timeout)
        return
    if len(given) < 3:
        raise UserError("--coordinator, --num-processes and --process-id must be given together")
    if args.num_processes < 1 or not 0 <= args.process_id < args.num_processes:
        raise UserError(f"--process-id {args.process_id} is not within 0 and --num-processes {args.num_processes} - 1")
    if args.init_timeout < 1:
        raise UserError(f"--init-timeout {args.init_timeout} is below 1 second")
    if args.num_processes == 1:
        return
    meet(args.coordinator, args.num_processes, args.process_id, args.init_timeout)
    _initialize(
        coordinator_address=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        # JAX would listen on every interface of this machine
        coordinator_bind_address=args.coordinator,
        initialization_timeout=args.init_timeout,
    )


def _detected() -> bool:
    """Whether the environment says that this process is one of several."""
    slurm = os.environ.get("SLURM_PROCID") and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    return bool(slurm) or "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")


def _connect_detected(timeout: int) -> None:
    """Connects with the processes that the environment describes, after they have registered at its coordinator."""
    from jax._src.clusters import ClusterEnv  # jax.distributed.initialize uses it, but names no missing process

    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(given, None, None, None, None, timeout)
    except (RuntimeError, OSError) as error:
        raise PeerError(f"--distributed: the coordinator was not found: {error}") from None
    address, count, process, devices = found
    if None in (address, count, process):
        raise UserError(
            "--distributed: the environment does not describe the other processes; "
            "give --coordinator, --num-processes and --process-id"
        )
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if alone or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None  # JAX would give a SLURM task one GPU, even if the task has all GPUs of the node
    meet(address, count, process, timeout, everywhere=True)
    options = {"num_processes": count, "process_id": process, "local_device_ids": devices}
    _initialize(coordinator_address=address, initialization_timeout=timeout, **options)


def _initialize(**options: Any) -> None:
    # "deactivate": under SLURM, JAX would hide all GPUs but one from a process without a list of local devices
    options |= {"heartbeat_timeout_seconds": HEARTBEAT, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        raise PeerError(f"the processes did not connect: {str(error).splitlines()[0]}") from None
    if jax.config.jax_platforms == "cpu" or jax.default_backend() == "cpu":
        # gloo would mix up the messages of two programs that run at once
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.process_index():  # only process 0 prints to stdout; errors of the others are on stderr
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def command_of(process: int) -> str:
    """This program's command line with `--process-id` set to `process`, if it has that option at all."""
    words, skip = ["hybridgen", os.path.basename(sys.argv[0]).removesuffix(".py"), *sys.argv[1:]], False
    if words[1] == "hybridgen":
        del words[1]
    out = []
    for word in words:
        if not skip and word.partition("=")[0] != "--process-id":
            out.append(word)
        skip = not skip and word == "--process-id"
    return shlex.join(out + (["--process-id", str(process)] if len(out) < len(words) else []))


# ---- meeting


def meet(address: str, count: int, process: int, timeout: float, everywhere: bool = False) -> None:
    """Returns when all `count` processes have called it with the same address. PeerError after `timeout` seconds.

    Each process sends one JSON object over TCP; process 0 answers when all are connected. Every few seconds it prints
    which processes are missing. everywhere: process 0 listens on all of its interfaces, not on this address only.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator {address!r} is not HOST:PORT")
    deadline = time.monotonic() + timeout
    if process == 0:
        _receive(("" if everywhere else host.strip("[]"), int(port)), count, deadline)
    else:
        _report((host.strip("[]"), int(port)), count, process, deadline)


def _receive(place: tuple[str, int], count: int, deadline: float) -> None:
    """Process 0: listens until all others are connected, then lets them continue."""
    both = not place[0] and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in place[0] else socket.AF_INET
    try:
        server = socket.create_server(place, family=family, dualstack_ipv6=both)
    except OSError as error:
        kind = UserError if place[0] else PeerError  # an earlier process may still be using the port
        raise kind(f"--coordinator {place[0]}:{place[1]}: cannot listen at this address: {error.strerror}") from None
    come: dict[int, socket.socket] = {}
    last_report = time.monotonic()
    with server:
        try:
            while len(come) < count - 1:
                now = time.monotonic()
                missing = [i for i in range(1, count) if i not in come]
                if now > deadline:
                    raise PeerError(f"{_who(missing, count)} did not connect in time")
                if now - last_report >= PATIENCE:
                    last_report = now
                    print(
                        f"waiting for {_who(missing, count)}; start it with\n  {command_of(missing[0])}",
                        file=sys.stderr,
                        flush=True,
                    )
                if not select.select([server], [], [], 0.2)[0]:
                    continue
                peer, _ = server.accept()
                number, problem = _introduced(peer, count)
                if number in come and _gone(come[number]):
                    come.pop(number).close()
                if problem or number in come:
                    _send(peer, {"error": problem or f"another process has --process-id {number} already"})
                    peer.close()
                else:
                    come[number] = peer
            for peer in come.values():
                _send(peer, {"go": True})
        finally:
            for peer in come.values():
                peer.close()


def _introduced(peer: socket.socket, count: int) -> tuple[int, str]:
    """(index of a process that has connected, its error message or "")."""
    peer.settimeout(2.0)
    try:
        greeting = json.loads(peer.recv(4096))
        number, of = int(greeting["process"]), int(greeting["of"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0, "this is a hybridgen coordinator"
    if of != count or not 0 < number < count:
        return 0, f"process {number} of {of} does not fit: --num-processes is {count} here, and process 0 is this one"
    return number, ""


def _gone(peer: socket.socket) -> bool:
    """Whether the connection is closed: the process was killed and connected again with the same index."""
    ready = select.select([peer], [], [], 0)[0]
    try:
        return bool(ready) and not peer.recv(1)
    except OSError:
        return True


def _report(place: tuple[str, int], count: int, process: int, deadline: float) -> None:
    """All other processes: registers at process 0 and blocks until all are connected."""
    last_report = time.monotonic()
    while True:
        now = time.monotonic()
        if now > deadline:
            raise PeerError(f"process 0 at {place[0]}:{place[1]}, or another process, did not connect in time")
        try:
            with socket.create_connection(place, timeout=2.0) as link:
                _send(link, {"process": process, "of": count})
                link.settimeout(max(deadline - time.monotonic() + 5, 1.0))
                answer = json.loads(link.recv(4096) or b"null")
        except (OSError, ValueError):
            answer = None
        if answer and "error" in answer:
            raise UserError(f"process 0 at {place[0]}:{place[1]} refused the connection: {answer['error']}")
        if answer:
            return
        if now - last_report >= PATIENCE:
            last_report = now
            where = f"waiting for process 0, which does not answer at {place[0]}:{place[1]}"
            print(f"{where}; start it with\n  {command_of(0)}", file=sys.stderr, flush=True)
        time.sleep(0.2)


def _send(link: socket.socket, message: dict) -> None:
    link.sendall(json.dumps(message).encode())


def _who(missing: list[int], count: int) -> str:
    plural = "es" if len(missing) > 1 else ""
    return f"{len(missing)} of {count} processes (process{plural} {', '.join(map(str, missing[:20]))})"


# ---- agreeing


class Agreement:
    """A maximum over processes: in each step every process gives an integer, and all read the largest one."""

    def __init__(self, mesh: Mesh):
        self.place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.most = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.mine = len(self.place.addressable_devices)
        self.alone = jax.process_count() == 1

    def most_of(self, value: int) -> Any:
        """The maximum of all processes' values: an array that is ready once every process has called this."""
        if self.alone:
            return value
        return self.most(jax.make_array_from_process_local_data(self.place, np.full(self.mine, value, np.int32)))


_turns: collections.Counter = collections.Counter()  # how often a name was used: a program may do several runs


def exchange(name: str, text: str, timeout: float = 600.0) -> list[str]:
    """The texts that all processes give under this name, by process index. Any thread may call it.

    The n-th call with a name exchanges with the n-th call of the others. Raises PeerError after `timeout` seconds.
    """
    if jax.process_count() == 1:
        return [text]
    service = client()
    _turns[name] += 1
    keys = [f"hybridgen/{name}/{_turns[name]}/{i}" for i in range(jax.process_count())]
    try:
        service.key_value_set(keys[jax.process_index()], text or " ")
        return [service.blocking_key_value_get(key, int(1000 * timeout)).strip() for key in keys]
    except jax.errors.JaxRuntimeError as error:
        raise PeerError(f"{name}: another process does not respond: {str(error).splitlines()[0]}") from None


def client() -> Any:
    """JAX's client of its coordination service; None if there is only this process."""
    from jax._src import distributed  # JAX has no public name for it; Orbax and others take it from here

    return distributed.global_state.client


def leave(code: int) -> None:
    """Ends this process at once if it is one of several: on a normal exit JAX would block until the others end."""
    if client() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
