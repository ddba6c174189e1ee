"""Commands around training: preparing shards, measuring."""
