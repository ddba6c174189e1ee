"""Paired timings; each prints its ratio and the machine."""
