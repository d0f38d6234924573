"""Replaces the log of JAX's runtime by one line when another process is lost.

The runtime aborts then, after pages of log, in C++, where no handler in Python runs. So dbrx_jax.sharding.distributed
runs this file as a small process of its own, which reads what native code writes to stderr, replaces that log
and passes on the rest. It imports nothing of the package.
"""

import re
import signal
import sys

MARK = "dbrx_jax lost: "  # begins a line from distributed.py

# Log entries of the runtime's coordination; all lines after such an entry belong to it.
ENDING = re.compile(r"[WEF]\d{4} \S+ +\d+ (coordination_service|client\.h|preemption_sync_manager)")
FATAL = "Terminating process because the JAX distributed service"
# gRPC's entry about an address where it cannot listen; an error in Python follows.
NOISE = re.compile(r"E\d{4} \S+ +\d+ add_port")

ADVICE = "see its errors, and start all again"
PROCESS_0_LOST = f"process 0 was lost, or ended before this one; {ADVICE}"
UNHEALTHY = re.compile(r"stopped sending heartbeats\):\s*([\d, ]+)|Task (\d+) heartbeat timeout")


def explain(text: str, start_seconds: str, lost_seconds: str) -> str | None:
    """Returns one line that explains the log of a process that ended; None if no other process was the reason."""
    marked = next((line.removeprefix(MARK) for line in text.splitlines() if line.startswith(MARK)), None)
    if FATAL not in text:
        return marked
    if "RegisterTask" in text:
        return (
            f"not every process came within {start_seconds} s: start all of them, with the same address of "
            "process 0 and number of processes, and let them reach it"
        )
    if unhealthy := UNHEALTHY.search(text):
        number = (unhealthy[1] or unhealthy[2]).split(",")[0].strip()
        return f"process {number} was lost, not heard of for up to {lost_seconds} s; {ADVICE}"
    if "Failed to send RPC to coordination service" in text or "CoordinationService/Heartbeat" in text:
        return PROCESS_0_LOST
    return marked or f"another process was lost, or ended before this one; {ADVICE}"


def main(program: str, start_seconds: str, lost_seconds: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends when its pipe is closed
        signal.signal(number, signal.SIG_IGN)
    buffered = ""
    for raw in sys.stdin.buffer:
        line = raw.decode(errors="replace")
        if buffered or line.startswith(MARK) or ENDING.match(line):
            buffered = (buffered + line)[-100_000:]
        elif not NOISE.match(line):
            print(line, end="", flush=True)
    message = explain(buffered, start_seconds, lost_seconds)
    print(buffered if message is None else f"{program}: {message}\n", end="", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
