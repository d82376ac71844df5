"""torch.compile of a decoder, block by block: those of a kind are one piece of code, compiled once for all layers.

What is compiled is a block's forward, with whatever has been put inside it before: the communication of tensor,
sequence and expert parallelism, and activation checkpointing, which tells the compiler what to compute again. What
surrounds a block, such as ZeRO 3's gathering of its parameters, stays outside; the engine lets that happen a block at a
time. Every shape is compiled for itself, so a process compiles each kind of block once for training, once for
validation, and once more for each sequence length that it meets; never for another step, micro-batch or layer.

Collectives, and experts' products in other precisions than bf16, are not compiled: around them a block's graph breaks.

Compiled code is kept in the user's cache folder, and found there by the next process. On GPUs none of this was timed.
"""

import os
from pathlib import Path

import torch

from model.decoder import Decoder
from model.experts import Experts, combined

CACHE_FOLDER = "TORCHINDUCTOR_CACHE_DIR"
# Versions of one piece of code, above which torch would go on uncompiled with no more than a line in the log: kinds of
# blocks, training and validation, and the lengths of the stages that a run goes back over.
MOST_VERSIONS = 64


def compile_blocks(decoder: Decoder) -> None:
    """Compile each block's forward when it is first called.

    The forward is replaced rather than the block: a wrapping module would rename its parameters, and hooks on the block
    would be compiled too.

    Raises ValueError where there is no C++ compiler.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    check_compiler()
    # Parts of torch put their own choice into the environment as soon as they are imported.
    if os.environ.get(CACHE_FOLDER, default_cache_dir()) == default_cache_dir():
        os.environ[CACHE_FOLDER] = str(cache_folder())
    # torch.compile knows what shape a grouped product has in bf16 only: in other dtypes the graph breaks there.
    uncompiled = torch.compiler.disable(combined)
    for module in decoder.modules():
        if isinstance(module, Experts) and module.gate_proj.dtype != torch.bfloat16:
            module.function = uncompiled
    for block in decoder.layers:
        block.forward = torch.compile(block.forward, dynamic=False, recompile_limit=MOST_VERSIONS)  # type: ignore[call-overload]


def cache_folder() -> Path:
    """Where compiled code is kept, unless the environment says otherwise: in the user's cache folder, by torch's
    version. torch's own choice lies in /tmp, which a new node or container does not have, and counts as unset."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "steppe" / f"compiled-torch-{torch.__version__}"


def check_compiler() -> None:
    """Raise ValueError if torch.compile finds no C++ compiler: on GPUs, too, it needs one."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise ValueError(
            "parallel.compile=true needs a C++ compiler, and this machine has none: install g++ or name one in CXX, or "
            "set parallel.compile=false"
        ) from None
