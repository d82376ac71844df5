"""Reading a Hugging Face folder: config.json and safetensors. What its files claim is checked before it is used, and
nothing in it is unpickled or run."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from model.config import ModelConfig
from model.parameters import parameter_shapes
from pretrain.checkpoint.index import INDEX_NAME as CHECKPOINT_INDEX_NAME
from pretrain.hf import config_from_hf
from pretrain.hf_unsupported import UnsupportedError
from pretrain.hf_weights import known_names, parameter_from_hf, stored_shapes
from pretrain.run_dir import RunDir, read_json
from pretrain.safetensors_file import SafetensorsFile

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_DTYPES = ("F32", "BF16", "F16")  # those whose every value fp32 holds


class HuggingFaceFolder:
    """A model of ours in transformers' files, a parameter at a time.

    config: the ModelConfig. claimed_context: its max_position_embeddings, None if it states none.
    """

    def __init__(self, path: Path) -> None:
        """Check everything but the values: that the tensors are there, of known dtypes and of the config's shapes.

        Raises FileNotFoundError if a file is missing, ValueError if one does not fit.
        """
        self.path = path
        if not (path / "config.json").is_file():
            ours = " (a checkpoint or run of Steppe's own needs no import)" if is_ours(path) else ""
            raise FileNotFoundError(f"{path} is not a Hugging Face model folder: it has no config.json{ours}")
        stated = read_json(path / "config.json")
        if not isinstance(stated, dict):
            raise ValueError(f"{path / 'config.json'} is not the config of a model: it holds no JSON object")
        try:
            self.config: ModelConfig = config_from_hf(stated)
        except ValueError as error:
            kind = UnsupportedError if isinstance(error, UnsupportedError) else ValueError
            raise kind(f"{path / 'config.json'}: {error}") from None
        self.claimed_context: int | None = stated.get("max_position_embeddings")
        if self.claimed_context is not None and not (type(self.claimed_context) is int and self.claimed_context > 0):
            raise ValueError(f"{path}: max_position_embeddings {self.claimed_context!r} is no number of tokens")
        self.tensors = FolderTensors(path)
        counts = (self.config.num_layers, self.config.moe.experts if self.config.moe is not None else 1)
        if max(counts) > len(self.tensors):
            raise ValueError(f"{path} has {len(self.tensors)} tensors, too few for the layers or experts of its config")
        self._given = known_names(self.tensors, self.config)
        for name, shape in parameter_shapes(self.config).items():
            dtypes = {self._check(stored, of_one) for stored, of_one in stored_shapes(name, shape, self.config).items()}
            if len(dtypes) > 1:
                raise ValueError(f"{path}: the experts of {name} are stored in different dtypes, {', '.join(dtypes)}")

    def parameter(self, name: str) -> Tensor:
        """Our parameter, in the stored dtype."""
        return parameter_from_hf(name, lambda stored: self.tensors[self._given[stored]], self.config)

    def weights(self) -> dict[str, Tensor]:
        """All of them, by our names."""
        return {name: self.parameter(name) for name in parameter_shapes(self.config)}

    def _check(self, stored: str, expected: tuple[int, ...]) -> str:
        shape, dtype = self.tensors.shape_and_dtype(self._given[stored])
        if shape != expected:
            raise ValueError(f"{self.path}: {stored} has shape {shape}, but its config says {expected}")
        if dtype not in _DTYPES:
            raise ValueError(
                f"{self.path}: {stored} is stored as {dtype}, and only {', '.join(_DTYPES)} are read: "
                "turn quantized weights back first"
            )
        return dtype


class FolderTensors(Mapping[str, Tensor]):
    """The tensors of a folder by name, each read when it is asked for: memory need not hold a layer's experts stacked
    and by themselves for all layers at once.

    entry: the file that says where they are, of the two that a folder may have.
    """

    def __init__(self, folder: Path) -> None:
        self.entry = INDEX_NAME if (folder / INDEX_NAME).is_file() else SINGLE_NAME
        self._files: dict[str, SafetensorsFile] = {}
        for file, names in _weight_files(folder).items():
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, though the folder's index names it; download it again")
            stored = SafetensorsFile(file)
            absent = sorted(set(names or ()) - stored.tensors.keys())
            if absent:
                raise ValueError(f"{file} lacks {absent[0]}, which the folder's index says it holds")
            self._files.update(dict.fromkeys(names or stored.tensors, stored))

    def shape_and_dtype(self, name: str) -> tuple[tuple[int, ...], str]:
        """As the file's header says, without reading the values."""
        stored = self._files[name].tensors[name]
        return stored.shape, stored.dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def is_ours(path: Path) -> bool:
    """Whether a folder is a run or a checkpoint."""
    return (path / CHECKPOINT_INDEX_NAME).is_file() or RunDir(path).config_path.is_file()


def _weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """{file: names of the tensors to take from it}, None for all.

    Raises ValueError for a file name that leads out of the folder, or is not of safetensors.
    """
    index = folder / INDEX_NAME
    if not index.is_file():
        if (folder / SINGLE_NAME).is_file():
            return {folder / SINGLE_NAME: None}
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise ValueError(
                f"{folder} has its weights in pickle files only, which can run any code when they are loaded: "
                "convert them to safetensors first"
            )
        raise FileNotFoundError(f"{folder} has neither {SINGLE_NAME} nor {INDEX_NAME}")
    stated = read_json(index)
    weight_map = stated.get("weight_map") if isinstance(stated, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} is no index of weights: it has no weight_map")
    files: dict[Path, list[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or any(separator in file for separator in "/\\\0") or file.startswith("."):
            raise ValueError(f"{index}: the weight_map has {name} in {file!r}, which is no file name of its folder")
        if not file.endswith(".safetensors"):
            raise ValueError(f"{index}: the weight_map has {name} in {file!r}, which is no safetensors file")
        names = files.setdefault(folder / file, [])
        assert names is not None
        names.append(name)
    return files
