"""Tests of the memory check against mocked devices, files of Linux, and a real limit of the process."""

import dataclasses
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import MemoryLimitError
from dbrx_jax.host_memory import available_memory, total_memory
from dbrx_jax.planning import memory_check
from dbrx_jax.planning.memory_check import Request, check_memory, fit_advice
from dbrx_jax.planning.plan import memory
from tests.sharding.test_mesh import mesh_of

DBRX = DbrxConfig.from_name("132b-instruct")
GB = 10**9
INT4 = Request(DBRX, None, "bfloat16", "int4", rows=8, positions=4096)  # 70.2 GB and 8 cache rows of 0.67 GB
INT4_BYTES = sum(memory(INT4.setting("gpu", 0)).parameters.values())
ROW_BYTES = 163_840 * 4096
BLOCK_BYTES = 163_840 * 128  # of the spare block


@pytest.fixture
def gpus(monkeypatch):
    """Makes the check see GPUs with so many bytes free, of 80 GB."""

    def use(*free):
        stats = [{"bytes_limit": 80 * GB, "bytes_in_use": 80 * GB - n} for n in free]
        devices = [
            SimpleNamespace(platform="gpu", device_kind="NVIDIA H100", id=i, memory_stats=lambda s=s: s)
            for i, s in enumerate(stats)
        ]
        monkeypatch.setattr(jax, "local_devices", lambda backend=None: devices)
        monkeypatch.setattr(jax, "device_count", lambda: len(devices))

    return use


@pytest.fixture
def host(monkeypatch):
    """Sets the memory that the host has free."""
    return lambda free: monkeypatch.setattr(memory_check, "available_memory", lambda: free)


def refusal(request, **options):
    with pytest.raises(MemoryLimitError) as caught:
        check_memory(request, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestDevices:
    def test_model_that_does_not_fit_is_refused_with_what_would(self, gpus):
        gpus(80 * GB)
        assert refusal(Request(DBRX, None, "bfloat16", rows=8, positions=4096)) == (
            "memory: each device needs 268.6 GB (weights 263.2 GB, cache 5.4 GB for 8 rows of 4096 positions), and "
            "NVIDIA H100 0 has 80.0 GB free; it would fit with int4 weights"
        )

    def test_weights_alone_are_checked_without_rows(self, gpus):
        gpus(80 * GB)
        assert refusal(Request(DBRX, None, "bfloat16", "int8")) == (
            "memory: each device needs 131.6 GB (weights 131.6 GB), and NVIDIA H100 0 has 80.0 GB free; it would fit "
            "with int4 weights"
        )

    def test_only_what_certainly_does_not_fit_is_refused(self, gpus):
        needed = INT4_BYTES + 8 * ROW_BYTES + BLOCK_BYTES
        gpus(needed)
        check_memory(INT4)
        gpus(needed - 1)
        assert refusal(INT4).endswith("it would fit with an int8 cache, or 2048 positions, or 4 rows")

    def test_loaded_weights_are_not_counted_again(self, gpus):
        gpus(8 * ROW_BYTES + BLOCK_BYTES)
        check_memory(INT4, weights_loaded=True)
        gpus(8 * ROW_BYTES + BLOCK_BYTES - 1)
        message = refusal(INT4, weights_loaded=True)
        assert "each device needs 5.4 GB (cache 5.4 GB for 8 rows of 4096 positions)" in message

    def test_more_devices_are_suggested_where_there_are_more(self, gpus):
        gpus(*[80 * GB] * 8)
        request = Request(DBRX, None, "bfloat16", rows=1, positions=4096)
        assert "or 8 devices (mesh expert=8)" in refusal(request)

    def test_fullest_device_decides(self, gpus):
        gpus(80 * GB, 70 * GB)
        devices = jax.local_devices()
        mesh = SimpleNamespace(local_devices=devices, shape={"expert": 2})
        check_memory(dataclasses.replace(INT4, mesh=mesh))
        gpus(80 * GB, 30 * GB)
        mesh = SimpleNamespace(local_devices=jax.local_devices(), shape={"expert": 2})
        assert "NVIDIA H100 1 has 30.0 GB free" in refusal(dataclasses.replace(INT4, mesh=mesh))

    def test_default_device_is_checked(self, gpus):
        gpus(80 * GB, 30 * GB)
        check_memory(INT4)
        fuller = jax.local_devices()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(jax.config), "jax_default_device", fuller)
            assert "NVIDIA H100 1 has 30.0 GB free" in refusal(INT4)

    def test_device_that_says_nothing_is_accepted(self, gpus):
        gpus(1)
        jax.local_devices()[0].memory_stats = lambda: None
        check_memory(INT4)

    def test_nothing_smaller_fits(self, gpus):
        gpus(GB)
        assert refusal(INT4).endswith("nothing smaller would fit; dbrx-jax plan says which devices would do")

    def test_advice_after_an_error_is_smaller_than_what_failed(self, gpus):
        gpus(80 * GB)
        small = dataclasses.replace(INT4, rows=4, positions=2048)
        check_memory(small)  # fits, says the plan
        assert fit_advice(dataclasses.replace(INT4, rows=64), weights_loaded=True) == (
            "each device needs 113.1 GB (weights 70.2 GB, cache 43.0 GB for 64 rows of 4096 positions), and NVIDIA "
            "H100 0 has 80.0 GB; it would fit with 8 rows"
        )
        assert fit_advice(dataclasses.replace(small, quantization="int8")).endswith("; it would fit with int4 weights")
        assert fit_advice(small, weights_loaded=True).endswith("; it would fit with an int8 cache, or 2 rows")
        jax.local_devices()[0].memory_stats = lambda: None
        assert fit_advice(small, weights_loaded=True) == (
            "each device needs 71.5 GB (weights 70.2 GB, cache 1.4 GB for 4 rows of 2048 positions); it would fit with "
            "an int8 cache, or 2 rows"
        )


