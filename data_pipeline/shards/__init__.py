"""The on-disk formats: plain WebDataset tar shards with an index; writing, reading and verifying them."""

from data_pipeline.shards.source import DamagedSampleError, DataError, RawSample, Source

__all__ = ["DamagedSampleError", "DataError", "RawSample", "Source"]
