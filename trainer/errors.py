"""What can go wrong for a user. Every message names the setting or file, its value, and ends with a remedy."""


class TrainerError(Exception):
    """A mistake that the user can mend: shown as one message without a traceback, exit code 2."""


class ConfigError(TrainerError):
    """A setting is unknown, malformed, out of range, or contradicts another."""


class DataError(TrainerError):
    """A shard or a sample breaks the rules of the data plane."""


class CheckpointError(TrainerError):
    """A checkpoint is missing, damaged, or belongs to another run."""
