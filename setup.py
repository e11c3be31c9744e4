"""The optional C kernels: everything else is in pyproject.toml. Without a compiler the install goes on without them."""

from setuptools import Extension, setup

HEADERS = ("cpu", "cpu_avx2", "cpu_body", "cpu_layer", "cpu_undef", "ranks", "threads")

setup(
    ext_modules=[
        Extension(
            "halve.kernels._cpu",  # a plain library, loaded through ctypes by kernels/cpu.py
            [f"src/halve/kernels/csrc/{name}.c" for name in ("cpu", "ranks", "step", "threads")],
            depends=[f"src/halve/kernels/csrc/{name}.h" for name in HEADERS],
            extra_compile_args=["-std=gnu11", "-O3"],
            libraries=["m"],
            optional=True,
        )
    ]
)
