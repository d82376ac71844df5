"""Documents out of token shards: a data folder, here or elsewhere, whose blocks are verified as they are read."""

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_pipeline.config import MIB, CacheConfig
from data_pipeline.corpus.formats import looks_like_file
from data_pipeline.corpus.input_config import InputConfig
from data_pipeline.documents import Documents
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.remote import identity, is_local, open_path, shown
from data_pipeline.token_source import TokenSource
from data_pipeline.tokenizer import Tokenizer

CACHE_BYTES = 512 * MIB
"""Of a folder that lies elsewhere, kept among the temporary files of this machine while it is read."""


def manifest_of(input_: InputConfig) -> Manifest | None:
    """The manifest of an input that is a data folder, None for any other.

    Raises:
        ValueError: it is damaged.
        OSError: a store did not answer in spite of retries.
    """
    path = input_.path.rstrip("/")
    return Manifest.load(path) if input_.format == "auto" and _has_manifest(path) else None


def _has_manifest(path: str) -> bool:
    if not is_local(path) and (looks_like_file(path) or set(path) & set("*?[")):
        return False  # a file, a signed URL or a pattern: not even asked
    file_system, root = open_path(path)
    manifest = f"{root}/{MANIFEST_NAME}"
    if is_local(path):
        return Path(manifest).is_file()
    try:
        identity(file_system, manifest)
    except ValueError:  # some stores refuse access to what is not there
        return False
    return True


def check_tokenizer(path: str, manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless the tokens of a data folder are those of a model's tokenizer."""
    if manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"the tokens of {shown(path)} are of another tokenizer (fingerprint {manifest.tokenizer_fingerprint}) than "
            f"the model's, {tokenizer.path} ({tokenizer.fingerprint}): name the text that it was made from"
        )


def read_token_texts(path: str, manifest: Manifest, tokenizer: Tokenizer | None) -> Iterator[tuple[str, np.ndarray]]:
    """Each document of a data folder in turn: its text, and its tokens without BOS and EOS, int32 `(n,)`.

    tokenizer: the one that was checked, if it is loaded already.

    Raises:
        ValueError: what is read of the folder is damaged.
        OSError: it cannot be had now.
    """
    path = path.rstrip("/")  # a server takes a second slash for a name
    decoder = tokenizer or Tokenizer(f"{path}/{manifest.tokenizer_file}")
    check_tokenizer(path, manifest, decoder)
    with ExitStack() as stack:
        cache = CacheConfig()
        if not is_local(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="steppe-eval-"))
            cache = CacheConfig(folder=folder, max_bytes=CACHE_BYTES)
        source = TokenSource(path, manifest, cache)
        stack.callback(source.close)
        for tokens in Documents(source).in_order():
            ids = _without_ends(tokens, manifest).astype(np.int32)  # a copy, which does not hold the run it was read in
            yield decoder.decode(ids), ids


def _without_ends(tokens: np.ndarray, manifest: Manifest) -> np.ndarray:
    begin = int(len(tokens) > 0 and manifest.bos_id is not None and tokens[0] == manifest.bos_id)
    end = len(tokens) - int(len(tokens) > begin and tokens[-1] == manifest.eos_id)
    return tokens[begin:end]
