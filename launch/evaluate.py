r"""Judge morph detectors on test sets: MACER, BSCER, D-EER with intervals, scores, and a report.

Models are runs of launch/finetune.py, test sets are labelled shards; each gets a name. Thresholds and calibration are
those that were fitted on a detector's validation data; nothing is fitted on test data. Writes into OUTPUT:

    [timestamp]_eval.json     every figure
    [timestamp]_scores.csv    a row for each model and image: key, label, score = P(morph), isMorph, return code
    [timestamp]_report.html   one self-contained page: DET curves, tables, histograms, hardest images

All three appear at the end, together. Until then the scores so far are in [timestamp]_scores.partial.csv.

Usage: python launch/evaluate.py --models 'lora=runs/lora;full=runs/full' --test_sets 'frll=frll/*.tar;mad=mad/*.tar'

Examples:
    python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar'
    python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar' \
        --output_dir results/strict --threshold bscer_0.01
    python launch/evaluate.py --models 'lora=runs/detector' --test_sets 'test=detect/test/*.tar' \
        --output_dir results/compared --baselines baselines.json
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

from trainer.config.command_line import CommandLine
from trainer.config.scoring_settings import EvaluationSettings
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

CLI = CommandLine(EvaluationSettings, __doc__, required=("models", "test_sets"))


def main(settings: EvaluationSettings) -> int:
    """Return the exit code."""
    with loading("torch and the model library"):
        from trainer.detection.evaluation import evaluate
    evaluate(settings)
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
