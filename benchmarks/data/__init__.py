"""The parts of benchmarks/data_pipeline.py: images, contestants, worker processes, what the numbers mean, reports."""
