"""What a rank's first step does not load: each costs seconds before it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from torch.distributed import destroy_process_group
from pretrain.device import detect, init_process_group
from pretrain.engine import agree, build_engine
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch
from tests.small_run import small_config

config = small_config("batch={global_batch_size: 2, micro_batch_size: 2}", "parallel.zero_stage=%s", "precision=bf16")
device = detect()
init_process_group(device)
engine = build_engine(config, device, ParallelDims.of_this_rank(config))
agree(engine.train_step([random_batch(config, 0)], 1e-3))
compiler = {"torch._inductor.compile_fx", "setuptools"} & sys.modules.keys()
assert not compiler, compiler
# Else gloo's thread may want Python's lock, to free the last sum, while the interpreter ends: it would abort
# (pytorch issue 190489).
destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_first_step_loads_no_compiler(stage: int) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM % stage],
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
