"""Tests of the import cost of the package and of the list of packages in the wheel."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_few_modules_and_starts_no_backend():
    code = """
import sys
import jax
from flax import nnx
before = set(sys.modules)
import dbrx_jax
from jax._src import xla_bridge
new = {m.split(".")[0] for m in set(sys.modules) - before}
heavy = {"orbax", "torch", "tokenizers", "tyro", "matplotlib", "optax", "rich", "safetensors", "transformers"}
heavy |= {"llguidance", "fastapi"}
others = [m for m in set(sys.modules) - before if m.split(".")[0] != "dbrx_jax"]
print(len(others), xla_bridge.backends_are_initialized(), sorted(new & heavy))
"""
    modules, initialized, heavy = run_python(code).split(" ", 2)
    assert int(modules) < 60  # not counting those of JAX, Flax and dbrx_jax
    assert initialized == "False"
    assert heavy == "[]"


def test_import_does_not_change_jax_config():
    code = "import jax; a = dict(jax.config.values); import dbrx_convert.to_orbax; print(a == dict(jax.config.values))"
    assert run_python(code) == "True"


def test_public_names_are_importable():
    code = "from dbrx_jax import DbrxConfig, DbrxForCausalLM, DbrxTokenizer; print(DbrxForCausalLM.__name__)"
    assert run_python(code) == "DbrxForCausalLM"


def test_wheel_lists_every_package_folder():
    import tomllib

    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {p.parent.relative_to(ROOT) for d in ("dbrx_jax", "convert") for p in (ROOT / d).rglob("__init__.py")}
    names = {".".join(f.parts).removeprefix("convert") or "dbrx_convert" for f in folders}
    assert names | {"dbrx_jax.configs"} == set(setuptools["packages"])
    assert setuptools["package-dir"] == {"dbrx_convert": "convert", "dbrx_jax.configs": "configs"}
