"""A server's process over the engine and a small random model, and what can be seen of it from outside."""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import httpx2

from tests.serving.test_routes import metrics


@dataclasses.dataclass
class SmallServer:
    """A process, a client of it, and its access log so far."""

    process: subprocess.Popen
    url: str
    client: httpx2.Client
    log: list[dict]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def metric(self, name: str) -> float:
        """Returns the value of a metric, of the sum of its values."""
        return sum(value for (found, *_), value in metrics(self.client).items() if found == name)

    def is_idle(self) -> bool:
        """Returns whether no request runs or waits, and no block is in use."""
        found = metrics(self.client)
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(found[f"vllm:{name}",] == 0 for name in names)

    def memory(self) -> float:
        """Returns the process's resident memory that no file backs, in MB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) / 1000

    def num_files(self) -> int:
        """Returns the number of the process's open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def children(self) -> list[int]:
        """Returns the ids of the processes that the server has started."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return [int(number) for task in tasks for number in task.read_text().split()]


@contextlib.contextmanager
def serving(**options):
    """Starts a server; kills it at the end."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.serving.serve_small", json.dumps(options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    log: list[dict] = []
    reader = threading.Thread(target=lambda: log.extend(map(json.loads, process.stdout)))
    try:
        url = process.stdout.readline().strip()
        assert url, "the server has not started"
        reader.start()
        with httpx2.Client(base_url=url, timeout=60) as client:
            yield SmallServer(process, url, client, log)
    finally:
        process.kill()
        process.wait()
        if reader.is_alive():
            reader.join()
        process.stdout.close()
