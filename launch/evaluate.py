"""Judge morph detectors on test sets: MACER, BSCER, D-EER with intervals, scores, and a report.

Models are runs of launch/finetune.py, test sets are labelled shards; each gets a name. Thresholds and calibration are
those that were fitted on a detector's validation data; nothing is fitted on test data. Writes into OUTPUT:

    [timestamp]_eval.json     every figure
    [timestamp]_scores.csv    a row for each model and image: key, label, score = P(morph), isMorph, return code
    [timestamp]_report.html   one self-contained page: DET curves, tables, histograms, hardest images

All three appear at the end, together. Until then the scores so far are in [timestamp]_scores.partial.csv.

Usage: python launch/evaluate.py --models 'lora=runs/lora;full=runs/full' --test_sets 'frll=frll/*.tar;mad=mad/*.tar'

Examples:
    python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar'
"""

if __name__ == "__main__":
    import sys

    sys.path.insert(0, __file__.rpartition("/")[0] + "/..")
    from launch.early import read_early

    read_early(__file__, loads="torch and the model library")

import sys

from trainer.config.command_line import configure_tool
from trainer.detection.evaluation import Settings, evaluate
from trainer.fault_tolerance.exit_codes import run


def read(argv: list[str]) -> Settings | None:
    """Read the command line; None where it asked for help."""
    return configure_tool(argv, Settings(), __doc__, required=("models", "test_sets"))


def main(words: list[str]) -> int:
    """Return the exit code."""
    settings = read(words)
    if settings is None:
        return 0
    evaluate(settings)
    return 0


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
