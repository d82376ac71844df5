"""How much memory there is for the parts of a preparation that take what they are given."""

import re
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def available_bytes(proc: Path = PROC, cgroups: Path = CGROUPS) -> int:
    """Memory that this process and its workers can still take: what the machine has left, and what Slurm, a container
    or the like leave to them of that, which they set for a control group (version 2) or one above it."""
    available = 1024 * int(re.findall(r"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)[0])
    of_version_2 = re.findall(r"^0::/(.*)$", _read(proc / "self" / "cgroup"), re.MULTILINE)
    group = cgroups / of_version_2[0] if of_version_2 else cgroups
    for folder in (group, *group.parents[: len(group.parts) - len(cgroups.parts)]):
        limit = _read(folder / "memory.max").strip()
        if limit.isdigit():
            used = int(_read(folder / "memory.current"))
            # Cached files are counted as used, but give way.
            cached = re.findall(r"^(?:in)?active_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            available = min(available, int(limit) - used + sum(map(int, cached)))
    return max(available, 0)


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""
