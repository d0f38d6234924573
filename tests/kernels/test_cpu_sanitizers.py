"""Runs the native kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dbrx_jax.kernels.cpu.library import instruction_sets

ROOT = Path(__file__).parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
LIBRARIES = ("libasan.so", "libubsan.so", "libstdc++.so")


@pytest.mark.slow
@pytest.mark.skipif(not instruction_sets(), reason="the native kernels were not built")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ and its sanitizers")
def test_kernels_under_sanitizers(tmp_path):
    """Memory outside of arrays, and what C++ leaves undefined, end the process with a report."""
    for name in ("dbrx_jax", "convert", "configs", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    target = tmp_path / "target"
    env = os.environ | {"CFLAGS": FLAGS, "CXXFLAGS": FLAGS, "LDFLAGS": FLAGS, "CC": "gcc", "CXX": "g++"}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, tmp_path]
    subprocess.run(pip, check=True, env=env)
    (library,) = target.rglob("_native*.so")
    shutil.copy(library, tmp_path / "dbrx_jax" / "kernels" / "cpu")
    find = [subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True) for name in LIBRARIES]
    env = os.environ | {
        "LD_PRELOAD": " ".join(done.stdout.strip() for done in find),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and XLA keep what they allocate
        "PYTHONPATH": str(tmp_path),
    }
    tests = ["tests/kernels/test_cpu_matmul.py", "tests/kernels/test_cpu_experts.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not threads", *tests]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " skipped" not in done.stdout, done.stdout
