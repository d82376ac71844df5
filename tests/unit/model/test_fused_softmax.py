"""The head's Triton kernels, where Triton is installed: its wheels interpret and compile without a GPU, too."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")]


def test_in_tritons_interpreter() -> None:
    """In a process of their own: whether Triton interprets is decided as it is imported."""
    cases = Path(__file__).with_name("interpreted_softmax.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu(dtype: str) -> None:
    """To machine code of Hopper's, which takes no GPU: what the interpreter would let pass, the compiler does not."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from model import fused_softmax

    for kernel in (fused_softmax._row_sums, fused_softmax._gradient):
        pointers = dict.fromkeys(("maxima", "sums", "target_logits", "scales"), "*fp32")
        types = {"logits": f"*{dtype}", "targets": "*i64", "BLOCK": "constexpr"} | pointers
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        source = ASTSource(kernel, signature, constexprs={"BLOCK": fused_softmax.BLOCK_COLUMNS})
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused_softmax.WARPS})
        assert built.asm["cubin"]
        assert " atom" not in built.asm["ptx"], "an atomic sum has no fixed order"
