"""Recipes for pre-training and for detectors: settings that belong together, with source, cost and expected score.

Each returns a recipe (the numbers) and a runtime (a first guess for the hardware named).
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from trainer.config.settings import DetectorRecipe, DetectorRuntime, PretrainRecipe, PretrainRuntime, Recipe, Runtime

R_co = TypeVar("R_co", bound=Recipe, covariant=True)
T_co = TypeVar("T_co", bound=Runtime, covariant=True)


@dataclass(frozen=True, slots=True)
class Recipes(Generic[R_co, T_co]):
    """The recipes of a training command."""

    script: str
    """The command: launch/SCRIPT.py."""
    functions: Mapping[str, Callable[[], tuple[R_co, T_co]]]
    default: str


def demo() -> tuple[PretrainRecipe, PretrainRuntime]:
    """Learn from 320 photographs of 32 people in a few minutes, to see every part work.

    Source: this project; the decoder of CrossMAE (Fu et al. 2024, arXiv 2401.14391) predicts half of the hidden
    patches, so a step costs less. Hardware: 2 CPU cores. Cost: about 3 minutes.
    Expected: validation masked MSE about half of the mean-face baseline; blurry but recognisable heads.
    """
    recipe = PretrainRecipe(
        model="vit_tiny_patch16_224",
        image_size=96,
        patch_size=12,
        encoder_depth=4,
        decoder_width=128,
        decoder_depth=2,
        decoder_heads=4,
        decoder_type="cross",
        predict_share=0.5,
        norm_pix_loss=False,
        global_batch=32,
        epochs=140,
        warmup_epochs=14,
        learning_rate=3e-3,
        crop_scale_min=0.8,
        num_lanes=8,
    )
    runtime = PretrainRuntime(
        output_dir="demo/run",
        micro_batch=16,
        num_workers=1,
        log_every=50,
        save_every=400,
        val_every=200,
        picture_every=400,
        val_samples=0,
    )
    return recipe, runtime


def mae_vit_small() -> tuple[PretrainRecipe, PretrainRuntime]:
    """ViT-S/16, the published MAE settings on a smaller encoder.

    Source: He et al. 2021, arXiv 2111.06377, table 8 (the paper has no ViT-S). Hardware: 8 GPUs of 80 GB.
    Cost: 37 GFLOP an image and step, 3.8e19 FLOP for 800 epochs of 1.28 M images.
    Expected: below ViT-B; not measured by us.
    """
    return _published("vit_small_patch16_224"), _cluster(micro_batch=512)


def mae_vit_base() -> tuple[PretrainRecipe, PretrainRuntime]:
    """ViT-B/16, the published MAE settings.

    Source: He et al. 2021, arXiv 2111.06377, table 8; 8 decoder blocks as published. Hardware: 8 GPUs of 80 GB.
    Cost: 57 GFLOP an image and step, 5.8e19 FLOP for 800 epochs of 1.28 M images.
    Expected: 83.6 % top-1 on ImageNet-1k after fine-tuning (1600 epochs, as published); not measured by us.
    """
    return _published("vit_base_patch16_224"), _cluster(micro_batch=256)


def mae_vit_base_fast() -> tuple[PretrainRecipe, PretrainRuntime]:
    """ViT-B/16 with a cheaper decoder and a higher mask ratio: more images in the same time.

    Source: Fu et al. 2024, arXiv 2401.14391 (CrossMAE), but for three things. Every decoder block asks the encoder's
    last tokens, brought to the decoder's width and given its positions; there each asks a learned sum of the outputs of
    all encoder blocks, at the encoder's width and without positions. There are 4 decoder blocks, not 12. 0.8 of the
    patches are hidden, not 0.75. As there, the learning rate is MAE's times the share of the hidden patches that is
    predicted, 0.33. The choice is this project's, see Measured in tools/bench/README.md. Hardware: 8 GPUs of 80 GB.
    Cost: 25 GFLOP an image and step, 2.5e19 FLOP for 800 epochs of 1.28 M images.
    Expected: at the demo's size a lower validation error than the published form in the same time; unmeasured at this.
    """
    published, share = _published("vit_base_patch16_224"), 0.33
    recipe = dataclasses.replace(
        published,
        decoder_type="cross",
        predict_share=share,
        base_learning_rate=published.base_learning_rate * share,
        decoder_depth=4,
        mask_ratio=0.8,
    )
    return recipe, _cluster(micro_batch=256)


def mae_vit_large() -> tuple[PretrainRecipe, PretrainRuntime]:
    """ViT-L/16, the published MAE settings.

    Source: He et al. 2021, arXiv 2111.06377, table 8. Hardware: 16 to 64 GPUs of 80 GB.
    Cost: 122 GFLOP an image and step, 1.25e20 FLOP for 800 epochs of 1.28 M images.
    Expected: 85.9 % top-1 on ImageNet-1k after fine-tuning (1600 epochs, as published); not measured by us.
    """
    return _published("vit_large_patch16_224"), _cluster(micro_batch=128)


def mae_vit_huge() -> tuple[PretrainRecipe, PretrainRuntime]:
    """ViT-H/14, the published MAE settings.

    Source: He et al. 2021, arXiv 2111.06377, table 8. Hardware: 64 GPUs of 80 GB, ZeRO stage 1 or 2.
    Cost: 288 GFLOP an image and step, 3.0e20 FLOP for 800 epochs of 1.28 M images.
    Expected: 86.9 % top-1 on ImageNet-1k after fine-tuning (1600 epochs, as published); not measured by us.
    """
    return _published("vit_huge_patch14_224"), _cluster(micro_batch=64)


_PRETRAINING = (demo, mae_vit_small, mae_vit_base, mae_vit_base_fast, mae_vit_large, mae_vit_huge)
RECIPES = {function.__name__: function for function in _PRETRAINING}
PRETRAINING = Recipes("pretrain", RECIPES, "mae_vit_base")


def lora() -> tuple[DetectorRecipe, DetectorRuntime]:
    """LoRA on query, key and value of a frozen ViT-B/16, with a linear head.

    Source: rank and scale are the user's; the schedule is this project's. Hardware: 1 GPU of 16 GB.
    Cost: 70 GFLOP an image and step, two thirds of training all weights; optimizer state 1.2 MB.
    Expected: not measured by us at this size; the demo's table says what small ones reach on the ORL faces.
    """
    return _detector(use_lora=True, learning_rate=1e-3, weight_decay=0.01), _detecting()


def probe() -> tuple[DetectorRecipe, DetectorRuntime]:
    """Linear probe: the encoder stays as it is.

    Source: He et al. 2021, arXiv 2111.06377, appendix A.1, with AdamW in place of LARS, and without the BatchNorm
    (no affine) in front of the linear layer, whose numbers would depend on the micro batch. Hardware: 1 GPU of 16 GB.
    Cost: 35 GFLOP an image and step.
    Expected: not measured by us at this size; the demo's table says what small ones reach on the ORL faces.
    """
    return _detector(freeze_backbone=True, learning_rate=3e-3, weight_decay=0.0), _detecting()


def full() -> tuple[DetectorRecipe, DetectorRuntime]:
    """Train all weights, with layer decay and drop path.

    Source: He et al. 2021, arXiv 2111.06377, table 9, without mixup and label smoothing. The head sees the mean of the
    normed tokens; --pooling avg_fc_norm is the published one, the norm of the mean. Hardware: 8 GPUs of 16 GB.
    Cost: 105 GFLOP an image and step.
    Expected: not measured by us at this size; the demo's table says what small ones reach on the ORL faces.
    """
    return _detector(base_learning_rate=5e-4, layer_decay=0.65, drop_path=0.1), _detecting()


def selfmad() -> tuple[DetectorRecipe, DetectorRuntime]:
    """SelfMAD's training on a ViT: bona fides only, half of which become attacks in training (blended with themselves).

    Source: Ivanovska et al. 2025, arXiv 2504.05504, and its repository: 384 pixels, 32 images a step (16 bona fides, 16
    self-morphs), 100 passes in pairs, which are 200 here. It differs in five ways: a ViT-B/16 instead of HRNet-W18,
    whose input is normalised; AdamW at 5e-5 with half a cosine instead of SAM over SGD at 5e-4; regions from landmarks
    or ellipses instead of parsed faces; a bona fide and its self-morph are not in one batch; JPEG, brightness and
    contrast, but no shift of colours and no frequency noise. SAM needs a second backward pass at weights moved along
    the whole gradient, which DeepSpeed's ZeRO has only in parts. Pack bona fides alone (make_shards.py --only
    bonafide); --val_data needs both classes. Hardware: 1 GPU of 24 GB.
    Cost: 333 GFLOP an image and step.
    Expected: published HRNet-W18, trained on SMDD: D-EER 2.96 % on FRLL-Morphs; not measured by us.
    """
    recipe = _detector(
        image_size=384,
        self_morph_share=0.5,
        global_batch=32,
        epochs=200,
        warmup_epochs=2,
        learning_rate=5e-5,
        weight_decay=0.05,
    )
    return recipe, dataclasses.replace(_detecting(), output_dir="runs/selfmad", micro_batch=16)


def madation() -> tuple[DetectorRecipe, DetectorRuntime]:
    """MADation: LoRA of rank 2 on query and value of OpenAI's CLIP ViT-B/16, with a linear head.

    Source: Caldeira et al. 2025, arXiv 2501.03800, and its repository: alpha 4 by rsLoRA, dropout 0.4, AdamW with
    weight decay 0.05 at a constant 1e-5 and 1e-4 for the head, gradients clipped to 5, 256 images a step, 40 epochs,
    224 pixels scaled to [-1, 1], no class balance. For ViT-L/14: --model vit_large_patch14_clip_quickgelu_224
    --lora_alpha 8 --lora_dropout 0.2. It differs in four ways: the head sees the normed class token, not its projection
    scaled to length 1; softmax instead of two sigmoids; RGB instead of BGR; brightness, contrast and JPEG change a
    little beside the mirror. All ranks train one adapter, as the paper says; in its repository each trained its own.
    Weights: --init vit_base_patch16_clip_quickgelu_224.openai --pretrained true. Hardware: 1 GPU of 24 GB.
    Cost: 70 GFLOP an image and step.
    Expected: published, trained on SMDD: D-EER 5.76 % on FRLL-Morphs, 14.05 % on MAD22; not measured by us.
    """
    recipe = _detector(
        model="vit_base_patch16_clip_quickgelu_224",
        normalisation="half",
        pooling="cls",
        use_lora=True,
        lora_r=2,
        lora_alpha=4,
        lora_dropout=0.4,
        use_rslora=True,
        lora_target_modules=("query", "value"),
        epochs=40,
        warmup_epochs=0,
        learning_rate=1e-5,
        min_learning_rate=1e-5,
        head_lr_scale=10,
        weight_decay=0.05,
        clip_grad_norm=5.0,
        crop_scale_min=1.0,
    )
    return recipe, dataclasses.replace(_detecting(), output_dir="runs/madation")


def detector_demo() -> tuple[DetectorRecipe, DetectorRuntime]:
    """A small detector on the demo's faces and encoder.

    Source: this project. Hardware: 2 CPU cores. Cost: one and a half minutes of one.
    Expected: see the table at the end of `make demo`.
    """
    recipe = DetectorRecipe(
        model="vit_tiny_patch16_224",
        image_size=84,
        patch_size=12,
        encoder_depth=4,
        global_batch=32,
        view_resize="native",
        use_residual_branch=True,
        use_basic_aug=False,
        use_lora=True,
        epochs=5,
        warmup_epochs=0.2,
        learning_rate=2e-3,
        weight_decay=0.05,
        beta2=0.999,
        balance_by="source",
        num_lanes=8,
    )
    runtime = DetectorRuntime(
        output_dir="demo/detector", micro_batch=32, num_workers=1, log_every=10, save_every=100, val_every=60
    )
    return recipe, runtime


DETECTOR_RECIPES = {function.__name__: function for function in (lora, probe, full, selfmad, madation, detector_demo)}
FINETUNING = Recipes("finetune", DETECTOR_RECIPES, "lora")
TRAININGS: tuple[Recipes[Recipe, Runtime], ...] = (PRETRAINING, FINETUNING)


def _published(model: str) -> PretrainRecipe:
    return PretrainRecipe(
        model=model,
        image_size=224,
        mask_ratio=0.75,
        decoder_width=512,
        decoder_depth=8,
        decoder_heads=16,
        norm_pix_loss=True,
        global_batch=4096,
        epochs=800,
        warmup_epochs=40,
        base_learning_rate=1.5e-4,
        weight_decay=0.05,
        beta1=0.9,
        beta2=0.95,
    )


def _cluster(*, micro_batch: int) -> PretrainRuntime:
    return PretrainRuntime(
        output_dir="runs/pretrain", micro_batch=micro_batch, num_workers=8, log_every=50, save_every=1000
    )


def _detector(**changes: Any) -> DetectorRecipe:
    settings: dict[str, Any] = {
        "global_batch": 256,
        "epochs": 20,
        "warmup_epochs": 2,
        "beta2": 0.999,
        "crop_scale_min": 0.8,
    }
    return DetectorRecipe(**(settings | changes))


def _detecting() -> DetectorRuntime:
    return DetectorRuntime(output_dir="runs/detector", micro_batch=64, num_workers=8, log_every=20, val_every=200)
