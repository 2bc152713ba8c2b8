"""Many processes as one program: how they find each other and agree. What notices that one hangs is watchdog.py.

    hybridgen train ... --coordinator 10.0.0.2:8476 --num-processes 2 --process-id 0   # and with 1 on the other host
    hybridgen train ... --distributed                                                # where JAX knows: TPU pods, SLURM

All hosts run the same command on the same files (a shared run folder). Before JAX connects, the processes meet at the
coordinator's address, so that one which is missing is named with the command that starts it. Text between processes
goes through JAX's coordination service, which any thread may use; numbers that decide what the next step is go through
a collective that every process issues in the same place (`Agreement`).
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

HEARTBEAT = 30  # seconds without one, and JAX takes a process for dead
PATIENCE = 5.0  # seconds between messages of who is missing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options with which several processes run one command."""
    group = parser.add_argument_group("several processes", "the same command on every host, with its --process-id")
    group.add_argument("--distributed", action="store_true", help="find the others as a TPU pod or SLURM does")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, which listens there")
    group.add_argument("--num-processes", type=int, metavar="N", help="processes in all")
    group.add_argument("--process-id", type=int, metavar="I", help="number of this one, 0 to N - 1")
    group.add_argument("--init-timeout", type=int, default=300, metavar="SECONDS", help="wait for the others (300)")


def start(args: argparse.Namespace) -> None:
    """Connects this process with the others, if there are any. Before anything touches a device.

    Raises UserError for options that do not go together, PeerError if the others do not come in time.
    """
    given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(args, name) is not None]
    if not given:
        if args.distributed or _detected():
            _connect_detected(args.init_timeout)
        return
    if len(given) < 3:
        raise UserError("--coordinator, --num-processes and --process-id go together")
    if args.num_processes < 1 or not 0 <= args.process_id < args.num_processes:
        raise UserError(f"--process-id {args.process_id} is not one of {args.num_processes} processes, 0 and up")
    if args.init_timeout < 1:
        raise UserError(f"--init-timeout {args.init_timeout} is not a number of seconds above 0")
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
    """Connects with the others that the environment tells of, after meeting them at its coordinator."""
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize asks, which names nobody who is missing

    given = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(given, None, None, None, None, timeout)
    except (RuntimeError, OSError) as error:
        raise PeerError(f"the coordinator is not found: {error}") from None
    address, count, process, devices = found
    if None in (address, count, process):
        raise UserError(
            "--distributed: nothing here says who the other processes are; "
            "give --coordinator, --num-processes and --process-id"
        )
    alone = re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if alone or "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None  # JAX would give a task of SLURM one GPU, also where all of the node are its own
    meet(address, count, process, timeout, everywhere=True)
    options = {"num_processes": count, "process_id": process, "local_device_ids": devices}
    _initialize(coordinator_address=address, initialization_timeout=timeout, **options)


