"""What other trainers call our settings, so that a habit leads to the right name instead of a similar one.

From MAE and timm, Hugging Face, Lightning, DeepSpeed and torchrun. A test holds that every name given here exists.
"""

import difflib
from collections.abc import Collection

RENAMED = {
    "heldout_data": "val_data",
    "heldout_every": "val_every",
    "heldout_samples": "val_samples",
    "heldout_mask_ratio": "val_mask_ratio",
}
"""Settings of release 0.2 -> of this one."""
OURS = {
    # MAE, timm
    **{"lr": ("learning_rate", "base_learning_rate"), "blr": ("base_learning_rate",)},
    **{"min_lr": ("min_learning_rate",), "wd": ("weight_decay",), "layer_decay_rate": ("layer_decay",)},
    **dict.fromkeys(("batch_size", "batch", "bs", "b"), ("global_batch", "micro_batch")),
    **dict.fromkeys(("input_size", "img_size", "resolution", "crop_size"), ("image_size",)),
    **dict.fromkeys(("arch", "architecture", "backbone", "model_name", "net"), ("model",)),
    **dict.fromkeys(("masking_ratio", "mask_rate"), ("mask_ratio",)),
    **dict.fromkeys(("norm_pix", "norm_pixels"), ("norm_pix_loss",)),
    **dict.fromkeys(("drop_path_rate", "stochastic_depth"), ("drop_path",)),
    **dict.fromkeys(("smoothing", "label_smooth"), ("label_smoothing",)),
    **dict.fromkeys(("mixup",), ("mixup_alpha",)),
    **dict.fromkeys(("clip_grad", "max_grad_norm", "gradient_clip_val", "gradient_clipping"), ("clip_grad_norm",)),
    **dict.fromkeys(("repeated_aug", "num_views"), ("aug_repeats",)),
    **dict.fromkeys(("workers", "num_loaders", "dataloader_num_workers", "j"), ("num_workers",)),
    **dict.fromkeys(("log_dir", "save_dir", "out_dir", "outdir", "results_dir", "out", "o"), ("output_dir", "output")),
    **dict.fromkeys(("output", "output_folder"), ("output_dir",)),
    # Hugging Face, Lightning
    "per_device_train_batch_size": ("micro_batch",),
    "train_micro_batch_size_per_gpu": ("micro_batch",),
    "train_batch_size": ("global_batch",),
    **dict.fromkeys(("num_train_epochs", "max_epochs", "num_epochs", "epoch"), ("epochs",)),
    **dict.fromkeys(("steps", "num_steps", "total_steps", "train_steps", "iterations", "iters"), ("max_steps",)),
    **dict.fromkeys(("max_iters", "max_iter", "num_iterations"), ("max_steps",)),
    **dict.fromkeys(("stop_step", "stop_after"), ("stop_at_step",)),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_ratio", "warm_up"), ("warmup_epochs",)),
    **dict.fromkeys(("adam_beta1",), ("beta1",)),
    **dict.fromkeys(("adam_beta2",), ("beta2",)),
    **dict.fromkeys(("random_seed", "manual_seed"), ("seed",)),
    **dict.fromkeys(("save_steps", "save_interval", "save_freq", "checkpoint_every"), ("save_every",)),
    **dict.fromkeys(("logging_steps", "log_interval", "print_freq", "log_freq"), ("log_every",)),
    **dict.fromkeys(("eval_steps", "eval_every", "val_interval", "eval_freq"), ("val_every",)),
    **dict.fromkeys(("probe_interval", "knn_every", "probe_steps", "online_eval_every"), ("probe_every",)),
    **dict.fromkeys(("save_total_limit", "keep"), ("keep_checkpoints",)),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), ("grad_checkpointing",)),
    **dict.fromkeys(("torch_compile", "compile"), ("compile_mode",)),
    **dict.fromkeys(("prefetch_factor",), ("prefetch",)),
    **dict.fromkeys(("lora_rank", "rank"), ("lora_r",)),
    **dict.fromkeys(("resume_from_checkpoint", "from_checkpoint", "auto_resume"), ("resume", "init")),
    **dict.fromkeys(("finetune", "pretrain", "checkpoint", "ckpt", "weights"), ("init", "models")),
    **dict.fromkeys(("data_path", "data_dir", "dataset", "train_data", "shards", "train_dir"), ("data", "source")),
    **dict.fromkeys(("input", "input_dir", "images", "folder", "src"), ("source", "data")),
    **dict.fromkeys(("eval_data", "validation_data", "valid_data", "val"), ("val_data",)),
    **dict.fromkeys(("test_data", "test", "test_set"), ("test_sets",)),
    **dict.fromkeys(("deepspeed_config", "ds", "ds_json"), ("ds_config",)),
}
"""Their name -> ours; a command names those that it has."""

_GPUS = "the launcher chooses them: deepspeed --num_gpus N launch/..., before the script"
_PRECISION = "precision stands in the DeepSpeed JSON: --ds_config ds_configs/zero1_bf16.json"
_DEVICE = "the first visible GPU is taken: set CUDA_VISIBLE_DEVICES, or DS_ACCELERATOR=cpu to compute on the CPU"
_ACCUMULATION = "it follows from --global_batch, --micro_batch and the number of ranks"
ADVICE = {
    **dict.fromkeys(("gpus", "num_gpus", "ngpus", "nproc_per_node", "devices", "num_nodes", "hostfile"), _GPUS),
    **dict.fromkeys(("bf16", "fp16", "fp32", "amp", "precision", "dtype", "mixed_precision"), _PRECISION),
    **dict.fromkeys(("device", "gpu", "cpu", "cuda", "use_cpu", "no_cuda"), _DEVICE),
    **dict.fromkeys(("accum_iter", "gradient_accumulation_steps", "accumulate_grad_batches"), _ACCUMULATION),
    **dict.fromkeys(
        ("cfg", "config_file", "conf", "c"),
        "--config FILE reads settings from a YAML or JSON file, --ds_config FILE is DeepSpeed's JSON",
    ),
    "zero_stage": "it stands in the DeepSpeed JSON: --ds_config ds_configs/zero2_bf16.json",
    **dict.fromkeys(("wandb", "report_to", "tensorboard"), "TensorBoard is always written, below --output_dir"),
    **dict.fromkeys(("optimizer", "optim", "opt"), "AdamW is the optimizer; --help lists its settings"),
    **dict.fromkeys(("scheduler", "sched", "lr_scheduler_type"), "a cosine after a linear warm-up is the schedule"),
}
"""Their name -> what is done here instead."""


def hint(name: str, known: Collection[str]) -> str:
    """Say what a user may have meant by a setting that a command does not have.

    Args:
        name: as typed, without dashes.
        known: the settings of the command.
    """
    plain = name.lower()
    for prefix in ("no_", "disable_", "without_"):
        if (positive := plain.removeprefix(prefix)) in known and positive != plain:
            return f"write --{positive} false"
    if RENAMED.get(plain) in known:
        return f"since release 0.3 it is --{RENAMED[plain]}"
    meant = [ours for ours in OURS.get(plain, ()) if ours in known]
    if meant:
        return f"here it is {' or '.join('--' + ours for ours in meant)}"
    if plain in ADVICE and "ds_config" in known:
        return ADVICE[plain]
    near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.5)
    return f"did you mean {' or '.join('--' + n for n in near)}?" if near else "--help lists all settings"
