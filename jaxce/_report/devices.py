"""The devices that a report is about: those of this machine, or those of a compiler that needn't have any."""

import os
from importlib import metadata
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIBI = 2**30


class Chip(NamedTuple):
    """A kind of device that can be compiled for where it isn't."""

    device_kind: str  # as JAX calls it
    memory: int  # bytes
    hertz: float = 0.0  # of a TPU's clock, by which its compiler's cycles are time
    flops: float = 0.0  # at most, a second, in bfloat16


CHIPS = {
    "tpu-v5e": Chip("TPU v5 lite", 16 * GIBI, 1.5e9, 197e12),
    "tpu-v5p": Chip("TPU v5", 95 * GIBI, 1.75e9, 459e12),
    "tpu-v6e": Chip("TPU v6 lite", 32 * GIBI, 1.75e9, 918e12),
    "h200": Chip("NVIDIA H200", 141_000_000_000),
}

# The published limits of an H200, in the form that XLA reads.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 62914560 clock_rate_ghz: 1.98
  device_memory_size: 150000000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
"""


class UsageError(Exception):
    """An argument that makes no sense here, or a device that isn't there: its message is one line for the user."""


def without_a_device() -> None:
    """Settings under which the compilers run where their devices aren't; before JAX starts a backend."""
    # Libtpu asks no host for its TPU, and is silent about what it can't find.
    silent = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5e-1", "TPU_STDERR_LOG_LEVEL": "3"}
    for name, value in (silent | {"TPU_SKIP_MDS_QUERY": "1", "TPU_MIN_LOG_LEVEL": "3"}).items():
        os.environ.setdefault(name, value)
    # There is no TPU for two processes to quarrel about, and no card to try kernels out on.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    jax.config.update("jax_platforms", "cpu")


def named(device: str) -> list[Any]:
    """The devices of a name such as "tpu-v5e:2x4" (a slice of 2 × 4 chips) or "h200:8", which only a compiler knows."""
    kind, _, extent = device.partition(":")
    if kind not in CHIPS:
        raise UsageError(f"--device {device}: known are {', '.join(CHIPS)}, as tpu-v5e:2x4 (2 × 4 chips) or h200:8")
    if kind == "h200":
        if not (extent or "1").isdecimal() or extent.strip("0") == "" != extent:
            raise UsageError(f"--device {device}: how many H200s? For example h200:8")
        options = {"platform": "cuda", "topology_name": "", "target_config": H200, "topology": f"1x1x{extent or 1}"}
    else:
        if extent and not all(side.isdecimal() for side in extent.split("x")):
            raise UsageError(f"--device {device}: write the slice as {kind}:2x2")
        small = "2x2x1" if kind == "tpu-v5p" else "2x2"
        options = {"platform": "tpu", "topology_name": f"{kind.removeprefix('tpu-')}:{extent or small}"}
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except Exception as error:  # each compiler raises what it likes
        raise UsageError(f"--device {device}: {_why_not(options['platform'], error)}") from error


def _why_not(platform: str, error: Exception) -> str:
    """What to install, or what the compiler said."""
    version = jax.__version__
    packages = {"tpu": ["libtpu"], "cuda": ["jax-cuda13-plugin", "jax-cuda12-plugin"]}[platform]
    if not any(_installed(package) for package in packages):
        what = (
            f'"jax[tpu]=={version}"'
            if platform == "tpu"
            else f'--no-deps "jax-cuda13-plugin=={version}" "jax-cuda13-pjrt=={version}"'
        )
        return f"its compiler isn't installed here: pip install {what}"
    return f"its compiler says: {str(error).splitlines()[0] if str(error) else type(error).__name__}"


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def chip_of(device: Any) -> Chip | None:
    """What is known of a device's kind."""
    return next((chip for chip in CHIPS.values() if chip.device_kind == device.device_kind), None)


def memory_of(device: Any) -> int | None:
    """Bytes that a device has in all: on a CPU, those of the machine. None if nobody knows."""
    if device.platform == "cpu":
        names = getattr(os, "sysconf_names", {})
        if not {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= set(names):
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except Exception:  # of a device that isn't there
        limit = None
    chip = chip_of(device)
    return limit or (chip.memory if chip else None)
