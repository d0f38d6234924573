"""Kinds and numbers of devices that exist: slices of TPUs, hosts of eight GPUs, CPUs of this machine."""

import re

from dbrx_jax.errors import PlanError
from dbrx_jax.host_memory import total_memory
from dbrx_jax.planning.targets import TARGETS, Target, slice_sizes

CPU = "cpu"
MAX_CPU_DEVICES = 256
MAX_GPU_HOSTS = 1024
_DEVICES = re.compile(rf"({'|'.join([*TARGETS, CPU])})[-x]0*([0-9]+)")


def parse_devices(text: str) -> tuple[Target, int]:
    """Parses a kind and a number of JAX devices, such as "v5e-64", "h100x8" or "cpu-8"; "cpu" is one device.

    Devices of a CPU share this machine's memory equally.

    Raises:
      PlanError: the kind is unknown, or there is no such number of devices; the message says which there are.
    """
    name = f"{CPU}-1" if text.lower() == CPU else text.lower()
    match = _DEVICES.fullmatch(name)
    if match is None:
        kinds = ", ".join([*TARGETS, CPU])
        raise PlanError(f"expected devices such as v5e-64 or h100x8, of the kinds {kinds}, got {text!r:.40}")
    kind, devices = match[1], int(match[2][:10])  # a number of more digits is refused all the same
    if kind == CPU:
        if not 1 <= devices <= MAX_CPU_DEVICES:
            raise PlanError(f"{text:.40}: expected 1 to {MAX_CPU_DEVICES} devices of this machine's CPU")
        return _cpu(devices), devices
    target = TARGETS[kind]
    if target.platform == "tpu":
        _check_slice(text, target, devices)
    elif not 1 <= devices <= target.devices_per_host and not _are_whole_hosts(target, devices):
        per_host = target.devices_per_host
        raise PlanError(
            f"{text:.40}: expected 1 to {per_host} devices of {kind}, or whole hosts of {per_host}: "
            f"{2 * per_host}, {3 * per_host}, … {MAX_GPU_HOSTS * per_host}"
        )
    return target, devices


def device_counts(target: Target) -> tuple[int, ...]:
    """Returns the usual numbers of devices of a kind, in ascending order; of a CPU none, as all share its memory."""
    if target.name not in TARGETS:
        return ()
    counts = tuple(n * target.devices_per_chip for n in slice_sizes(target.name))
    return counts if target.platform == "tpu" else (*counts, *(target.devices_per_host * n for n in (2, 4, 8)))


def _check_slice(text: str, target: Target, devices: int) -> None:
    counts = device_counts(target)
    if devices in counts:
        return
    below = [n for n in counts if n < devices][-1:]
    nearest = " or ".join(map(str, below + [n for n in counts if n > devices][:1]))
    raise PlanError(
        f"{text:.40}: there is no such slice of {target.name}; choose {nearest} devices (all: "
        f"{', '.join(map(str, counts))})"
    )


def _are_whole_hosts(target: Target, devices: int) -> bool:
    return devices % target.devices_per_host == 0 and 1 <= devices // target.devices_per_host <= MAX_GPU_HOSTS


def _cpu(devices: int) -> Target:
    """Returns one of this machine's equal devices. No data sheet has the rates of its memory and arithmetic."""
    return Target(CPU, CPU, total_memory() // devices, None, None, None, None, devices_per_host=devices, kernels=False)
