"""Commands that users start, and the recipes they start from."""
