"""The GPU benchmark of `benchmarks/gpu.sh`: its models, its products, its peers. Not in the wheel."""
