"""One run on several processes, for command lines and scripts: how they meet, who speaks, and how they end.

Every process runs the same program on the devices of its host; JAX's coordination service, in process 0,
tells them of each other. Where one is lost the others end by themselves, with a line that says so.
"""

import contextlib
import hashlib
import os
import re
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dbrx_jax.errors import DbrxError, DistributedError
from dbrx_jax.sharding import native_log

START_SECONDS = 120  # until all processes have come
LOST_SECONDS = 60  # until a silent process counts as lost
LEAVE_SECONDS = 5  # that a process which failed waits for the others: often they fail alike
# What a collective says on a CPU or GPU when its other end is gone; on a TPU it waits, and the heartbeats tell.
BROKEN = re.compile(r"gloo|nccl|UNAVAILABLE", re.IGNORECASE)


@contextlib.contextmanager
def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: int = START_SECONDS,
    lost_seconds: int = LOST_SECONDS,
) -> Iterator[bool]:
    """Joins this process to the others of a run, for a `with` block at whose end they all meet.

    Gives whether this is the first process.

    Call it before JAX touches a device. Within the block process 0 alone speaks: what Python prints to
    stdout and stderr elsewhere is dropped; errors are raised out of the block. For programs that end
    with the block: what native code writes is sieved from here on, and a lost process ends this one.

    Args:
      coordinator: HOST:PORT of process 0, a free port there. This and the next two may be None on Cloud
        TPU VMs, GKE and SLURM, where JAX finds them itself.
      processes: how many there are.
      process_id: this one's number, from 0.
      start_seconds: after which those that came give up waiting for the others.
      lost_seconds: after which a process that is not heard of counts as lost.

    Raises:
      DistributedError: the arguments do not make up a run, or its address cannot be used.
    """
    _check(coordinator, processes, process_id)
    sieve = _sieve(start_seconds, lost_seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=start_seconds,
            heartbeat_timeout_seconds=lost_seconds,
            shutdown_timeout_seconds=lost_seconds,
        )
    except (ValueError, RuntimeError) as error:
        raise DistributedError(_why(error, coordinator)) from None
    try:
        first = jax.process_index() == 0
        with contextlib.nullcontext() if first else _silence():
            yield first
    except BaseException as error:
        sys.stdout.flush()
        if _broke(error):
            _lost(sieve)
        # Python waits for the others at its exit. Whoever catches the error has time to print it, and then this ends.
        leave = threading.Timer(LEAVE_SECONDS, os._exit, [_status(error)])
        leave.daemon = True
        leave.start()
        raise
    jax.distributed.shutdown()


def check_same(what: str, text: str) -> None:
    """Checks that all processes have the same text; each must call this.

    Raises:
      DistributedError: they have not.
    """
    from jax.experimental.multihost_utils import process_allgather

    digests = process_allgather(np.frombuffer(hashlib.sha256(text.encode(errors="replace")).digest(), np.uint8))
    if other := np.flatnonzero((digests != digests[0]).any(axis=-1)).tolist():
        raise DistributedError(f"{what}: process {other[0]} has others than process 0; give all of them the same")


def _check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator):
        raise DistributedError(f"coordinator: expected HOST:PORT of process 0, got {coordinator!r:.80}")
    if processes is not None and processes < 1:
        raise DistributedError(f"processes: expected a whole number above 0, got {processes}")
    if process_id is not None and not 0 <= process_id < (processes or process_id + 1):
        last = "" if processes is None else f" to {processes - 1}"
        raise DistributedError(f"process id: expected a number from 0{last}, got {process_id}")


def _why(error: Exception, coordinator: str | None) -> str:
    """Explains JAX's error at the start to the user."""
    if "should be defined" in str(error) or "must be defined" in str(error):
        return (
            "no cluster that JAX knows (Cloud TPU, GKE, SLURM) was found here: "
            "give the coordinator's address, the number of processes and this one's number"
        )
    if "RPC server" in str(error):
        return f"{coordinator or 'coordinator'}: process 0 cannot listen there; choose a free port of its host"
    return f"the processes could not be joined: {error}"


def _sieve(start_seconds: int, lost_seconds: int) -> subprocess.Popen:
    """Puts native_log.py behind what native code writes; Python's own stdout and stderr stay what they were."""
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))  # JAX ends processes by abort: no core of a whole model
    sys.stdout.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    command = [sys.executable, "-I", "-S", native_log.__file__]
    command += [Path(sys.argv[0]).name, str(start_seconds), str(lost_seconds)]
    sieve = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr)
    assert sieve.stdin is not None
    os.dup2(sieve.stdin.fileno(), 2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # where gloo's threads count their connections, in each other's lines
    sieve.stdin.close()
    sys.stdout = open(stdout, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115
    sys.stderr = open(stderr, "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1)  # noqa: SIM115
    return sieve


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def _broke(error: BaseException) -> bool:
    """Returns whether a collective failed: JAX raises a ValueError with a status when numpy reads its result."""
    text = str(error)
    native = isinstance(error, jax.errors.JaxRuntimeError)
    native = native or (type(error) is ValueError and re.match("[A-Z_]+: ", text) is not None)
    return native and BROKEN.search(text) is not None


def _lost(sieve: subprocess.Popen) -> None:
    """Ends this process because a collective failed. The sieve says so, unless the runtime has told it more."""
    line = "the connection to another process broke; see what the others said, and start all again"
    os.write(2, f"{native_log.MARK}{line}\n".encode())
    os.close(2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        sieve.wait(timeout=2)
    os._exit(os.EX_TEMPFAIL)


def _status(error: BaseException) -> int:
    """The exit status that the command would have; see dbrx_jax.console."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, DbrxError) else 130 if isinstance(error, KeyboardInterrupt) else 1
