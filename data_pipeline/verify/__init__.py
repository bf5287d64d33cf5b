"""Reading everything in a set of shards, and reporting what is wrong."""

from data_pipeline.verify.cli import main

__all__ = ["main"]
