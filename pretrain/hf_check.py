"""The proof that an exported model is the same function: transformers' model, loaded from the folder as anyone would,
beside our decoder with the weights of the checkpoint.

While theirs computes the logits of a few sequences, each of its modules in turn (embedding, layers, norm, head) is
followed by ours, given the same input. If all of them agree, so do the logits, but for what rounding makes of them.
Ours so never holds more than one layer; theirs is whole in memory where it fits, and else on disk, each module read
when it is its turn. And where rounding tips a choice of experts, that token alone differs, not all later ones.
"""

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.func import functional_call

from model.config import ModelConfig, has_experts
from model.decoder import Decoder
from model.parameters import parameter_shapes
from model.router import Routing
from pretrain.hf_quiet import quiet_transformers

SEQUENCES, SEQUENCE_LENGTH = 2, 128
TOLERANCE = 1e-4
"""Of the largest value that a module adds. Two orders of fp32 sums differ by about sqrt(n) 6e-8 of it, 1e-5 for sums of
n = 30,000 terms, and a layer chains a few; another function, or a wrong weight, differs by much more."""
ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Of the residual stream, to which a layer adds: its largest values can be a thousand times what is added."""

_LOADED_BYTES = 5  # a parameter of theirs in fp32, with room for what loading it takes


@dataclass(frozen=True)
class Comparison:
    """What was compared. difference: the largest of any module, relative to the largest value that it adds."""

    mode: Literal["whole", "layer by layer"]
    tokens: int
    difference: float


def compare_logits(
    folder: Path,
    config: ModelConfig,
    read: Callable[[str], Tensor],
    special_ids: Iterable[int],
    memory_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare transformers' model of `folder` with our decoder, in fp32 on the host.

    read: our parameter, by its name, as the folder is to have it. special_ids: tokens that must be among those seen.
    memory_bytes: what may be used; by default what the machine has free. progress: bytes of our weights done, and of
    how many.
    Raises RuntimeError if they differ, or if transformers finds tensors missing or left over.
    """
    memory_bytes = available_memory_bytes() if memory_bytes is None else memory_bytes
    whole = _whole_bytes(config) <= memory_bytes
    tokens_BT = _tokens(config.vocab_size, special_ids)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.offload-", dir=folder.parent) as offload:
        theirs = _load(folder, None if whole else Path(offload))
        follower = _Follower(theirs, config, read, progress)
        with torch.no_grad():
            theirs(tokens_BT, use_cache=False)
    assert follower.compared == config.num_layers + 3, "some of their modules were not called"
    return Comparison("whole" if whole else "layer by layer", tokens_BT.numel(), follower.difference)


