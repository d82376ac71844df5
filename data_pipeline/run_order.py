"""The sample order of a run's own data folders, cut as its config says."""

from collections.abc import Mapping

from data_pipeline.config import DataConfig
from data_pipeline.order import SampleOrder, Stage
from data_pipeline.pack_files import PackedSamples, find_pack
from data_pipeline.samples import Samples, Windows
from data_pipeline.source_order import OrderedSource
from data_pipeline.token_source import TokenSource


def open_order(data: DataConfig, seed: int, stages: list[Stage], sources: Mapping[str, TokenSource]) -> SampleOrder:
    """The order of a run's samples. `stages`: see `SampleOrder`. `sources`: those of `data`, opened, by name.

    Raises:
        ValueError: the stages do not suit the sources, or a source is not packed as it should be.
    """
    cut = {source.name: _CutSource(source.path, sources[source.name], data) for source in data.sources}
    return SampleOrder(cut, data.shuffle_group_blocks, seed, stages)


class _CutSource(OrderedSource):
    """A data folder as the order sees it."""

    def __init__(self, path: str, source: TokenSource, data: DataConfig) -> None:
        self.whole = data.packing == "best_fit"
        self._path = path
        self._source = source
        self._block_bytes = data.shuffle_block_bytes
        self._cuts: dict[int, Samples] = {}

    def cut(self, sequence_length: int) -> Samples:
        if sequence_length not in self._cuts:
            self._cuts[sequence_length] = self._make_cut(sequence_length)
        return self._cuts[sequence_length]

    def _make_cut(self, sequence_length: int) -> Samples:
        itemsize = self._source.dtype.itemsize
        block_tokens = self._block_bytes // itemsize
        if not self.whole:
            return Windows(self._source.tokens, block_tokens, sequence_length)
        info = find_pack(self._source.manifest, self._path, sequence_length)
        if info.block_tokens != block_tokens:
            raise ValueError(
                f"data folder {self._path} is packed in shuffle blocks of {info.block_tokens * itemsize} bytes, but "
                f"data.shuffle_block_bytes is {self._block_bytes}: set it to the former, or pack the folder again"
            )
        return PackedSamples(self._source.manifest, info, self._source.read_file)
