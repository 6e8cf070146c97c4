"""CPUs that a process may use, with simulated affinity, OMP_NUM_THREADS and quota files."""

import os
import subprocess
import sys

import pytest
import torch

from mixmo_fastai.evaluation.logits import collect_member_logits
from mixmo_fastai.runtime import acceleration, cpus
from mixmo_fastai.runtime.cpus import CpuLimit, available_cpus, available_threads, cpu_quota

V2 = "29 23 0:26 {mounted} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:31 {mounted} /sys/fs/cgroup/{name} rw,relatime - cgroup cgroup rw,{name}"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Simulate 64 CPUs, and return a function that writes the files of control groups."""
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    def write(cgroup, mounts, **files):
        texts = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": "\n".join(mounts)}
        for name, text in {**texts, **files.get("files", {})}.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text + "\n")
        return tmp_path

    return write


def v1(folder, quota, period=100_000):
    return {
        f"sys/fs/cgroup/{folder}/cpu.cfs_quota_us": str(quota),
        f"sys/fs/cgroup/{folder}/cpu.cfs_period_us": str(period),
    }


def test_a_process_without_limits_has_all_cpus(machine, tmp_path):
    assert available_cpus(tmp_path) == available_threads(tmp_path) == CpuLimit(64, cpus.ALL)
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize("count", [1, 3])
def test_affinity_limits_the_cpus(machine, monkeypatch, tmp_path, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))
    assert available_cpus(tmp_path) == CpuLimit(count, cpus.AFFINITY)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system has no affinity")
def test_affinity_of_a_process():
    program = (
        "import os; from mixmo_fastai.runtime.cpus import available_cpus;"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); print(available_cpus().count)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert result.stdout.strip() == b"1"


@pytest.mark.parametrize(
    ("text", "quota", "count"),
    [
        ("200000 100000", 2.0, 2),
        ("150000 100000", 1.5, 2),
        ("10000 100000", 0.1, 1),
        ("25000 10000", 2.5, 3),
        ("max 100000", None, 64),
        ("", None, 64),
        ("damaged", None, 64),
        ("200000", None, 64),
        ("200000 0", None, 64),
        ("9900000 100000", 99.0, 64),
    ],
)
def test_quota_of_version_2_in_a_container(machine, text, quota, count):
    """With its own namespace, a container sees its group as the root."""
    root = machine("0::/", [V2.format(mounted="/")], files={"sys/fs/cgroup/cpu.max": text})
    assert cpu_quota(root) == quota
    reason = cpus.QUOTA if count < 64 else cpus.ALL
    assert available_cpus(root) == CpuLimit(count, reason)


@pytest.mark.parametrize(("quota", "expected"), [(400_000, 4.0), (-1, None)])
def test_quota_of_version_1(machine, quota, expected):
    groups = "5:cpuset:/other\n4:cpu,cpuacct:/docker/abc\n1:name=systemd:/x\n0::/"
    mounts = [
        V1.format(mounted="/", name="cpuset"),
        V1.format(mounted="/", name="cpu,cpuacct"),
    ]
    # The quotas of other groups do not count.
    files = {**v1("cpuset/other", 100_000), **v1("cpu,cpuacct/docker/abc", quota)}
    assert cpu_quota(machine(groups, mounts, files=files)) == expected


def test_version_1_in_a_container_without_a_namespace(machine):
    """/proc/self/cgroup has the path on the host, whose folder is mounted as the root."""
    mounts = [V1.format(mounted="/docker/abc", name="cpu")]
    root = machine("4:cpu:/docker/abc", mounts, files=v1("cpu", 300_000, 150_000))
    assert cpu_quota(root) == 2.0


def test_the_smallest_quota_of_a_group_and_its_parents_holds(machine):
    files = {
        "sys/fs/cgroup/user.slice/cpu.max": "300000 100000",
        "sys/fs/cgroup/user.slice/job/cpu.max": "800000 100000",
        "sys/fs/cgroup/user.slice/job/step/cpu.max": "max 100000",
        "sys/fs/cgroup/other/cpu.max": "100000 100000",
    }
    root = machine("0::/user.slice/job/step", [V2.format(mounted="/")], files=files)
    assert cpu_quota(root) == 3.0


def test_both_versions_are_read(machine):
    hybrid = V2.format(mounted="/").replace("cgroup rw,", "cgroup/unified rw,")
    files = {"sys/fs/cgroup/unified/cpu.max": "500000 100000", **v1("cpu", 700_000)}
    root = machine("1:cpu:/\n0::/", [V1.format(mounted="/", name="cpu"), hybrid], files=files)
    assert cpu_quota(root) == 5.0


@pytest.mark.parametrize("group", ["0::/../sibling", "0::", "0", "", "0::relative"])
def test_unusual_groups_are_ignored(machine, group):
    mounts = ["", "x", "1 2 3 4 5 - cgroup2", V2.format(mounted="/")]
    files = {"sys/fs/cgroup/cpu.max": "200000 100000"}
    assert cpu_quota(machine(group, mounts, files=files)) == 2.0


@pytest.mark.parametrize(
    ("threads", "processes", "expected"),
    [
        ("2", None, CpuLimit(2, cpus.OPENMP)),
        ("3,2", None, CpuLimit(3, cpus.OPENMP)),
        ("16", None, CpuLimit(8, cpus.QUOTA)),
        ("", "", CpuLimit(8, cpus.QUOTA)),
        ("0", "x", CpuLimit(8, cpus.QUOTA)),
        (None, "3", CpuLimit(2, cpus.PROCESSES)),
        (None, "16", CpuLimit(1, cpus.PROCESSES)),
        ("1", "4", CpuLimit(1, cpus.OPENMP)),
    ],
)
def test_threads_of_a_process(machine, monkeypatch, threads, processes, expected):
    for name, value in (("OMP_NUM_THREADS", threads), ("LOCAL_WORLD_SIZE", processes)):
        if value is not None:
            monkeypatch.setenv(name, value)
    files = {"sys/fs/cgroup/cpu.max": "800000 100000"}
    root = machine("0::/", [V2.format(mounted="/")], files=files)
    assert available_threads(root) == expected
    assert available_cpus(root) == CpuLimit(8, cpus.QUOTA)


def test_another_system_has_no_limits_but_its_cpus(machine, monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus(tmp_path) == CpuLimit(1, cpus.ALL)


@pytest.mark.parametrize(("own", "allowed", "used"), [(64, 2, 2), (1, 8, 1)])
def test_evaluation_uses_no_more_threads_than_cpus(monkeypatch, own, allowed, used):
    counts = [own]
    monkeypatch.setattr(torch, "get_num_threads", lambda: counts[-1])
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(acceleration, "available_threads", lambda: CpuLimit(allowed, cpus.QUOTA))
    seen = []

    def network(images):
        seen.append(torch.get_num_threads())
        return images.mean(dim=(2, 3))

    model = torch.nn.Identity()
    monkeypatch.setattr(model, "forward", network)
    collect_member_logits(model, [(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.long))])
    assert seen == [used]
    assert counts[-1] == own
