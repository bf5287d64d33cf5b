"""The on-disk formats: plain WebDataset tar shards with an index; writing, reading and verifying them."""

from data_pipeline.shards.reader import TarSource, open_source
from data_pipeline.shards.source import DamagedSampleError, DataError, RawSample, Source

__all__ = ["DamagedSampleError", "DataError", "RawSample", "Source", "TarSource", "open_source"]
