"""CPUs that this process may use: affinity, CPU quota of its control groups, OMP_NUM_THREADS.

torch starts a thread per physical core of the machine, also in a container that may use two of 64.
Standard library only.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ALL, AFFINITY, QUOTA = "CPUs", "CPU affinity", "CPU quota"
OPENMP, PROCESSES = "OMP_NUM_THREADS", "processes on this machine"


class CpuLimit(NamedTuple):
    """How many CPUs, or threads, may be used.

    Attributes:
        count: the number, at least 1.
        reason: what limits it, one of the constants above.
    """

    count: int
    reason: str = ALL


def available_cpus(root: Path = Path("/")) -> CpuLimit:
    """Return the number of CPUs that all processes of this user or container may use together.

    A quota of 1.5 CPUs counts as two: with a single thread, a third of it would be unused.

    Args:
        root: root of the file system with /proc and /sys; another one in tests.

    >>> 1 <= available_cpus().count <= os.cpu_count()
    True
    """
    limits = [CpuLimit(os.cpu_count() or 1)]
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        limits.append(CpuLimit(len(os.sched_getaffinity(0)), AFFINITY))
    if (quota := cpu_quota(root)) is not None:
        limits.append(CpuLimit(max(1, math.ceil(quota)), QUOTA))
    return min(limits, key=lambda limit: limit.count)


def available_threads(root: Path = Path("/")) -> CpuLimit:
    """Return the largest sensible number of threads for this process.

    It is at most OMP_NUM_THREADS, and the CPUs are divided among the processes that torchrun or
    accelerate has started on this machine.

    Args:
        root: see `available_cpus`.

    >>> available_threads().count >= 1
    True
    """
    cpus = available_cpus(root)
    limits = [cpus]
    if (processes := _positive(os.environ.get("LOCAL_WORLD_SIZE"))) is not None:
        limits.append(CpuLimit(max(1, cpus.count // processes), PROCESSES))
    first = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # of the outermost level
    if (threads := _positive(first)) is not None:
        limits.append(CpuLimit(threads, OPENMP))
    return min(limits, key=lambda limit: limit.count)


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the CPU quota of this process's control groups, in CPUs; None if there is none.

    Both versions of control groups (cgroups) are read, and the smallest quota of a group and its
    parents holds. See the kernel's documentation: admin-guide/cgroup-v2 (cpu.max) and
    scheduler/sched-bwc (cpu.cfs_quota_us).

    Args:
        root: see `available_cpus`.
    """
    quotas = [quota for folder in _group_folders(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _group_folders(root: Path) -> Iterator[Path]:
    """Iterate over the folders of this process's control groups and of their parents."""
    groups = dict(_groups(_read(root / "proc/self/cgroup")))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        controller = "" if kind[0] == "cgroup2" else "cpu"
        if controller and controller not in kind[2].split(","):
            continue
        mount = root / fields[4].lstrip("/")
        yield mount
        # In a container, the mounted folder may be that of its own group.
        group, mounted = PurePosixPath(groups.get(controller, "/")), PurePosixPath(fields[3])
        if group.is_relative_to(mounted):
            relative = group.relative_to(mounted)
            yield from (mount / part for part in (relative, *relative.parents))


def _groups(text: str) -> Iterator[tuple[str, str]]:
    """Iterate over controllers and groups in /proc/self/cgroup; version 2 is the controller ""."""
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, colon, group = rest.partition(":")
        if colon:
            yield from ((controller, group) for controller in controllers.split(","))


def _quota(folder: Path) -> float | None:
    """Return the quota of one group in CPUs: version 2, otherwise version 1."""
    limit, _, period = _read(folder / "cpu.max").strip().partition(" ")
    if not limit:
        limit, period = (_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
    quota, length = _positive(limit), _positive(period)  # unlimited: "max", -1
    return None if quota is None or length is None else quota / length


def _positive(text: str | None) -> int | None:
    """Return a positive integer, or None for other text."""
    try:
        number = int(text or "")
    except ValueError:
        return None
    return number if number > 0 else None


def _read(path: Path) -> str:
    """Return the text of a file; nothing if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
