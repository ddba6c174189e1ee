"""The detector of face morphs: building, training, judging, reporting."""
