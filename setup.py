"""Builds the native kernels for CPUs, if there are a compiler and XLA's headers; else XLA computes (docs/cpu.md)."""

import importlib.util
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NATIVE = Path("dbrx_jax/kernels/cpu/native")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden", "-g0", "-Wno-psabi"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]
# Each file is compiled for one set of instructions; which one runs is chosen when it runs.
FLAGS_BY_FILE = {
    "kernels_portable.cc": [],
    "kernels_avx2.cc": ["-mavx2", "-mfma"],
    "kernels_avx512.cc": AVX512,
    "kernels_avx512_bf16.cc": [*AVX512, "-mavx512bf16"],
}


class BuildNative(build_ext):
    """Compiles each of the kernels' files with its own flags."""

    def build_extension(self, ext: Extension) -> None:
        is_x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32
        for name, flags in FLAGS_BY_FILE.items():
            flags = [*FLAGS, *(flags if is_x86 else [])]
            ext.extra_objects += self.compiler.compile(
                [str(NATIVE / name)], self.build_temp, extra_postargs=flags, depends=ext.depends
            )
        super().build_extension(ext)


def headers() -> list[str]:
    """Returns the folder of XLA's headers, which are in the jaxlib that the build requires; empty without it."""
    spec = importlib.util.find_spec("jaxlib")
    return [f"{folder}/include" for folder in (spec.submodule_search_locations or [] if spec else [])]


native = Extension(
    "dbrx_jax.kernels.cpu._native",
    [str(NATIVE / "ffi.cc")],
    include_dirs=[str(NATIVE), *headers()],
    depends=[str(path) for path in NATIVE.glob("*.h")],
    extra_compile_args=FLAGS,
    language="c++",
    py_limited_api=True,
    optional=True,  # a failure to compile it is no failure to install
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildNative}, options={"bdist_wheel": {"py_limited_api": "cp311"}})
