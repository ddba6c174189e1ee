"""The training loop, what it watches and what it writes."""
