"""Cores of ranks: on any machine, and on this one."""

import os
import subprocess
import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from pretrain.affinity import Core, allowed_cores, cores_of_rank, numa_of_pci
from pretrain.device import gpu_addresses


def machine(numas: int, cores_per_numa: int, threads: int) -> list[Core]:
    """Numbered as Linux does: first threads of all cores first."""
    cores = numas * cores_per_numa
    return [Core(core // cores_per_numa, core, core + cores * t) for t in range(threads) for core in range(cores)]


@st.composite
def nodes(draw: st.DrawFn) -> tuple[list[Core], int, list[int | None]]:
    """The cores that a job may use on some machine, its ranks, and the NUMA nodes of their GPUs."""
    numas = draw(st.integers(1, 4))
    everything = machine(numas, draw(st.integers(1, 6)), draw(st.integers(1, 2)))
    cores = draw(st.lists(st.sampled_from(everything), min_size=1, unique=True))
    ranks = draw(st.integers(1, 8))
    gpus = draw(st.lists(st.none() | st.integers(0, numas - 1), min_size=ranks, max_size=ranks))
    return cores, ranks, gpus


@given(node=nodes())
def test_shares_are_disjoint_and_within_what_is_allowed(node: tuple[list[Core], int, list[int | None]]) -> None:
    cores, ranks, gpus = node
    shares = [cores_of_rank(cores, rank, ranks, gpus) for rank in range(ranks)]
    for share in shares:
        assert share
        assert set(share) <= set(cores)
        for other in shares:
            assert share is other or not set(share) & set(other) or set(share) == set(other)
    if len(cores) >= ranks and all(gpu is None for gpu in gpus) and len({core.numa for core in cores}) == 1:
        assert sorted(core for share in shares for core in share) == sorted(cores), "disjoint, and nothing left"


@given(node=nodes())
def test_a_gpus_rank_is_near_it(node: tuple[list[Core], int, list[int | None]]) -> None:
    cores, ranks, gpus = node
    if all(any(core.numa == gpu for core in cores) for gpu in gpus):
        for rank, gpu in enumerate(gpus):
            assert {core.numa for core in cores_of_rank(cores, rank, ranks, gpus)} == {gpu}
        used = {core for rank in range(ranks) for core in cores_of_rank(cores, rank, ranks, gpus)}
        assert used == {core for core in cores if core.numa in gpus}


@given(
    numas=st.integers(1, 4),
    per_numa=st.integers(1, 8),
    threads=st.integers(1, 2),
    each=st.integers(1, 8),
    data=st.data(),
)
def test_ranks_without_gpus_share_evenly(
    numas: int, per_numa: int, threads: int, each: int, data: st.DataObject
) -> None:
    cores = data.draw(st.permutations(machine(numas, per_numa, threads)))
    ranks = numas * each
    shares = [cores_of_rank(cores, rank, ranks, [None] * ranks) for rank in range(ranks)]
    for rank, share in enumerate(shares):
        assert {core.numa for core in share} == {rank // each}
    if per_numa >= each:
        assert sorted(core for share in shares for core in share) == sorted(cores)
        physical = [{core.physical for core in share} for share in shares]
        assert sum(map(len, physical)) == numas * per_numa, "the threads of a core belong together"
        assert max(map(len, physical)) - min(map(len, physical)) <= 1


def test_two_sockets_with_four_gpus_each() -> None:
    cores = machine(numas=2, cores_per_numa=8, threads=2)
    gpus = [0, 0, 0, 0, 1, 1, 1, 1]
    assert [core.number for core in cores_of_rank(cores, 0, 8, gpus)] == [0, 16, 1, 17]
    assert [core.number for core in cores_of_rank(cores, 7, 8, gpus)] == [14, 30, 15, 31]


def test_three_ranks_on_two_sockets_share_all_cores() -> None:
    cores = machine(numas=2, cores_per_numa=3, threads=1)
    shares = [cores_of_rank(cores, rank, 3, [None] * 3) for rank in range(3)]
    assert [[core.number for core in share] for share in shares] == [[0, 1], [2, 3], [4, 5]]


def test_fewer_cores_than_ranks_are_everybodys() -> None:
    cores = machine(numas=1, cores_per_numa=2, threads=1)
    assert cores_of_rank(cores, 4, 8, [None] * 8) == cores


def test_what_the_kernel_says_is_read(tmp_path: Path) -> None:
    for number in os.sched_getaffinity(0):
        folder = tmp_path / f"devices/system/cpu/cpu{number}"
        (folder / "topology").mkdir(parents=True)
        (folder / f"node{number % 2 + 3}").mkdir()
        (folder / "topology/thread_siblings_list").write_text(f"{number},{number + 64}-{number + 65}\n")
    assert allowed_cores(tmp_path) == [Core(n % 2 + 3, n, n) for n in sorted(os.sched_getaffinity(0))]
    assert allowed_cores(tmp_path / "nothing") == [Core(0, n, n) for n in sorted(os.sched_getaffinity(0))]

    gpu = tmp_path / "bus/pci/devices/0000:3b:00.0"
    gpu.mkdir(parents=True)
    (gpu / "numa_node").write_text("1\n")
    assert numa_of_pci("0000:3b:00.0", tmp_path) == 1
    (gpu / "numa_node").write_text("-1\n")  # a virtual machine's
    assert numa_of_pci("0000:3b:00.0", tmp_path) is None
    assert numa_of_pci("0000:af:00.0", tmp_path) is None
    assert numa_of_pci(None, tmp_path) is None


BOUND = """
import os, subprocess, sys, threading
from pretrain.affinity import bind
from pretrain.device import gpu_addresses
seen = []
go = threading.Event()
early = threading.Thread(target=lambda: (go.wait(), seen.append(os.sched_getaffinity(0))))
early.start()
chosen = bind(int(sys.argv[1]), int(sys.argv[2]), [None] * int(sys.argv[2]))
go.set()
early.join()
child = subprocess.run([sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"], capture_output=True)
assert seen == [set(chosen)], seen
assert child.stdout.decode().strip() == str(chosen)
print(chosen)
"""


def test_binding_reaches_threads_that_are_there_and_children_to_come() -> None:
    allowed = sorted(os.sched_getaffinity(0))
    ranks = min(2, len(allowed))
    words = [[sys.executable, "-c", BOUND, str(rank), str(ranks)] for rank in range(ranks)]
    said = [subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout for line in words]
    assert sorted(core for line in said for core in map(int, line.strip(" []\n").split(","))) == allowed
    assert sorted(os.sched_getaffinity(0)) == allowed


def test_a_thread_that_ends_meanwhile_is_no_matter() -> None:
    """It is listed, and gone by the time it would be bound."""
    gone = "import os\nlisted = os.listdir\nos.listdir = lambda path: ['4194304', *listed(path)]\n"  # above all ids
    words = [sys.executable, "-c", gone + BOUND, "0", "1"]
    assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout


def test_every_rank_has_a_gpus_address_or_none() -> None:
    addresses = gpu_addresses(16)
    assert len(addresses) == 16
    assert addresses[-1] is None
