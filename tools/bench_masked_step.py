"""Time one MAE step against transformers' ViTMAE with equal shapes, interleaved; prints medians and their ratio.

Usage: python tools/bench_masked_step.py [repeats]
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from trainer.models.encoder import PatchEncoder
from trainer.models.mae import MaskedAutoencoder
from trainer.models.mask_utils import draw_mask

BATCH, SIDE, PATCH, WIDTH, DEPTH, DECODER_WIDTH, DECODER_DEPTH = 16, 96, 8, 192, 4, 128, 4


def our_step() -> Callable[[], None]:
    """One forward and backward pass of this project's model."""
    encoder = PatchEncoder("vit_tiny_patch16_224", image_size=SIDE, patch_size=PATCH, depth=DEPTH, fixed_positions=True)
    model = MaskedAutoencoder(encoder, decoder_width=DECODER_WIDTH, decoder_depth=DECODER_DEPTH, decoder_heads=4)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8)

    def step() -> None:
        noise = torch.rand(BATCH, encoder.num_patches)
        model(images, *draw_mask(noise, mask_ratio=0.75, grid=encoder.grid)).backward()

    return step


def their_step() -> Callable[[], None]:
    """One forward and backward pass of transformers' model."""
    config = ViTMAEConfig(
        hidden_size=WIDTH, num_hidden_layers=DEPTH, num_attention_heads=3, intermediate_size=4 * WIDTH,
        image_size=SIDE, patch_size=PATCH, decoder_hidden_size=DECODER_WIDTH, decoder_num_hidden_layers=DECODER_DEPTH,
        decoder_num_attention_heads=4, decoder_intermediate_size=4 * DECODER_WIDTH, norm_pix_loss=True,
    )  # fmt: skip
    model = ViTMAEForPreTraining(config)
    images = torch.randn(BATCH, 3, SIDE, SIDE)
    return lambda: model(images).loss.backward()


def main(repeats: int) -> None:
    """Print the comparison."""
    torch.set_num_threads(1)
    steps = {"ours": our_step(), "transformers": their_step()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 2:
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread")
    for name, median in medians.items():
        print(f"{name:14s} {1000 * median:8.1f} ms a step of {BATCH} images (median of {repeats})")
    print(f"ratio {medians['transformers'] / medians['ours']:.2f}x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