class TestHost:
    def test_devices_of_a_cpu_share_the_host(self, host):
        config = DbrxConfig.from_name("bench")
        request = Request(config, mesh_of("expert=4,tensor=2"), "float32")
        size = config.total_parameters * 4
        host(size // 2)
        assert refusal(request) == (
            f"memory: this process needs {size / 1e9:.1f} GB (weights {size / 1e9:.1f} GB), and this machine has "
            f"{size / 2e9:.1f} GB free; it would fit with int8 weights"
        )
        host(round(1.1 * size))  # replicated norms and routers, and padding of the vocabulary
        check_memory(request)

    def test_system_that_does_not_say_is_accepted(self, host):
        host(None)
        check_memory(Request(DBRX, None, "float32"))

    def test_available_memory_of_linux(self, tmp_path):
        write(tmp_path, "proc/meminfo", "MemTotal: 90 kB\nMemAvailable:   50 kB\nSwapFree: 7 kB\n")
        assert available_memory(tmp_path) == 57 * 1024

    def test_container_limits_count_without_cached_files(self, tmp_path):
        write(tmp_path, "proc/meminfo", "MemAvailable: 999999 kB\n")
        write(tmp_path, "proc/self/cgroup", "0::/pod/task\n")
        write(tmp_path, "sys/fs/cgroup/pod/task/memory.max", "max\n")
        write(tmp_path, "sys/fs/cgroup/pod/task/memory.current", "900\n")
        write(tmp_path, "sys/fs/cgroup/pod/memory.max", "4000\n")
        write(tmp_path, "sys/fs/cgroup/pod/memory.current", "3000\n")
        write(tmp_path, "sys/fs/cgroup/pod/memory.stat", "anon 5\nactive_file 200\ninactive_file 300\n")
        assert available_memory(tmp_path) == 4000 - (3000 - 500)
        assert total_memory(tmp_path) == 4000

    def test_limits_of_older_control_groups(self, tmp_path):
        write(tmp_path, "proc/meminfo", "MemAvailable: 999999 kB\n")
        write(tmp_path, "proc/self/cgroup", "3:cpu:/\n4:memory:/pod\n")
        write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", "4000\n")
        write(tmp_path, "sys/fs/cgroup/memory/memory.usage_in_bytes", "3000\n")
        write(tmp_path, "sys/fs/cgroup/memory/memory.stat", "total_active_file 200\ntotal_inactive_file 0\n")
        assert available_memory(tmp_path) == 1200

    def test_other_systems_do_not_say(self, tmp_path):
        assert available_memory(tmp_path) is None

    def test_limit_of_the_process(self):
        program = """
import resource
from dbrx_jax.config import DbrxConfig
from dbrx_jax.errors import MemoryLimitError
from dbrx_jax.planning.memory_check import Request, check_memory
import jax
jax.devices()
request = Request(DbrxConfig.from_name("bench"), None, "float32", rows=1, positions=128)
check_memory(request)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10**9,) * 2)
try:
    check_memory(request)
except MemoryLimitError as error:
    print(error)
"""
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("memory: this process needs 3.")
        assert "this machine has 2.0 GB free; it would fit with bfloat16 weights" in done.stdout


def write(root, name, text):
    file = root / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_plan_of_a_float16_model():
    """Two bytes a weight, as bfloat16."""
    sizes = [sum(_parameters(dtype).values()) for dtype in (np.float16, "bfloat16", "float32")]
    assert sizes[0] == sizes[1] == sizes[2] // 2


def _parameters(dtype):
    return memory(Request(DbrxConfig.from_name("demo"), None, dtype).setting("cpu", 0)).parameters
