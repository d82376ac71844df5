"""torch.compile without ranks: where it keeps its code, what it needs, and what backward keeps of a compiled block.

What is learned and how often it compiles is in tests/dist/test_compile.py.
"""

import functools
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from model.init import initialise
from pretrain.compile import CACHE_FOLDER, cache_folder, check_compiler
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import parallelize
from tests.small_run import VOCABULARY, small_config

CPU = torch.device("cpu")


def test_compiled_code_is_kept_in_the_users_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "steppe" / f"compiled-torch-{torch.__version__}"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder().is_relative_to(tmp_path / ".cache")


def test_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = small_config("parallel.compile=true")
    kept = str(tmp_path / "steppe")
    for given, expected in (("/elsewhere", "/elsewhere"), (None, kept), (default_cache_dir(), kept)):
        with monkeypatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", str(tmp_path))
            patch.setenv(CACHE_FOLDER, given or "")
            if given is None:
                patch.delenv(CACHE_FOLDER)
            parallelize(config, CPU, torch.float32, ParallelDims.of_this_rank(config))
            assert os.environ[CACHE_FOLDER].startswith(expected)


def test_without_a_compiler_it_is_refused() -> None:
    check_compiler()
    refused = pytest.raises(ValueError, match=r"parallel.compile=true needs a C\+\+ compiler.*parallel.compile=false")
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}), refused:
        check_compiler()


def kept_bytes(recompute: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a forward pass keeps for backward, parameters left out."""
    # Up to what goes to C++, which would take seconds: by then it is settled what is kept.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition"))
    torch._dynamo.reset()
    config = small_config(
        "precision=fp32",
        f"parallel={{compile: true, activation_checkpointing: {recompute}}}",
        "model={num_layers: 4, hidden_size: 64, num_heads: 4, ffn_size: 128}",
    )
    decoder = parallelize(config, CPU, torch.float32, ParallelDims.of_this_rank(config))
    initialise(decoder, 0)
    tokens = torch.randint(0, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(0))
    sums = decoder(tokens, tokens)
    own = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        sums = decoder(tokens, tokens)
    sums.total.backward()
    return sum(kept.values())


def test_a_compiled_block_keeps_what_checkpointing_says(monkeypatch: pytest.MonkeyPatch) -> None:
    everything, selective, full = (kept_bytes(mode, monkeypatch) for mode in ("none", "selective", "full"))
    assert full < 0.5 * selective
    assert selective < everything
