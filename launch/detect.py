r"""Score photographs with a morph detector: P(morph), the decision at a threshold, and a return code for each.

Photographs need no label. What Pillow reads safely is read, JPEG 2000 included, and seen as evaluation sees test sets.
Writes OUTPUT, in the order of the images, with the columns of NIST's FATE MORPH:

    path         of the file, or SHARD/KEY
    imageLabel   what --label says
    score        calibrated P(morph), 0 to 1
    isMorph      whether the score is at least the detector's threshold
    returnCode   Success, ParseError (damaged), RefuseInput (too large or small), InputLocationError (no file) ...
    reason       why there is no score
    faceBox      left, top, right and bottom of the face that was cropped, in the upright photograph [pixels]

A detector that was trained on cropped faces (tools/make_shards.py --face_crop) crops each photograph in the same way.
Then a photograph without a face (no_face), with several_faces, a small_face or a turned_face is a row without a score,
as one that cannot be read is. Any other detector sees photographs whole, and faceBox stays empty.

After a kill, the same command goes on and writes the same file. OUTPUT.json says what the scores depend on. Start it
with deepspeed to score on several ranks.

--explain FOLDER draws a picture of each photograph that has a score: as the detector sees it, where blurring it changes
the score, and, where the detector's own MAE is found, what that reconstructs and where it errs. FOLDER/explained.csv
names the picture and the reconstruction error of each photograph. The MAE sees photographs whole and scaled, as its
validation images, so the error compares with val_loss. It costs 145 forward passes of each.

--model also takes an ONNX export of a detector (tools/export.py --format onnx), its folder or the file.

Usage: python launch/detect.py --model runs/detector --images photo.jpg|FOLDER|list.csv|'shards/*.tar'

Examples:
    python launch/detect.py --model runs/detector --images photo.jpg
    python launch/detect.py --model runs/detector --images photo.jpg --output photo.csv --explain explained
    python launch/detect.py --model runs/detector --images faces --output scores.jsonl --threshold bscer_0.10
    deepspeed --num_gpus 2 launch/detect.py --model runs/detector --images 'detect/test/*.tar' --output test.csv
"""

import sys

if __name__ == "__main__":
    sys.path[0] = __file__.rpartition("/")[0] + "/.."
    from trainer.startup import guard_imports

    guard_imports()

from trainer.config.command_line import CommandLine
from trainer.config.scoring_settings import DetectionSettings
from trainer.fault_tolerance.exit_codes import run
from trainer.startup import loading

CLI = CommandLine(DetectionSettings, __doc__, required=("model", "images", "output"))


def main(settings: DetectionSettings) -> int:
    """Return the exit code."""
    with loading("torch and the model library"):
        from trainer.detection.detecting import detect
    detect(settings)
    return 0


def command() -> None:
    """Start the command: as a script, or by the name it is installed under."""
    run(main, CLI)


if __name__ == "__main__":
    command()