def _initialize(**options: Any) -> None:
    # "deactivate": under SLURM, JAX would hide all GPUs but one from a process whose devices are not listed
    options |= {"heartbeat_timeout_seconds": HEARTBEAT, "cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(**options)
    except RuntimeError as error:
        raise PeerError(f"the processes did not connect: {str(error).splitlines()[0]}") from None
    if jax.config.jax_platforms == "cpu" or jax.default_backend() == "cpu":
        # two programs in flight would mix up their messages in gloo
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.process_index():  # process 0 speaks; what goes wrong here is on stderr
        sys.stdout = open(os.devnull, "w")


def command_of(process: int) -> str:
    """This program's command line, as process number `process` would give it, where the number is given at all."""
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

    A line of JSON each way over TCP; process 0 answers when all have come. Every few seconds it says who is missing.
    everywhere: it listens at all its addresses, not at this one only.
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
    """Process 0: listens until all others have come, then lets them go on."""
    both = not place[0] and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in place[0] else socket.AF_INET
    try:
        server = socket.create_server(place, family=family, dualstack_ipv6=both)
    except OSError as error:
        kind = UserError if place[0] else PeerError  # a process before this one may not have ended yet
        raise kind(f"--coordinator {place[0]}:{place[1]}: cannot listen there: {error.strerror}") from None
    come: dict[int, socket.socket] = {}
    last_report = time.monotonic()
    with server:
        try:
            while len(come) < count - 1:
                now = time.monotonic()
                missing = [i for i in range(1, count) if i not in come]
                if now > deadline:
                    raise PeerError(f"{_who(missing, count)} did not come")
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
                    _send(peer, {"error": problem or f"there is a process {number} already"})
                    peer.close()
                else:
                    come[number] = peer
            for peer in come.values():
                _send(peer, {"go": True})
        finally:
            for peer in come.values():
                peer.close()


def _introduced(peer: socket.socket, count: int) -> tuple[int, str]:
    """(number of a process that has connected, what is wrong with it or "")."""
    peer.settimeout(2.0)
    try:
        greeting = json.loads(peer.recv(4096))
        number, of = int(greeting["process"]), int(greeting["of"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return 0, "this is a hybridgen coordinator"
    if of != count or not 0 < number < count:
        return 0, f"process {number} of {of} does not fit: there are {count} processes here, and 0 is this one"
    return number, ""


def _gone(peer: socket.socket) -> bool:
    """Whether the other end has hung up: it was killed, and came again under its number."""
    ready = select.select([peer], [], [], 0)[0]
    try:
        return bool(ready) and not peer.recv(1)
    except OSError:
        return True


def _report(place: tuple[str, int], count: int, process: int, deadline: float) -> None:
    """Another process: tells process 0 that it is there, and waits until all are."""
    last_report = time.monotonic()
    while True:
        now = time.monotonic()
        if now > deadline:
            raise PeerError(f"process 0 at {place[0]}:{place[1]}, or another one, did not come")
        try:
            with socket.create_connection(place, timeout=2.0) as link:
                _send(link, {"process": process, "of": count})
                link.settimeout(max(deadline - time.monotonic() + 5, 1.0))
                answer = json.loads(link.recv(4096) or b"null")
        except (OSError, ValueError):
            answer = None
        if answer and "error" in answer:
            raise UserError(f"process 0 at {place[0]}:{place[1]} says: {answer['error']}")
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
    """A small number that all processes read alike: the largest of what each of them says, in the same step."""

    def __init__(self, mesh: Mesh):
        self.place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.most = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.mine = len(self.place.addressable_devices)
        self.alone = jax.process_count() == 1

    def most_of(self, value: int) -> Any:
        """What all will read, as an array that is ready once all have said theirs."""
        if self.alone:
            return value
        return self.most(jax.make_array_from_process_local_data(self.place, np.full(self.mine, value, np.int32)))


_turns: collections.Counter = collections.Counter()  # how often a name was used: several runs may follow each other


def exchange(name: str, text: str, timeout: float = 600.0) -> list[str]:
    """What every process says under this name, this time. Any thread may call it. Raises PeerError in time-out."""
    if jax.process_count() == 1:
        return [text]
    service = client()
    _turns[name] += 1
    keys = [f"hybridgen/{name}/{_turns[name]}/{i}" for i in range(jax.process_count())]
    try:
        service.key_value_set(keys[jax.process_index()], text or " ")
        return [service.blocking_key_value_get(key, int(1000 * timeout)).strip() for key in keys]
    except jax.errors.JaxRuntimeError as error:
        raise PeerError(f"{name}: another process says nothing: {str(error).splitlines()[0]}") from None


def client() -> Any:
    """The coordination service of JAX; None where this is the only process."""
    from jax._src import distributed  # JAX has no public name for it; Orbax and others take it from here

    return distributed.global_state.client


def leave(code: int) -> None:
    """Ends this process at once if it is one of several, which go on without it: JAX would wait for them at its end."""
    if client() is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
