"""Several processes as one run: who they are, and what they wait for one another for.

`initialize` comes before anything asks jax for a device. In a single process all of this does
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from t5like.errors import UserError
from t5like.training.lifeline import RESTART, Agreement, Hub, Lifeline, end_now

# Seconds that all processes have to come, and that one may work (build a corpus) or end while the
# others wait for it: whoever dies meanwhile is noticed at once by other means.
JOIN_SECONDS, WAIT_SECONDS = 300, 7 * 24 * 3600
# Seconds until the process 0 that had the port before has ended.
_PORT_SECONDS = 10
_FLAGS = "--coordinator, --num_processes and --process_id"


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among all.

    Attributes:
      coordinator: "HOST:PORT", where process 0 listens.
      count, process: how many there are, and which one this is.
      devices: numbers of the host's devices that are this process's; None: all of them.
    """

    coordinator: str
    count: int
    process: int
    devices: tuple[int, ...] | None = None


class Restart(UserError):
    """The run ends in a way that a restart cures; command lines exit with `exit_status`."""

    exit_status = RESTART


class _State:
    place: Place | None = None
    lifeline: Lifeline | None = None
    waited_for_the_reason = False
    used: defaultdict[str, Any] = defaultdict(itertools.count)
    on_abort: list[Any] = []


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = JOIN_SECONDS,
) -> None:
    """Joins the other processes of this run, if there are any.

    Args:
      coordinator: "HOST:PORT" of process 0, the port being free there; the three go together.
        Without them processes are found as jax finds them, by what Open MPI, Slurm, Cloud TPU
        and Kubernetes set. num_processes=1 alone means that this process is the only one.
      timeout: seconds that all processes have to come.

    Raises:
      UserError: the three do not fit together, this process cannot join, or not all came.
    """
    if _State.place is not None:
        return
    place = _given(coordinator, num_processes, process_id, timeout)
    if place is None or place.count == 1:
        return
    import jax

    # gloo joins CPU devices; other platforms do not look at it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It catches SIGTERM; here the loop does, and agrees with the other processes.
    jax.config.update("jax_enable_preemption_service", False)
    # jax's own time-out aborts the process, so this one comes before it.
    patience = timeout + 3 * (place.process == 0)  # Who is asked for its port goes last.
    watch = threading.Timer(patience, lambda: end_now(_not_joined(place, timeout), RESTART))
    watch.daemon = True
    watch.start()
    me = f"process {place.process} of {place.count} cannot join at {place.coordinator}"
    mend = "the port must be free on process 0's host, and each process needs a number of its own"
    # So does jax's client where two processes have one number.
    _on_abort(lambda: end_now(f"{me} (jax's words are above): {mend}", 1))
    try:
        if place.process == 0:
            _wait_for_port(place.coordinator)
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.process,
            local_device_ids=place.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=timeout + 60,
            shutdown_timeout_seconds=WAIT_SECONDS,
        )
    except Exception as error:
        raise UserError(f"{me} ({error}): {mend}") from error
    finally:
        watch.cancel()
    _State.place = place
    _State.lifeline = _connect(place)
    # It also aborts when another process has died, which the lifeline tells in a line.
    _on_abort(lambda: _State.lifeline.wait_for_the_end(5))


def _given(coordinator, num_processes, process_id, timeout) -> Place | None:
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        return _detect(timeout)
    if given == (None, 1, None):
        return None
    if None in given:
        missing = [
            name
            for name, value in zip(
                ("--coordinator", "--num_processes", "--process_id"), given, strict=True
            )
            if value is None
        ]
        raise UserError(
            f"{' and '.join(missing)} missing: {_FLAGS} go together (or none of them, where the "
            "processes are detected)"
        )
    if not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"--coordinator={coordinator} names no port: write HOST:PORT, process 0's host and a "
            "free port on it"
        )
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} with --num_processes={num_processes}: processes are "
            "numbered from 0 to their number less one"
        )
    return Place(coordinator, num_processes, process_id)


