"""One rank of a preflight: `python -P -m launch.cluster.preflight_rank RUN_DIR FREE_BYTES GPUS`, a task of srun's.

It looks at its node (the first rank of each), at its device, and meets the others. torch, whose import takes longest,
is only imported once the node has been looked at; the ranks of the training find it in the page cache.
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from launch.cluster.container import LOCAL_FOLDER
from launch.cluster.freeze import FOLDERS, ROOT, tree_hash
from launch.cluster.local_folder import problem_of_local_folder
from launch.cluster.preflight import RankReport, further, preflight_folder
from launch.cluster.rank import NODE_NAME, rank_environment
from pretrain.collective_timeout import COLLECTIVE_TIMEOUT
from pretrain.run_dir import RunDir

PACKAGES = ("torch", "deepspeed", "numpy", "safetensors")
# A rank that has found something leaves the others so long to say theirs: its end is the end of all.
LINGER_SECONDS = 5.0
NVIDIA_SMI_SECONDS = 30.0
MATRIX = 1024
ALL_REDUCE_FLOATS = 1 << 20
# What means a GPU that is to be replaced or reset, by the names of nvidia-smi.
GPU_ERRORS = ("ecc.errors.uncorrected.volatile.total", "retired_pages.pending")
GPU_ROWS = ("remapped_rows.pending", "remapped_rows.failure")


def main() -> None:
    """Leaves a report; exits 1 if this rank found something, or could not meet the others."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("free_bytes", type=float)
    parser.add_argument("gpus", type=int, help="of this node")
    args = parser.parse_args()
    os.environ |= rank_environment(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = preflight_folder(RunDir(args.run_dir))
    first_of_node = os.environ["LOCAL_RANK"] == "0"
    report = RankReport(int(os.environ["RANK"]), os.environ[NODE_NAME], "came")
    report.write(folder)
    problem = problem_of_node(args.run_dir, args.free_bytes, args.gpus) if first_of_node else ""
    versions = versions_here() if first_of_node and not problem else {}
    problem = problem or problem_of_device(args.gpus)
    if problem:
        further(report, "came", folder, problem=problem, versions=versions)
        time.sleep(LINGER_SECONDS)
        sys.exit(1)
    report = further(report, "sound", folder, versions=versions)
    try:
        meet(report, folder)
    except (RuntimeError, OSError) as error:  # torch's are RuntimeErrors
        further(report, report.stage, folder, complaint=" ".join(str(error).split())[:300])
        sys.exit(1)


def problem_of_node(run: Path, free_bytes: float, gpus: int) -> str:
    """What is wrong with the disks of this node, or what its GPUs say of themselves; "" for nothing."""
    if problem := problem_of_local_folder():
        return problem
    for path in (run, Path(os.environ.get(LOCAL_FOLDER, "/tmp"))):
        free = shutil.disk_usage(path).free
        if free < free_bytes:
            return f"{path} has {free / 1e9:.1f} GB free, and {free_bytes / 1e9:g} GB are asked for"
    return gpu_errors() if gpus else ""


def versions_here() -> dict[str, str]:
    """What must be the same on all nodes: the interpreter, the packages that compute, and our code."""
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found | {"Steppe's code": " ".join(tree_hash(ROOT / name) for name in FOLDERS if name != "slurm")}


def gpu_errors() -> str:
    """What nvidia-smi holds against this node's GPUs, "" if nothing, or if there is no nvidia-smi."""
    for query, names in (("--query-gpu", GPU_ERRORS), ("--query-remapped-rows", GPU_ROWS)):
        words = ["nvidia-smi", f"{query}={','.join(('gpu_bus_id', *names))}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=False)
        except FileNotFoundError:
            return ""
        except subprocess.TimeoutExpired:
            return f"nvidia-smi gave no answer in {NVIDIA_SMI_SECONDS:g} s"
        if done.returncode == 0 and (said := counted_errors(done.stdout, names)):
            return said
    return ""


def counted_errors(table: str, names: tuple[str, ...]) -> str:
    """The first count in nvidia-smi's table that is not 0; what a GPU does not count is "[N/A]"."""
    for line in table.splitlines():
        gpu, *counts = (cell.strip() for cell in line.split(","))
        for name, count in zip(names, counts, strict=False):
            if count == "Yes" or (count.isdigit() and int(count)):
                return f"GPU {gpu}: {name} is {count}"
    return ""


def problem_of_device(gpus: int) -> str:
    """What is wrong with this rank's device, "" for nothing: it allocates, and multiplies two matrices of small whole
    numbers, whose product is exact in fp32 in any order."""
    try:
        import torch

        from pretrain.device import detect

        device = detect()
        if gpus and device.type == "cpu":
            return f"torch finds none of its {gpus} GPUs"
        generator = torch.Generator().manual_seed(0)
        a, b = torch.randint(-8, 9, (2, MATRIX, MATRIX), generator=generator, dtype=torch.float32)
        product = (a.to(device) @ b.to(device)).cpu()
        rows = slice(0, MATRIX, MATRIX // 16)
        if not torch.equal(product[rows].double(), a[rows].double() @ b.double()):
            return f"a product of matrices is wrong on {device}"
    except Exception as error:  # whatever it is, it would meet the training too
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return ""


def meet(report: RankReport, folder: Path) -> None:
    """Reach the first node, and sum over all ranks. Raises RuntimeError or OSError if that fails or is wrong."""
    import torch
    import torch.distributed as dist

    from pretrain.device import detect, init_process_group

    device = detect()
    if report.rank:  # the first one is about to listen
        reach(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), float(os.environ[COLLECTIVE_TIMEOUT]))
    report = further(report, "reached", folder)
    init_process_group(device)
    world = dist.get_world_size()
    for _ in range(2):  # the first one makes the connections
        own = torch.full((ALL_REDUCE_FLOATS,), float(report.rank + 1), device=device)
        started = time.perf_counter()
        dist.all_reduce(own)
        low, high = float(own.min()), float(own.max())
        seconds = time.perf_counter() - started
    clock = time.time()
    if not low == high == world * (world + 1) // 2:
        raise RuntimeError(f"the all-reduce gave {low} to {high}, not {world * (world + 1) // 2}")
    further(report, "summed", folder, clock=clock, all_reduce_seconds=seconds)
    dist.barrier()  # nobody leaves before all have their sum
    dist.destroy_process_group()


def reach(address: str, port: int, seconds: float) -> None:
    """Wait until something listens there. Raises OSError if nothing does in time."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, end - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise OSError(f"{address}:{port} cannot be reached: {error}") from None
            time.sleep(0.5)


if __name__ == "__main__":
    main()
