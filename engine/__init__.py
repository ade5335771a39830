"""One training run and one sampler."""
