"""From folders, tables and tars of images to what shards hold."""
