"""Which cores of its node a rank runs on: those near its GPU, shared out among the ranks that are near them, too.

Linux gives a process memory near the core that first touches it; so a rank that is bound before it allocates has its
memory near its cores as well.
"""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Set by a launcher whose ranks have their node to themselves. Of several runs on one machine, each would take the same
# cores.
BIND = "STEPPE_BIND_CORES"
SYSTEM = Path("/sys")


@dataclass(frozen=True, order=True)
class Core:
    """A logical processor: the NUMA node and the physical core that it belongs to."""

    numa: int
    physical: int
    number: int


def cores_of_rank(
    cores: Sequence[Core], local_rank: int, local_world: int, gpu_numa: Sequence[int | None]
) -> list[Core]:
    """The cores of one of a node's ranks, among those that the job may use there.

    gpu_numa: NUMA node of each local rank's GPU; None where there is none, or the machine does not say.

    Ranks with GPUs share the cores of their GPU's NUMA node. If that is not known for all of them, or a GPU's node has
    no core for us, NUMA nodes are given to as many ranks each, in order, where that divides; else all cores are shared
    in order. No two ranks have a core in common, and shares differ by one physical core at most, unless there are
    fewer cores than ranks: those are everybody's. Shares are of whole physical cores where there are enough.
    """
    homes = [numa for numa in gpu_numa if numa is not None and any(core.numa == numa for core in cores)]
    numas = sorted({core.numa for core in cores})
    if len(homes) < local_world:
        per_node = local_world // len(numas)
        homes = [numas[rank // per_node] for rank in range(local_world)] if local_world % len(numas) == 0 else []
    if not homes:
        return _share(cores, local_rank, local_world)
    home = homes[local_rank]
    neighbours = [rank for rank in range(local_world) if homes[rank] == home]
    return _share([core for core in cores if core.numa == home], neighbours.index(local_rank), len(neighbours))


def _share(cores: Sequence[Core], index: int, count: int) -> list[Core]:
    """The index-th of `count` contiguous shares."""
    units = _physical(cores)
    if len(units) < count:
        units = [[core] for core in sorted(cores)]
    if len(units) < count:
        return sorted(cores)
    start, stop = (len(units) * i // count for i in (index, index + 1))
    return [core for unit in units[start:stop] for core in unit]


def _physical(cores: Sequence[Core]) -> list[list[Core]]:
    """Logical processors by the physical core that they share, in order."""
    units: dict[tuple[int, int], list[Core]] = {}
    for core in sorted(cores):
        units.setdefault((core.numa, core.physical), []).append(core)
    return list(units.values())


def allowed_cores(system: Path = SYSTEM) -> list[Core]:
    """The logical processors that this process may use, as the kernel describes them; one without a description is a
    physical core of its own, on NUMA node 0."""
    cores = []
    for number in sorted(os.sched_getaffinity(0)):
        folder = system / f"devices/system/cpu/cpu{number}"
        numa = min((int(path.name.removeprefix("node")) for path in folder.glob("node[0-9]*")), default=0)
        siblings = folder / "topology/thread_siblings_list"
        physical = min(_numbers(siblings.read_text(encoding="ascii"))) if siblings.is_file() else number
        cores.append(Core(numa, physical, number))
    return cores


def numa_of_pci(address: str | None, system: Path = SYSTEM) -> int | None:
    """The NUMA node of a PCI device such as "0000:3b:00.0", None where the machine does not say (a virtual one)."""
    path = system / f"bus/pci/devices/{address}/numa_node"
    numa = int(path.read_text(encoding="ascii")) if address is not None and path.is_file() else -1
    return numa if numa >= 0 else None


def bind(local_rank: int, local_world: int, gpu_addresses: Sequence[str | None], system: Path = SYSTEM) -> list[int]:
    """Bind this process, with all threads that it has and will have, to its cores; returns their numbers.

    gpu_addresses: PCI address of each local rank's GPU, None without one.
    """
    gpu_numa = [numa_of_pci(address, system) for address in gpu_addresses]
    chosen = [core.number for core in cores_of_rank(allowed_cores(system), local_rank, local_world, gpu_numa)]
    for thread in os.listdir("/proc/self/task"):
        with suppress(ProcessLookupError):  # it has just ended
            os.sched_setaffinity(int(thread), chosen)
    return sorted(chosen)


def _numbers(text: str) -> list[int]:
    """Linux's form of a list: "0-3,8"."""
    numbers: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers
