"""What is known about devices: their peak rate and the memory in use."""

import jax

# Dense bfloat16 FLOP/s of one JAX device, by the beginning of `device_kind`, from the vendors' data sheets.
# A TPU v2 or v3 chip is two devices.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "Tesla V100": 125e12,
}


def peak_flops(kind: str) -> float:
    """The bfloat16 FLOP/s of a device of this ``device_kind``; 0 if it is not known."""
    matches = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(matches, key=len)] if matches else 0.0


def memory() -> dict[str, int]:
    """Bytes in use and the largest number so far, the most over this process's devices; {} where nobody knows."""
    found = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
    names = {"memory_bytes": "bytes_in_use", "peak_memory_bytes": "peak_bytes_in_use"}
    return {name: max(stats[key] for stats in found) for name, key in names.items() if found and key in found[0]}
