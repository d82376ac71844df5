"""Hugging Face folders of any other architecture, for transformers to compute: GPT-2, NeoX, OPT, Phi, Gemma and more.

Only what lies in the folder is used, and only safetensors: nothing is fetched, unpickled or run.
"""

import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pretrain.hf_folder import FolderTensors
from pretrain.hf_quiet import quiet_transformers
from pretrain.offload import Offload
from pretrain.run_dir import read_json
from pretrain.stored_weights import checked_weights
from pretrain.transformers_model import TransformersModel

ADAPTER_NAME = "adapter_config.json"
"""Beside which transformers, where peft is installed, looks for further weights, pickled ones among them."""


class TransformersFolder:
    """A Hugging Face folder of any architecture that transformers computes.

    claimed_context: its max_position_embeddings, None if it states none. architecture: transformers' class.
    """

    def __init__(self, path: Path) -> None:
        """Raises ValueError if it is no causal language model, needs code of its own, has quantized weights or an
        adapter, or if its weights are not whole in safetensors; FileNotFoundError if they are missing."""
        self.path = path
        stated = read_json(path / "config.json")
        kind = stated.get("model_type") if isinstance(stated, dict) else None
        if kind not in transformers.CONFIG_MAPPING:
            own_code = isinstance(stated, dict) and "auto_map" in stated
            remedy = "code that comes with a model is never run" if own_code else "check config.json"
            raise ValueError(
                f"{path}: model_type {kind!r} is not supported, neither by our decoder nor by transformers "
                f"{transformers.__version__}: {remedy}"
            )
        if stated.get("quantization_config"):
            raise ValueError(f"{path} has quantized weights (quantization_config): turn them back first")
        if (path / ADAPTER_NAME).is_file():
            raise ValueError(f"{path} has an adapter beside its weights ({ADAPTER_NAME}): merge the two, or remove it")
        self.tensors = FolderTensors(path)
        named = stated.get("transformers_weights")
        if named not in (None, self.tensors.entry):
            raise ValueError(
                f"{path}: its config names {named!r} as its weights (transformers_weights), and only "
                f"{self.tensors.entry} is read: take that out, or make a folder of those weights"
            )
        try:
            self.config: PreTrainedConfig = AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # a config may be wrong in as many ways as there are architectures
            raise ValueError(f"{path / 'config.json'}: transformers refuses it: {_first_line(error)}") from error
        if type(self.config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
            raise ValueError(f"{path}: {kind} is no type of causal language model, and others have no perplexity")
        self.architecture: str = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)].__name__
        text = self.config.get_text_config()
        for config in (self.config, text):  # a folder may hold other weights beside these, which it would prefer
            config.transformers_weights = self.tensors.entry
        self.vocab_size: int = text.vocab_size
        claimed = getattr(text, "max_position_embeddings", None)
        self.claimed_context: int | None = claimed if type(claimed) is int and claimed > 0 else None

    def load(
        self, dtype: torch.dtype, offload: Offload | None, device: torch.device
    ) -> tuple[TransformersModel, int | None, str]:
        """The model; the tokens that it can see at once, None if nothing limits them; the fingerprint.

        With `offload`, blocks are where it says; on `disk`, they are read from the folder's own files, and from a
        scratch folder where transformers stores tensors in another way than the files do.
        Raises ValueError for weights that are not finite, are missing or do not fit, or a model that is not causal.
        """
        fingerprint = self._checked_fingerprint()
        scratch = tempfile.TemporaryDirectory(prefix="steppe-offload-") if offload == "disk" else None
        placed: dict[str, Any] = {"device_map": {"": str(device)}}
        if offload is not None:
            placed = {"device_map": self._device_map(offload, str(device))}
        if scratch is not None:
            placed["offload_folder"] = scratch.name
        try:
            with quiet_transformers():
                model, report = AutoModelForCausalLM.from_pretrained(
                    self.path,
                    config=self.config,
                    dtype=dtype,
                    local_files_only=True,
                    trust_remote_code=False,
                    use_safetensors=True,
                    output_loading_info=True,
                    **placed,
                )
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
            raise ValueError(f"{self.path}: transformers cannot load it: {_first_line(error)}") from error
        for wrong in ("missing_keys", "mismatched_keys", "error_msgs"):
            if report.get(wrong):
                first = min(map(str, report[wrong]))
                raise ValueError(f"{self.path}: its config and its tensors do not belong together: {wrong} {first}")
        model.requires_grad_(False).eval()
        if scratch is not None:
            weakref.finalize(model, scratch.cleanup)
        loaded = TransformersModel(model, device)
        _check_causal(self.path, loaded)
        return loaded, _longest_context(model, self.claimed_context), fingerprint

    def _checked_fingerprint(self) -> str:
        digest = xxhash.xxh3_64((self.path / "config.json").read_bytes())
        for _ in checked_weights(str(self.path), sorted(self.tensors), self.tensors.__getitem__, digest):
            pass
        return digest.hexdigest()

    def _device_map(self, offload: Offload, device: str) -> dict[str, str]:
        """Blocks as `offload` says, everything around them on the device."""
        with torch.device("meta"), quiet_transformers():
            model = AutoModelForCausalLM.from_config(self.config, trust_remote_code=False)
        kinds = set(model._no_split_modules or ())
        placed: dict[str, str] = {}

        def place(name: str, module: nn.Module) -> None:
            if type(module).__name__ in kinds:
                placed[name] = offload
            elif any(type(inner).__name__ in kinds for inner in module.modules()):
                prefix = f"{name}." if name else ""
                placed.update({prefix + own: device for own, _ in module.named_parameters(recurse=False)})
                placed.update({prefix + own: device for own, _ in module.named_buffers(recurse=False)})
                for child, inner in module.named_children():
                    place(prefix + child, inner)
            else:
                placed[name] = device

        place("", model)
        if offload not in placed.values():
            raise ValueError(f"{self.path}: {self.architecture} does not say which of its modules may be offloaded")
        return placed


def _check_causal(path: Path, model: TransformersModel) -> None:
    """Raise ValueError unless logits do not depend on later tokens: the whole of a perplexity's meaning."""
    tokens = torch.arange(8, device=model.device).remainder(model.vocab_size).expand(2, -1).clone()
    tokens[1, -1] = 0
    before = torch.ones_like(tokens, dtype=torch.bool)
    before[:, -1] = False
    try:
        first, second = model.logits_at(tokens, before).chunk(2)
    except (RuntimeError, ValueError) as error:  # only now are weights that stay on the disk looked at
        raise ValueError(f"{path}: transformers cannot compute it: {_first_line(error)}") from error
    # In bf16 a batch that is shared out among experts otherwise may be rounded otherwise, too.
    tolerance = 1e-3 if model.model.dtype == torch.float32 else 3e-2
    if not torch.allclose(first, second, rtol=tolerance, atol=tolerance * first.abs().max().item()):
        raise ValueError(
            f"{path}: its logits are not finite, or depend on later tokens: it is no causal language model"
        )


def _longest_context(model: PreTrainedModel, claimed: int | None) -> int | None:
    """How many tokens a model has positions for, if it keeps a table of them: GPT-2's and OPT's learned ones (OPT's is
    two rows longer than it says), GPT-J's computed ones. None for those that turn or bias by any distance."""
    if claimed is None:
        return None
    words = model.get_input_embeddings()
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding) and module is not words]
    rows = [len(table) for table in [*tables, *model.buffers()] if table.dim() == 2]
    return claimed if any(claimed <= count <= claimed + 8 for count in rows) else None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
