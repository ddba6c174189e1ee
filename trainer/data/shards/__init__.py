"""What lies in tar shards, and reading any sample of them."""
