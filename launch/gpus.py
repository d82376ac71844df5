"""GPUs by name, as `--gpu` takes them: how much memory each has, and how much of it a run can count on."""

from dataclasses import dataclass

# Besides what torch's allocator is asked for, a rank has a CUDA context with its kernels and libraries' workspaces
# (about 1 GB), and NCCL's buffers for a few communicators (about 1 GB).
CONTEXT_BYTES = 2_000_000_000
# Of the memory, for what the allocator cannot use: rounding, and gaps between blocks of unlike sizes.
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Gpu:
    """A GPU. `memory_bytes` is its data sheet's figure in units of 10^9, `source` says which."""

    name: str
    memory_bytes: int
    source: str

    @property
    def headroom_bytes(self) -> int:
        """What is left free for that which the accounting does not count."""
        return CONTEXT_BYTES + int(FRAGMENTATION * self.memory_bytes)

    @property
    def usable_bytes(self) -> int:
        """What the accounted memory of a rank may come to."""
        return self.memory_bytes - self.headroom_bytes


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40g", 40 * 10**9, "NVIDIA A100 data sheet: 40 GB HBM2"),
        Gpu("a100-80g", 80 * 10**9, "NVIDIA A100 data sheet: 80 GB HBM2e"),
        Gpu("h100-80g", 80 * 10**9, "NVIDIA H100 data sheet: 80 GB HBM3 (SXM) or HBM2e (PCIe)"),
        Gpu("h200-141g", 141 * 10**9, "NVIDIA H200 data sheet: 141 GB HBM3e"),
        Gpu("b200-180g", 180 * 10**9, "NVIDIA DGX B200 data sheet: 1,440 GB HBM3e over 8 GPUs"),
        Gpu("l40s-48g", 48 * 10**9, "NVIDIA L40S data sheet: 48 GB GDDR6"),
    )
}


def gpu_named(name: str) -> Gpu:
    """The GPU of that name. Raises ValueError listing those there are."""
    if name not in GPUS:
        raise ValueError(f"--gpu {name} is not known: choose from {', '.join(GPUS)}")
    return GPUS[name]
