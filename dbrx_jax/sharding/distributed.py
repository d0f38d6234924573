"""Runs of several processes, for command lines and scripts: start, output of process 0 alone, and shutdown.

Every process runs the same program on the devices of its host, and JAX's coordination service in process 0
connects them. When one is lost, the others end by themselves with a line that says so.
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

from dbrx_jax.errors import DbrxError, DistributedError, LostProcessError
from dbrx_jax.sharding import native_log

LEAVE_SECONDS = 5  # that a failed process waits for the others, which often fail alike
# Errors of a collective on a CPU or GPU whose peer is gone; on a TPU it waits, and heartbeats detect the loss.
CONNECTION_ERROR = re.compile(r"gloo|nccl|UNAVAILABLE", re.IGNORECASE)
BROKEN = "the connection to another process broke; see the errors of the others, and start all again"


@contextlib.contextmanager
def start(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    start_seconds: int = 120,
    lost_seconds: int = 60,
) -> Iterator[bool]:
    """Connects this process to the others of a run, for a `with` block at whose end all of them synchronise.

    Yields whether this is the first process.

    Call it before JAX touches a device. Within the block only process 0 prints: what Python writes to stdout
    and stderr in other processes is dropped; errors are raised out of the block. It is for programs that end
    with the block: output of native code is filtered from here on, and the loss of a process ends this one.

    Args:
      coordinator: HOST:PORT of process 0, a free port there. This and the next two may be None on Cloud
        TPU VMs, GKE and SLURM, where JAX finds them itself.
      processes: number of processes.
      process_id: number of this process, from 0.
      start_seconds: after which the connected processes stop waiting for the others.
      lost_seconds: after which a silent process counts as lost.

    Raises:
      DistributedError: the arguments are invalid or incomplete, or the address cannot be used.
    """
    _check(coordinator, processes, process_id)
    log_filter = _filter_native_log(start_seconds, lost_seconds)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # which would ignore SIGTERM
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
        raise DistributedError(_explain_start_error(str(error), coordinator)) from None
    try:
        is_first = jax.process_index() == 0
        with open(os.devnull, "w") as devnull, contextlib.ExitStack() as stack:
            if not is_first:
                stack.enter_context(contextlib.redirect_stdout(devnull))
                stack.enter_context(contextlib.redirect_stderr(devnull))
            yield is_first
    except BaseException as error:
        sys.stdout.flush()
        if line := explain_loss(error):  # the log filter prints this line, or the runtime's reason if it logs one
            os.write(2, f"{native_log.MARK}{line}\n".encode())
            os.close(2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                log_filter.wait(timeout=2)
            os._exit(os.EX_TEMPFAIL)
        # At its exit Python would wait for the others. This leaves the caller time to print the error.
        timer = threading.Timer(LEAVE_SECONDS, os._exit, [_exit_status(error)])
        timer.daemon = True
        timer.start()
        raise
    jax.distributed.shutdown()


def check_same(name: str, text: str) -> None:
    """Checks that all processes have the same text; each must call this.

    Raises:
      DistributedError: they differ.
    """
    from jax.experimental.multihost_utils import process_allgather

    digests = process_allgather(np.frombuffer(hashlib.sha256(text.encode(errors="replace")).digest(), np.uint8))
    if different := np.flatnonzero((digests != digests[0]).any(axis=-1)).tolist():
        raise DistributedError(f"{name}: process {different[0]} has others than process 0; give all of them the same")


def explain_loss(error: BaseException) -> str | None:
    """Returns a line about the loss of a process that an error or its cause tells, or None if it tells another."""
    if not jax.distributed.is_initialized():
        return None
    for reason in (error, error.__cause__):
        if isinstance(reason, LostProcessError):
            return str(reason)
        if reason is not None and is_connection_error(reason):
            return BROKEN
    return None


def is_connection_error(error: BaseException) -> bool:
    """Returns whether a collective failed: JAX raises a ValueError with a status when numpy reads its result."""
    text = str(error)
    is_status = type(error) is ValueError and re.match("[A-Z_]+: ", text) is not None
    is_native = isinstance(error, jax.errors.JaxRuntimeError) or is_status
    return is_native and CONNECTION_ERROR.search(text) is not None


def _check(coordinator: str | None, processes: int | None, process_id: int | None) -> None:
    if coordinator is not None and not re.fullmatch(r"\S+:[0-9]{1,5}", coordinator):
        raise DistributedError(f"coordinator: expected HOST:PORT of process 0, got {coordinator!r:.80}")
    if processes is not None and processes < 1:
        raise DistributedError(f"processes: expected a whole number above 0, got {processes}")
    if process_id is not None and not 0 <= process_id < (processes or process_id + 1):
        last = "" if processes is None else f" to {processes - 1}"
        raise DistributedError(f"process id: expected a number from 0{last}, got {process_id}")


def _explain_start_error(error: str, coordinator: str | None) -> str:
    """Returns the message to the user for JAX's error at the start."""
    if "should be defined" in error or "must be defined" in error:
        return (
            "no cluster that JAX knows (Cloud TPU, GKE, SLURM) was found here: "
            "give the coordinator's address, the number of processes and this one's number"
        )
    if "RPC server" in error:
        return f"{coordinator or 'coordinator'}: process 0 cannot listen there; choose a free port of its host"
    return f"the processes could not be joined: {error}"


def _filter_native_log(start_seconds: int, lost_seconds: int) -> subprocess.Popen:
    """Pipes the stderr of native code through native_log.py; Python's stdout and stderr keep their destinations."""
    _, hard_limit = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard_limit))  # JAX aborts: no core file of a whole model
    sys.stdout.flush()
    stdout, stderr = os.dup(1), os.dup(2)
    command = [sys.executable, "-I", "-S", native_log.__file__]
    command += [Path(sys.argv[0]).name, str(start_seconds), str(lost_seconds)]
    log_filter = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr)
    assert log_filter.stdin is not None
    os.dup2(log_filter.stdin.fileno(), 2)
    log_filter.stdin.close()
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 1)  # gloo's threads print interleaved lines about their connections
    sys.stdout = open(stdout, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors, buffering=1)  # noqa: SIM115
    sys.stderr = open(stderr, "w", encoding=sys.stderr.encoding, errors=sys.stderr.errors, buffering=1)  # noqa: SIM115
    return log_filter


def _exit_status(error: BaseException) -> int:
    """Returns the exit status that the command would have; see dbrx_jax.console."""
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        return error.code
    return 2 if isinstance(error, DbrxError) else 130 if isinstance(error, KeyboardInterrupt) else 1
