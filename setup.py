"""The optional C kernels: everything else is in pyproject.toml. Without a compiler the install goes on without them."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "halve.kernels._cpu",  # a plain library, loaded through ctypes by kernels/cpu.py
            ["src/halve/kernels/csrc/cpu.c"],
            depends=[f"src/halve/kernels/csrc/{name}.h" for name in ("cpu", "cpu_body", "cpu_avx2", "cpu_undef")],
            extra_compile_args=["-std=gnu11", "-O3"],
            optional=True,
        )
    ]
)
