"""Converters: from the form in which a data set is found to shards. Run as `python -m data_pipeline.prepare`.

A converter lists what there is (`listing.Listing`); everything after that (order, shards, processes, resuming, reports)
is the same for all of them (`build`).
"""

from data_pipeline.prepare.cli import main

__all__ = ["main"]
