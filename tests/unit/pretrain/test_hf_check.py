"""What the comparison with transformers sees, what it allows, and how much memory it and the writing take."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.decoder import Decoder
from pretrain.hf import config_to_hf
from pretrain.hf_check import available_memory_bytes, compare_logits
from pretrain.hf_weights import weights_to_hf
from tests.conftest import environment
from tests.hf_parity import MIXTRAL, build, config

ROOT = Path(__file__).parents[3]


def write_folder(folder: Path, decoder: Decoder, **other: Any) -> Path:
    """As a published model, with `other` keys in its config."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**config_to_hf(decoder.config), **other}))
    save_file(weights_to_hf(decoder.state_dict(), decoder.config), folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("other", "where"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0}}, "layer 0"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 1.01}}, "layer 0"),
        ({"rms_norm_eps": 1e-2}, "layer 0"),
        ({"num_hidden_layers": 2}, "transformers cannot load the exported model"),
        ({"num_hidden_layers": 4}, "transformers cannot load the exported model"),
    ],
)
@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_another_config_is_another_function(
    other: dict[str, Any], where: str, memory_bytes: int | None, tmp_path: Path
) -> None:
    decoder = build(config())
    folder = write_folder(tmp_path / "model", decoder, **other)
    with pytest.raises(RuntimeError, match=where):
        compare_logits(folder, decoder.config, decoder.state_dict().__getitem__, {1, 2}, memory_bytes)


def test_what_only_rounding_decides_is_left_out(tmp_path: Path) -> None:
    """Two experts with one router row, the other way round in the folder: where a token takes just one of them, which
    one is nobody's fault; with a router that tells them apart it is."""
    decoder = build(config(**MIXTRAL))
    with torch.no_grad():
        for block in decoder.layers:
            block.mlp.router.weight[1] = block.mlp.router.weight[0]
    weights = dict(decoder.state_dict())
    swapped = [1, 0, 2, 3]
    for name in weights:
        if ".mlp.experts." in name:
            weights[name] = weights[name][swapped]
    folder = write_folder(tmp_path / "model", decoder)
    compare_logits(folder, decoder.config, weights.__getitem__, {1, 2})
    for name in weights:
        if name.endswith(".mlp.router.weight"):
            weights[name] = weights[name] + torch.tensor([0.0, 0.05, 0, 0])[:, None]
    file = folder / "model.safetensors"
    theirs = load_file(file)
    for layer in range(decoder.config.num_layers):
        theirs[f"model.layers.{layer}.block_sparse_moe.gate.weight"] = weights[f"layers.{layer}.mlp.router.weight"]
    save_file(theirs, file, {"format": "pt"})
    with pytest.raises(RuntimeError, match="layer 0 differs"):
        compare_logits(folder, decoder.config, weights.__getitem__, {1, 2})


def test_nan_is_a_difference(tmp_path: Path) -> None:
    decoder = build(config())
    with torch.no_grad():
        decoder.norm.weight[0] = math.nan
    folder = write_folder(tmp_path / "model", decoder)
    with pytest.raises(RuntimeError, match="the final norm differs by nan"):
        compare_logits(folder, decoder.config, decoder.state_dict().__getitem__, {1, 2})


@pytest.mark.slow
def test_memory_of_an_export(tmp_path: Path) -> None:
    """Of a model of 160 MB in shards of 50 MB: writing holds one parameter, comparing a layer of each model, and
    neither of them a shard."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.export_memory", str(tmp_path)],
        cwd=ROOT,
        env={**environment(), "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(done.stdout.splitlines()[-1])
    assert len(report["shards"]) == 4
    assert report["mode"] == "layer by layer"
    assert report["writing"] < report["largest_parameter"] + 4e6, report
    assert report["comparing"] < 2 * report["layer"] + report["largest_parameter"] + 20e6 < max(report["shards"]), (
        report
    )


def test_free_memory_is_the_machines_or_the_jobs(tmp_path: Path) -> None:
    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    write("proc/meminfo", "MemTotal:       1000 kB\nMemFree:         300 kB\nMemAvailable:    500 kB\n")
    write("proc/self/cgroup", "4:memory:/old\n0::/system.slice/job_7\n")
    assert available_memory_bytes(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/system.slice/job_7/memory.max", "max\n")
    assert available_memory_bytes(tmp_path) == 500 * 1024
    write("sys/fs/cgroup/system.slice/job_7/memory.max", "300000\n")
    write("sys/fs/cgroup/system.slice/job_7/memory.stat", "anon 100000\nfile 190000\n")
    assert available_memory_bytes(tmp_path) == 200_000
    write("sys/fs/cgroup/system.slice/memory.max", "250000\n")  # as Slurm limits a job and not its steps
    write("sys/fs/cgroup/system.slice/memory.stat", "anon 150000\n")
    assert available_memory_bytes(tmp_path) == 100_000
    assert available_memory_bytes() > 0
