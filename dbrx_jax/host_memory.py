"""Memory of this host: what it has, and what this process can still get."""

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")  # of the files of Linux that are read


def total_memory(root: Path = ROOT) -> int:
    """Returns the bytes of memory of this host, or as many of them as its container and this process may use."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [limit for limit, _ in (*_cgroup_limits(root), *_process_limits(root))]
    return min([physical, *limits])


def available_memory(root: Path = ROOT) -> int | None:
    """Returns the bytes that this process can still allocate; None if the system does not report it (only Linux does).

    It is the least of the free memory and swap, and of what remains under the limits of the container (control groups,
    versions 1 and 2) and of the process (`ulimit -v` and `-d`). Memory that caches files counts as free.
    """
    free = _fields(root / "proc/meminfo")
    if "MemAvailable" not in free:
        return None
    limits = (*_cgroup_limits(root), *_process_limits(root))
    remaining = [free["MemAvailable"] + free.get("SwapFree", 0), *(limit - used for limit, used in limits)]
    return max(0, min(remaining))


def _process_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yields limit and use in bytes of this process' address space and data."""
    own = _fields(root / "proc/self/status")
    for kind, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit, own.get(used, 0)


def _fields(file: Path) -> dict[str, int]:
    """Reads lines such as "MemAvailable: 12 kB", in bytes, or "inactive_file 12"; other lines are skipped."""
    fields = {}
    with contextlib.suppress(OSError):
        for line in file.read_text(errors="replace").splitlines():
            name, *values = line.replace(":", " ").split() or [""]
            if values and values[0].isdecimal():
                fields[name] = int(values[0]) * (1024 if values[1:] == ["kB"] else 1)
    return fields


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """Yields limit and use in bytes of this process' control groups and the groups around them.

    Files in the page cache are not counted as used, because the kernel gives their memory up; nor is swap, which only
    makes the limit higher.
    """
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers == "":
            mount, limit_name, usage_name, prefix = root / "sys/fs/cgroup", "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            limit_name, usage_name, prefix = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        folder = mount / path.lstrip("/")
        for group_folder in (folder, *folder.parents):
            limit, usage = _number(group_folder / limit_name), _number(group_folder / usage_name)
            if limit is not None and usage is not None:
                stat = _fields(group_folder / "memory.stat")
                cached = sum(stat.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
                yield limit, usage - cached
            if group_folder == mount:
                break


def _number(file: Path) -> int | None:
    """Reads a file of one number; None if it is missing or has none, such as "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
