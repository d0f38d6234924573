"""Runs of several processes on this machine, for the tests of meshes over hosts."""

import os
import socket
import subprocess
import time


def free_address():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


class Processes:
    """A command on several processes of some devices each; `{i}` in it is the process id."""

    def __init__(self, folder, count, devices, *command):
        self.files = [(folder / f"{i}.out", folder / f"{i}.err") for i in range(count)]
        flags = f"--xla_force_host_platform_device_count={devices}"
        self.processes = []
        for i, (out, err) in enumerate(self.files):
            with out.open("w") as stdout, err.open("w") as stderr:
                self.processes.append(
                    subprocess.Popen(
                        [str(part).replace("{i}", str(i)) for part in command],
                        env={**os.environ, "XLA_FLAGS": flags},
                        stdout=stdout,
                        stderr=stderr,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def stdout(self, i):
        return self.files[i][0].read_text()

    def stderr(self, i):
        return self.files[i][1].read_text()

    def wait_for_output(self, text, seconds=180):
        """Waits for `text` in the stdout of process 0."""
        end = time.monotonic() + seconds
        while text not in self.stdout(0):
            assert time.monotonic() < end, self.stderr(0)
            assert self.processes[0].poll() is None, self.stderr(0)
            time.sleep(0.1)

    def statuses(self, seconds=300):
        end = time.monotonic() + seconds
        statuses = [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        time.sleep(0.5)  # a separate process writes the last line
        return statuses


def run_flags(count):
    """Returns the command-line options of one run."""
    return "--distributed", "--coordinator", free_address(), "--processes", count, "--process-id", "{i}"
