"""Time and memory of the losses against their peers, correctness first: ``python -m bench``."""
