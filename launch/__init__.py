"""Commands that users start."""
