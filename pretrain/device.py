"""The one file that names cuda, cpu, nccl and gloo: which device this rank has, and how fast its peak is."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from pretrain.collective_timeout import COLLECTIVE_TIMEOUT

# Dense peaks in FLOP/s by dtype, from the makers' data sheets (no sparsity), by what the device's name contains.
GPU_PEAKS: dict[str, dict[torch.dtype, float]] = {
    "H200": {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
    "H100 PCIe": {torch.bfloat16: 756e12, torch.float16: 756e12, torch.float32: 51e12},
    "H100": {torch.bfloat16: 989e12, torch.float16: 989e12, torch.float32: 67e12},
    "B200": {torch.bfloat16: 2250e12, torch.float16: 2250e12, torch.float32: 80e12},
    "A100": {torch.bfloat16: 312e12, torch.float16: 312e12, torch.float32: 19.5e12},
    "L40S": {torch.bfloat16: 362e12, torch.float16: 362e12, torch.float32: 91.6e12},
}

# What `make_deterministic` sets, and the other values that serve as well. NCCL: an algorithm and a protocol, rather
# than its choice by size and measured speed, or sums in the network's switches. Its trees know all-reduce alone, and
# told to take them it fails in every other collective.
DETERMINISTIC_SETTINGS: dict[str, tuple[str, ...]] = {
    "CUBLAS_WORKSPACE_CONFIG": (":4096:8", ":16:8"),
    "NCCL_ALGO": ("Ring",),
    "NCCL_PROTO": ("Simple", "LL", "LL128"),
}


def local_rank() -> int:
    """This process's index on its node, as the launcher says."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def detect() -> torch.device:
    """This rank's device; LOCAL_RANK picks the GPU before any other CUDA call does."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank())
    return torch.device("cuda", local_rank())


def is_processor(device: torch.device) -> bool:
    """Whether kernels for processors serve, not those for GPUs."""
    return device.type == "cpu"


def overlaps_communication(device: torch.device) -> bool:
    """Whether gradients can travel between ranks while the device computes: on a GPU, which has streams. gloo's threads
    would take the cores that a processor computes on."""
    return not is_processor(device)


def make_deterministic() -> None:
    """Let the same work on the same devices and layout give the same bits. To be called before the process group is
    made and before anything is computed on a GPU.

    torch chooses deterministic kernels (flash attention's backward and FlexAttention among them), inductor tunes
    nothing by time, cuBLAS gets a workspace of its own for each stream, and NCCL always sums in the order of one ring.
    On processors nothing changes, but that some sums are taken by one thread.

    Raises ValueError where the environment asks for the contrary.
    """
    for name, (default, *others) in DETERMINISTIC_SETTINGS.items():
        value = os.environ.setdefault(name, default)
        if value not in (default, *others):
            raise ValueError(
                f"deterministic=true does not go with {name}={value} in the environment: unset it, or make it "
                f"{' or '.join((default, *others))}"
            )
    torch.use_deterministic_algorithms(True)
    # Nothing here reads memory before it is written; to fill it first would cost a pass over each tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device_count() -> int:
    """How many ranks this node takes by default: one a GPU, one where there is none."""
    return torch.cuda.device_count() or 1


def gpu_addresses(ranks: int) -> list[str | None]:
    """PCI address of each local rank's GPU, such as "0000:3b:00.0"; None for a rank without one."""
    addresses: list[str | None] = []
    for index in range(ranks):
        if index < torch.cuda.device_count():
            gpu = torch.cuda.get_device_properties(index)
            addresses.append(f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0")  # type: ignore[attr-defined]
        else:
            addresses.append(None)
    return addresses


def check_device(ranks: int, precision: str) -> None:
    """Raise ValueError if this machine cannot hold so many ranks, or its device not compute in this precision."""
    gpus = torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise ValueError(f"--nproc {ranks}: this machine has {gpus} GPUs, and each rank needs one; use --nproc {gpus}")
    if not computes_in(precision):
        raise ValueError("precision=fp16: this machine's processor does not compute in fp16; use bf16 or fp32")


def computes_in(precision: str) -> bool:
    """Whether this machine's device computes in a precision."""
    return precision != "fp16" or torch.cuda.device_count() > 0 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def hide_gpus() -> None:
    """Let this process and those that it starts compute on the CPU. To be called before anything asks for a GPU."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def init_process_group(device: torch.device) -> None:
    """Join the ranks that the launcher started: NCCL between GPUs, gloo between CPUs.

    A rank waits for the others for as long as `collective_timeout` says.
    """
    timeout = collective_timeout()
    if device.type == "cuda":
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
    else:
        dist.init_process_group("gloo", timeout=timeout)


def collective_timeout() -> timedelta | None:
    """How long a rank waits for the others, in each group that is made: as the launcher says, or the rank itself; None:
    torch's ten minutes (gloo: thirty)."""
    seconds = os.environ.get(COLLECTIVE_TIMEOUT)
    return timedelta(seconds=float(seconds)) if seconds else None


def new_cpu_group(timeout: timedelta | None = None) -> dist.ProcessGroup:
    """A group of all ranks for objects on the host (checkpoint plans, verdicts), whatever the device.

    timeout: how long a rank waits for another, by default as in any group; after that the group is dead for good.
    """
    return dist.new_group(backend="gloo", timeout=timeout or collective_timeout())


class CopyStream:
    """Copies from a device to host memory, beside what the device computes."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._marked = torch.cuda.Event() if device.type == "cuda" else None

    def host_memory(self, numel: int) -> torch.Tensor:
        """fp32 memory on the host that copies reach at full speed. Pinned memory is lent in powers of two."""
        return torch.empty(numel, pin_memory=self._stream is not None)

    def mark(self) -> None:
        """Copies from now on find done what has been asked of the device until now."""
        if self._marked is not None:
            self._marked.record()

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Around copies, which are there afterwards."""
        if self._stream is None or self._marked is None:
            yield
            return
        self._stream.wait_event(self._marked)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


class Stopwatch:
    """Seconds that a device takes for what is asked of it between `start` and `stop`, without a wait of the host's."""

    def __init__(self, device: torch.device) -> None:
        of_gpu = device.type == "cuda"
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if of_gpu else None
        self._began = self._ended = 0.0

    def start(self) -> None:
        if self._events is None:
            self._began = time.perf_counter()
        else:
            self._events[0].record()

    def stop(self) -> None:
        if self._events is None:
            self._ended = time.perf_counter()
        else:
            self._events[1].record()

    @property
    def seconds(self) -> float:
        """Of the last start and stop. To be read after the host has waited for the device in any case."""
        if self._events is None:
            return self._ended - self._began
        return self._events[0].elapsed_time(self._events[1]) / 1e3


class DeviceClock:
    """Moments in what a device is asked for, marked without a wait of the host's. A processor has no clock of its own:
    what it is asked for is done when the call returns. Not tried on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._of_gpu = device.type == "cuda"

    def mark(self) -> torch.cuda.Event | None:
        """When the device has done what its current stream was asked for until now; None on a processor."""
        if not self._of_gpu:
            return None
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has passed every mark."""
        if self._of_gpu:
            torch.cuda.synchronize()

    @staticmethod
    def nanoseconds(begin: torch.cuda.Event, end: torch.cuda.Event) -> int:
        """From one mark to another, both passed."""
        return round(begin.elapsed_time(end) * 1e6)


def prepare_deepspeed() -> None:
    """Call before DeepSpeed's engine is built: leaves out what starts slowly and training does not need."""
    import deepspeed.ops
    from deepspeed.runtime import compiler

    # Else it asks a compiler which of its kernels could be built (0.2 s), and off a GPU builds one of shared memory
    # (30 to 98 s). We use none of them.
    deepspeed.ops.__compatible_ops__ = {}
    # Reducing gradients it looks at its own Muon, which decorates a function that we never call: torch's compiler would
    # be loaded for it, in the first step (2 s).
    compile_function, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon
    finally:
        compiler.compile = compile_function


def device_name(device: torch.device) -> str:
    """The name to record: the GPU's, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo", encoding="utf-8") as lines:
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "cpu")


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """The peak FLOP/s that MFU is measured against, and where the number comes from.

    A GPU's is its data sheet's. A CPU has no honest data sheet (clocks, cores lent by a scheduler): its peak is the
    best of several timed matrix products on the threads this rank has.
    """
    if device.type == "cuda":
        name = device_name(device)
        for key, peaks in GPU_PEAKS.items():
            if key in name and dtype in peaks:
                return peaks[dtype], f"{key} data sheet, dense {dtype}".replace("torch.", "")
    size = 4096 if device.type == "cuda" else 1024
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    best = float("inf")
    for _ in range(12):
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    source = f"measured: best of 12 products of two {size} x {size} {dtype} matrices, {torch.get_num_threads()} threads"
    return 2 * size**3 / best, source.replace("torch.", "")


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this rank has held: on its GPU, or in its address space."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()


def peak_resident_bytes() -> int:
    """The most of this process that has been in memory.

    Not getrusage's ru_maxrss, which in a new process begins with what the process that started it held.
    """
    with open("/proc/self/status", encoding="ascii") as lines:
        peak = next(line for line in lines if line.startswith("VmHWM:"))
    return int(peak.split()[1]) * 1024
