"""From shards to batches: index, plan, decode, augment, stream, loader. Knows nothing of models."""
