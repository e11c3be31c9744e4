"""Instruments beside the package: the bundled reader, the pages, the GPU benchmark, PTX on the CPU. Not in the wheel."""