class _Follower:
    """Hooks on their modules: whatever one has computed, ours computes from the same input, and both are compared."""

    def __init__(
        self, theirs: Any, config: ModelConfig, read: Callable[[str], Tensor], progress: Callable[[int, int], None]
    ) -> None:
        with init_empty_weights():
            self.decoder = Decoder(config)
        self.config, self.read, self.progress = config, read, progress
        self.shapes = parameter_shapes(config)
        self.cos, self.sin = self.decoder.rotary(torch.arange(SEQUENCE_LENGTH))
        head_bytes = 4 * math.prod(self.shapes["embed_tokens.weight"]) if config.tie_embeddings else 0
        self.total_bytes = 4 * sum(map(math.prod, self.shapes.values())) + head_bytes
        self.difference = 0.0
        self.compared = self.done_bytes = 0
        self._follow(theirs.model.embed_tokens, "the embedding", lambda tokens: self._call("embed_tokens", tokens))
        for index, layer in enumerate(theirs.model.layers):
            self._follow_layer(layer, index)
        self._follow(theirs.model.norm, "the final norm", lambda hidden: self._call("norm", hidden))
        self._follow(theirs.lm_head, "the logits", self._logits)

    def _call(self, name: str, *inputs: Tensor) -> Any:
        """Our module, with weights that are gone afterwards."""
        prefix = f"{name}."
        weights = {key.removeprefix(prefix): self._read(key) for key in self.shapes if key.startswith(prefix)}
        return functional_call(self.decoder.get_submodule(name), weights, inputs)

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        owner = "embed_tokens" if self.config.tie_embeddings else "lm_head"
        return self.decoder.lm_head.logits(hidden_BTD, self._read(f"{owner}.weight"))

    def _read(self, name: str) -> Tensor:
        weight = self.read(name)
        self.done_bytes += weight.nbytes
        self.progress(self.done_bytes, self.total_bytes)
        return weight

    def _follow(self, module: nn.Module, what: str, compute: Callable[[Tensor], Tensor]) -> None:
        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._compare(what, compute(inputs[0]), output)

        module.register_forward_hook(after)

    def _follow_layer(self, module: nn.Module, index: int) -> None:
        routings: list[Routing] = []
        if has_experts(self.config, index):
            router = self.decoder.get_submodule(f"layers.{index}.mlp.router")
            router.register_forward_hook(lambda _, inputs, routing: routings.append(routing))

        def after(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            ours, _ = self._call(f"layers.{index}", inputs[0], self.cos, self.sin)
            undecided = _undecided(routings.pop(), self.config) if routings else None
            self._compare(f"layer {index}", ours, output, before=inputs[0], undecided=undecided)

        module.register_forward_hook(after)

    def _compare(
        self, what: str, ours: Tensor, theirs: Tensor, before: Tensor | None = None, undecided: Tensor | None = None
    ) -> None:
        """Raises RuntimeError if the difference is more than rounding explains. undecided: tokens to leave out."""
        added = (theirs if before is None else theirs - before).abs().max()
        allowed = TOLERANCE * added + ROUNDING * theirs.abs().max()
        difference = (ours - theirs).abs().amax(dim=-1)
        if undecided is not None:
            difference = difference.masked_fill(undecided, 0.0)
        if not difference.max() <= allowed:  # which NaN is not, either
            raise RuntimeError(
                f"the exported model computes something else: {what} differs by {difference.max():.3g} from ours, "
                f"where rounding explains {allowed:.3g}"
            )
        self.difference = max(self.difference, (difference.max() / added).item())
        self.compared += 1


def _undecided(routing: Routing, config: ModelConfig) -> Tensor:
    """(B, T) bool: tokens whose last chosen expert and the next one are as good as equal, so that rounding chooses."""
    assert config.moe is not None
    chosen, logits = config.moe.experts_per_token, routing.logits
    if chosen == config.moe.experts:
        return torch.zeros(logits.shape[:-1], dtype=torch.bool)
    best = logits.topk(chosen + 1, dim=-1).values
    return best[..., chosen - 1] - best[..., chosen] <= TOLERANCE * logits.abs().max()


def _tokens(vocab_size: int, special_ids: Iterable[int]) -> Tensor:
    """(B, T): random ones, the special ones first."""
    tokens = torch.randint(vocab_size, (SEQUENCES, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(0))
    special = torch.tensor(sorted(set(special_ids)), dtype=tokens.dtype)[: tokens.numel()]
    tokens.view(-1)[: len(special)] = special
    return tokens


def _load(folder: Path, offload: Path | None) -> Any:
    """Their model in fp32; with `offload` its parameters stay on disk, those that it stores otherwise there."""
    from transformers import AutoModelForCausalLM

    kept = {} if offload is None else {"device_map": {"": "disk"}, "offload_folder": offload}
    with quiet_transformers():
        theirs, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, local_files_only=True, use_safetensors=True, **kept
        )
    for kind, found in report.items():
        if found:
            raise RuntimeError(f"transformers cannot load the exported model: {kind} {sorted(map(str, found))[:3]}")
    return theirs.eval()


def _whole_bytes(config: ModelConfig) -> int:
    """What a comparison takes with all of theirs in memory: theirs, and the largest part of ours held at once."""
    parts: dict[str, int] = {}
    for name, shape in parameter_shapes(config).items():
        part = ".".join(name.split(".")[: 2 if name.startswith("layers.") else 1])
        parts[part] = parts.get(part, 0) + math.prod(shape)
    return _LOADED_BYTES * sum(parts.values()) + 4 * max(parts.values())


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What the machine has free, or less where a control group, or one around it, lets this job use only so much.

    `root` is for tests.
    """
    lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    own = (root / "proc/self/cgroup").read_text(encoding="utf-8").rpartition("0::/")[2].strip()
    top = root / "sys/fs/cgroup"
    group = top / own.lstrip("/")
    while group.is_relative_to(top):
        file = group / "memory.max"
        limit = file.read_text(encoding="ascii").strip() if file.is_file() else "max"
        if limit != "max":
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            free = min(free, int(limit) - int(stat["anon"]))
        group = group.parent
    return free
