"""What survives a kill, and what ends a run that cannot go on."""
