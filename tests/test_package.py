"""What importing costs, and what the files of the project promise each other."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_quick_and_starts_no_backend():
    code = """
import time; begin = time.perf_counter()
import dbrx_jax
seconds = time.perf_counter() - begin
from jax._src import xla_bridge
import sys
heavy = [m for m in ("orbax.checkpoint", "torch", "tokenizers", "tyro", "matplotlib") if m in sys.modules]
print(seconds, xla_bridge.backends_are_initialized(), heavy)
"""
    seconds, initialized, heavy = python(code).split(" ", 2)
    assert float(seconds) < 3
    assert initialized == "False"
    assert heavy == "[]"


def test_import_leaves_jax_as_it_is():
    code = (
        "import jax; a = dict(jax.config.values); import dbrx_jax.convert.to_orbax; print(a == dict(jax.config.values))"
    )
    assert python(code) == "True"


def test_public_names():
    code = "from dbrx_jax import DbrxConfig, DbrxForCausalLM, DbrxTokenizer; print(DbrxForCausalLM.__name__)"
    assert python(code) == "DbrxForCausalLM"


def test_every_package_folder_is_listed_for_the_wheel():
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    folders = {
        p.parent.relative_to(ROOT) for d in ("dbrx_jax", "convert", "configs") for p in (ROOT / d).rglob("__init__.py")
    }
    names = {".".join(f.parts) if f.parts[0] == "dbrx_jax" else ".".join(("dbrx_jax", *f.parts)) for f in folders}
    assert names == listed
