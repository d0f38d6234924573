"""Tests of the installed package, plain and editable, run in the checkout and in another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("dbrx_jax", "convert", "configs", "benchmarks", "notebooks", "pyproject.toml", "setup.py")
COPIED += ("README.md", "LICENSE")
MODULES = [path for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()]
# gguf_file runs where llama.cpp's Python package is installed.
BENCHMARKS = sorted({*(path.stem for path in MODULES), "gpu"} - {"__main__", "gguf_file"})
LOAD = """
import sys
import dbrx_convert.to_hf
from dbrx_jax import DbrxConfig, DbrxForCausalLM
from dbrx_jax.sharding.recipes import recipe_names
assert DbrxConfig.from_name("9b").d_model == 2048 and "v5e-64" in recipe_names()
for folder in sys.argv[1:]:
    model = DbrxForCausalLM.from_pretrained(folder, dtype="float32")
    print(model.generate([[1, 2, 3]], max_new_tokens=2, do_sample=False, eos_token_id=None)[0].tolist())
"""

# Prints the --help of every benchmark as `python -m` would, in one process because importing JAX takes seconds.
HELP = """
import contextlib, io, json, runpy, sys
texts, names = {}, sys.argv[1:]
for name in names:
    out, sys.argv = io.StringIO(), [name, "--help"]
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_module(f"benchmarks.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (name, end.code)
    texts[name] = out.getvalue()
print(json.dumps(texts))
"""


class Installed:
    """A new virtual environment with the package, which uses the dependencies of this environment."""

    def __init__(self, folder: Path, editable: bool):
        self.clone = folder / "clone"
        for name in COPIED:
            source, target = ROOT / name, self.clone / name
            ignore = shutil.ignore_patterns("__pycache__", "results", "*.so")
            shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        self.bin = folder / "venv" / "bin"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
        pip = [sys.executable, "-m", "pip", "--python", self.bin / "python", "install", "-q", "--no-deps"]
        done = subprocess.run([*pip, *(["-e"] if editable else []), self.clone], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def run(self, folder: Path, *command: str) -> str:
        """Runs a command of the environment in a folder; returns its standard output."""
        # The .pth file by which this environment may find the package has no effect in a folder of PYTHONPATH.
        env = os.environ | {"PYTHONPATH": sysconfig.get_paths()["purelib"], "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
        program, *arguments = command
        done = subprocess.run([self.bin / program, *arguments], cwd=folder, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory):
    return Installed(tmp_path_factory.mktemp(request.param), request.param == "editable")


@pytest.fixture
def folder(request, installed):
    return getattr(installed, request.param)


# Editable in the checkout is how all other tests use it.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("installed", "folder"),
    [("wheel", "clone"), ("wheel", "elsewhere"), ("editable", "elsewhere")],
    indirect=True,
    scope="module",
)
def test_installed_package_loads_and_generates(installed, folder, tmp_path):
    source, orbax = ROOT / "tests" / "golden" / "fused", tmp_path / "orbax"
    installed.run(folder, "dbrx-convert", "to-orbax", str(source), str(orbax))
    from_hugging_face, from_orbax = installed.run(folder, "python", "-c", LOAD, str(source), str(orbax)).splitlines()
    assert from_hugging_face == from_orbax
    assert len(json.loads(from_orbax)) == 5
    plan = json.loads(installed.run(folder, "dbrx-jax", "plan", "132b-instruct", "--on", "v5e-64", "--json"))
    assert plan["axes"] == {"expert": 16, "tensor": 4}
    assert installed.run(folder, "dbrx-jax", "generate", "--prompt", "A list is", "--max-new-tokens", "2")


BACKEND = """
from dbrx_jax.kernels.cpu.library import instruction_sets
print(len(instruction_sets()))
"""


@pytest.mark.slow
def test_native_kernels_are_optional(tmp_path, monkeypatch):
    """Without a compiler the package installs, without a word, and XLA computes the same."""
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "/bin/false")
    installed = Installed(tmp_path, editable=False)
    assert installed.run(installed.elsewhere, "python", "-c", BACKEND).strip() == "0"
    assert installed.run(installed.elsewhere, "dbrx-jax", "generate", "--prompt", "A list is", "--max-new-tokens", "2")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a compiler")
@pytest.mark.parametrize("installed", ["wheel", "editable"], indirect=True)
def test_native_kernels_are_built(installed):
    assert int(installed.run(installed.elsewhere, "python", "-c", BACKEND)) > 0


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_every_benchmark_prints_its_help(installed):
    assert "decode" in installed.run(installed.clone, "python", "-m", "benchmarks", "--help")
    texts = json.loads(installed.run(installed.clone, "python", "-c", HELP, *BENCHMARKS))
    assert list(texts) == BENCHMARKS
    for name, text in texts.items():
        assert "usage" in text.lower(), name


@pytest.mark.slow
@pytest.mark.parametrize("installed", ["wheel"], indirect=True)
def test_notebook_runs(installed):
    """Runs outside the checkout; .ci/run also executes it there after an editable install."""
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "BROKEN" in installed.run(installed.elsewhere, "python", "-c", "\n".join(cells))
