"""The photographs of the demo."""
