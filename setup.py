"""Builds csrc into synpo_kernels/_C.abi3.so; without a compiler, or torch beside setuptools, installs without it."""

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class SideBySide(build_ext):
    """Compiles as many sources at once as there are cores; setuptools takes them one by one."""

    def build_extensions(self) -> None:
        compile_one = self.compiler.compile

        def compile_all(sources, *given, **named):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                made = pool.map(lambda source: compile_one([source], *given, **named), sources)
                return [path for paths in made for path in paths]

        self.compiler.compile = compile_all
        super().build_extensions()


extensions = []
try:
    from torch.utils.cpp_extension import include_paths, library_paths

    # Only torch's stable ABI (2.10 and later) and no Python symbols: one binary for every torch and Python.
    flags = ["-O3", "-std=c++17", "-fvisibility=hidden", "-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    extensions = [
        Extension(
            "synpo_kernels._C",
            sources=["csrc/ops.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            depends=glob("csrc/cpu/*.h"),
            include_dirs=["csrc", *include_paths()],
            extra_compile_args=flags,
            libraries=["torch_cpu", "c10"],
            library_dirs=library_paths(),
            optional=True,
            py_limited_api=True,
        )
    ]
except ImportError:
    warnings.warn("torch is not importable here: installing without the C++ kernels", stacklevel=1)
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": SideBySide},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if extensions else {},
)