def _detect(timeout: int) -> Place | None:
    """What the surroundings say, as jax reads them; None for a process by itself."""
    # Importing jax's detection takes as long as importing jax.
    from jax._src import clusters

    _check_kubernetes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of any pod without jax's Kubernetes client.
            found = next(
                (
                    kind
                    for kind in clusters.ClusterEnv._cluster_types
                    if _may_be(kind) and kind.is_env_present()
                ),
                None,
            )
        if found is None or found.get_process_count() == 1:
            return None
        address = found.get_coordinator_address(timeout, os.environ.get("JAX_COORDINATOR_PORT"))
        address = os.environ.get("JAX_COORDINATOR_ADDRESS", address)
        devices = _devices_of(found.get_local_process_id())
        return Place(address, found.get_process_count(), found.get_process_id(), devices)
    except Exception as error:
        raise UserError(
            f"the other processes of this run cannot be found ({error}): name them with {_FLAGS}, "
            "or pass --num_processes=1 if there are none"
        ) from error


def _may_be(kind: Any) -> bool:
    """Whether jax may ask if processes are of that kind: any pod looks like one of a Job to it."""
    of_a_job = kind.__name__ != "K8sCluster" or "JOB_COMPLETION_INDEX" in os.environ
    return not kind.opt_in_only_method and of_a_job


def _check_kubernetes() -> None:
    indexed = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    on_tpu = "TPU_WORKER_HOSTNAMES" in os.environ
    if indexed and not on_tpu and importlib.util.find_spec("kubernetes") is None:
        raise UserError(
            "this is a pod of an indexed Job, and the package that would tell how many there are "
            f"is not installed: pass {_FLAGS} (--num_processes=1 if it trains alone), or install "
            "kubernetes"
        )


def _devices_of(local_process: int | None) -> tuple[int, ...] | None:
    """One device for each of a host's processes, unless the launcher has shared them out.

    jax gives a process of Slurm's or Open MPI's one GPU in every case, be it alone on its host.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if local_process is None or visible[0] and len(visible) == 1 or _tasks_here() == 1:
        return None
    return (local_process,)


def _tasks_here() -> int | None:
    """How many processes the launcher started on this host, where it says so."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_LOCAL_SIZE"])
    counts: list[int] = []  # Slurm writes 2(x3),1 for nodes of 2, 2, 2 and 1.
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part):
            counts += [int(match[1])] * int(match[2] or 1)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    return counts[node] if node < len(counts) else None


def _wait_for_port(coordinator: str) -> None:
    """Raises OSError where the port stays taken, which jax's coordinator would crash at."""
    _, port = _address(coordinator)
    until = time.monotonic() + _PORT_SECONDS
    while True:
        try:
            dual = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if dual else socket.AF_INET
            socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.5)


def _not_joined(place: Place, timeout: int) -> str:
    """Which of the two it is: process 0 is not there, or some other is not."""
    who = f"process {place.process} of {place.count} (on {socket.gethostname()})"
    try:
        socket.create_connection(_address(place.coordinator), timeout=5).close()
    except OSError as error:
        return (
            f"{who} cannot reach process 0 at {place.coordinator} ({error.strerror or error}), and "
            f"has tried for {timeout} s: start process 0 there, or mend the address"
        )
    return (
        f"{who} reached {place.coordinator}, but not all of {place.count} processes came within "
        f"{timeout} s: start the others, each with its own number and the same address"
    )


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _connect(place: Place) -> Lifeline:
    hub, key, wait = None, "t5like/lifeline", 1000 * JOIN_SECONDS
    host, _ = _address(place.coordinator)
    if place.process == 0:
        hub = Hub(place.count)
        hub.start()
        _client().key_value_set(key, f"{hub.port} {hub.token} {socket.gethostname()}")
    port, token, name = _client().blocking_key_value_get(key, wait).split()
    address = "localhost" if hub else host, int(port)
    try:
        lifeline = Lifeline(address, token, place.process, place.count, name, hub)
    except OSError as error:
        raise UserError(
            f"process {place.process} cannot connect to {host}:{port} ({error.strerror or error}): "
            "processes of a run must reach one another at any port"
        ) from error
    lifeline.start()
    return lifeline


