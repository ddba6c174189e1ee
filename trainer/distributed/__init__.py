"""Ranks, DeepSpeed's engine and its files."""
