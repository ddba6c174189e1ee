"""From bytes to a view of the image."""
