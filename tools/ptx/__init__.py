"""Instruments of the tests: Triton kernels compiled to PTX, and PTX run on the CPU."""
