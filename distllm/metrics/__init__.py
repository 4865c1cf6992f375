"""Metrics: from sums over samples to figures, the same for any split of the samples over batches and ranks."""