def _on_abort(act: Callable[[], None]) -> None:
    """Has `act` done first where C++ aborts this process; where it returns, the abort goes on."""

    def on_abort(_: int) -> None:
        act()
        library.signal(signal.SIGABRT, None)

    library = ctypes.CDLL(None)
    library.signal.argtypes = ctypes.c_int, ctypes.c_void_p
    kept = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    library.signal(signal.SIGABRT, ctypes.cast(kept, ctypes.c_void_p))
    _State.on_abort.append(kept)  # From collection.


# --- who ---------------------------------------------------------------------------------------


def process_count() -> int:
    """How many processes there are; asks no backend."""
    return 1 if _State.place is None else _State.place.count


def process_index() -> int:
    """Which of them this is; asks no backend."""
    return 0 if _State.place is None else _State.place.process


# --- waiting for one another ---------------------------------------------------------------------


def barrier(name: str) -> None:
    """Waits until all processes have come here; made in the same order by all."""
    if _State.place is not None:
        key = f"t5like/{name}/{next(_State.used[name])}"
        _client().wait_at_barrier(key, 1000 * WAIT_SECONDS)


@contextlib.contextmanager
def first_alone(name: str) -> Iterator[None]:
    """Lets process 0 through the block alone, and all others after it.

    What process 0 puts into a cache the others find there, or make for themselves, all at a time,
    where they do not share its disk.
    """
    if process_index() == 0:
        yield
        barrier(name)
    else:
        barrier(name)
        yield


def gather(name: str, value: Any) -> list[Any]:
    """Every process's value (JSON), by process; made in the same order by all."""
    if _State.place is None:
        return [value]
    folder = f"t5like/{name}/{next(_State.used[name])}"
    _client().key_value_set(f"{folder}/{process_index()}", json.dumps(value))
    barrier(f"{name} gathered")
    found = {path.rpartition("/")[2]: text for path, text in _client().key_value_dir_get(folder)}
    barrier(f"{name} read")
    _client().key_value_delete(f"{folder}/{process_index()}")
    return [json.loads(found[str(process)]) for process in range(process_count())]


def agreement(kind: str) -> Agreement | None:
    """The agreement of that kind ("stop" or "save") with the other processes, if there are any."""
    return None if _State.lifeline is None else _State.lifeline.agreements[kind]


def want(kind: str) -> None:
    """Has all processes come to an agreement of that kind; may be called by a signal handler."""
    if _State.lifeline is not None:
        _State.lifeline.wanted[kind] = True


# --- ending --------------------------------------------------------------------------------------


def failed(line: str, status: int) -> None:
    """Tells the other processes that this one ends in an error, which ends them too."""
    if _State.lifeline is not None:
        _State.lifeline.fail(line, status)


def leave() -> None:
    """Waits for the others at the end of a run, so that no one takes the end for a death."""
    if _State.lifeline is not None:
        try:
            barrier("end")
        except Exception as error:
            wait_for_the_reason(error)
            raise
        _State.lifeline.leave()


def wait_for_the_reason(error: BaseException) -> None:
    """Ends this process with the reason, if `error` came of the loss of another process.

    Waits for it once: an error passes several places that ask.
    """
    if _State.lifeline is None or _State.waited_for_the_reason or not _of_a_collective(error):
        return
    _State.waited_for_the_reason = True
    _State.lifeline.wait_for_the_end(40)


def _of_a_collective(error: BaseException | None) -> bool:
    words = ("gloo", "nccl", "unavailable", "aborted", "cancelled", "deadline", "connection")
    words += ("barrier", "timed out")
    while error is not None:
        if any(word in str(error).lower() for word in words):
            return True
        error = error.__cause__
    return False


def _client() -> Any:
    from jax._src import distributed

    return distributed.global_state.client
