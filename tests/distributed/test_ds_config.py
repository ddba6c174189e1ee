"""A DeepSpeed JSON does what it says or is refused by name: nothing in it passes without effect."""

import json
import logging
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, _REMOVED_ZERO_CONFIG_KEYS
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
from torch import nn

from tests.helpers.runs import ROOT
from trainer.distributed.ds_config import (
    HONOURED,
    REFUSED,
    fill_ds_config,
    find_ds_config,
    owned_by_recipe,
    read_ds_config,
)
from trainer.distributed.engine import Engine
from trainer.distributed.world import World
from trainer.errors import ConfigError

OWNED = owned_by_recipe(
    global_batch=4,
    micro_batch=2,
    num_ranks=1,
    learning_rate=1e-2,
    betas=(0.9, 0.95),
    weight_decay=0.05,
    clip_grad_norm=0,
)
TORCH_ADAM = {"type": "AdamW", "params": {"torch_adam": True}}


def read(folder: Path, config: Any, *, prefix: bytes = b"") -> dict[str, Any]:
    path = folder / "ds.json"
    path.write_bytes(prefix + json.dumps(config).encode())
    return fill_ds_config(read_ds_config(path), OWNED)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimisation": {"stage": 1}}, "'zero_optimisation'.*did you mean zero_optimization"),
        ({"zero_optimization": {"stages": 1}}, r"'zero_optimization.stages'.*did you mean stage\?"),
        ({"zero_optimization": {"offload_optimizer": {"pin": True}}}, "'zero_optimization.offload_optimizer.pin'"),
        ({"qwertz": 1}, "'qwertz', which DeepSpeed does not know: remove it"),
        ({"zero_optimization": True}, r'to true, but it must be a JSON object; write {"stage": 1}'),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage to 4"),
        ({"zero_optimization": {"stage": "1"}}, 'zero_optimization.stage to "1"'),
        (
            {"zero_optimization": {"reduce_bucket_size": "many"}},
            "DeepSpeed refuses the ds_config: reduce_bucket_size is 'many': ",
        ),
        ({"torch_autocast": {"enabled": True}}, 'changes the numbers.*write "bf16": {"enabled": true}'),
        ({"bfloat16": {"enabled": True}}, 'write "bf16" for "bfloat16"'),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "changes the numbers"),
        ({"bf16": {"enabled": "perhaps"}}, "DeepSpeed refuses the ds_config"),
        ({"activation_checkpointing": {}}, "set --grad_checkpointing true; remove it"),
        ({"autotuning": {"enabled": True}}, "plan_run"),
        ({"hybrid_engine": {}}, "generates text"),
        ({"compile": {"deepcompile": True}}, "set --compile_mode default"),
        ({"checkpoint": {"load_universal": True}}, "resumes without load_universal"),
        ({"optimizer": {"type": "SGD", "params": {}}}, 'optimizer.type to "SGD", but .* of AdamW'),
        ({"optimizer": {"type": 3}}, "optimizer.type to 3"),
        *(
            ({"optimizer": {"type": name}}, f'optimizer.type to "{name}", but .* of AdamW')
            for name in ("Lion", "Muon", "OneBitAdam", "ZeroOneAdam", "Lamb", "Adagrad", "FusedAdam", "CPUAdam")
        ),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "other numbers of ranks; remove it"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "changes the numbers"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "changes the numbers"),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/local"}}},
            "NVMe is not used here",
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, "reduce_bucket_size .*remove the line"),
        ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, "weight_decay is that of AdamW"),
        (
            {"optimizer": {"type": "AdamW", "params": {"eps": "auto"}}},
            "params.eps .*: remove the line, or write a value",
        ),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adm": True}}}, "did you mean torch_adam"),
        ({"wandb": {"enabled": True}}, "wandb is not installed: pip install wandb"),
        ({"steps_per_print": "auto"}, "leaves steps_per_print .*remove the line"),
        ({"gradient_allreduce_op": "sum"}, "mean over the global batch"),
        (
            {"fp16": {"enabled": True, "auto_cast": True}},
            "fp16.auto_cast to true, but it would round the samples' draws",
        ),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "DeepSpeed refuses the ds_config"),
    ],
)
def test_what_does_nothing_or_something_untold_is_refused_with_the_remedy(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, config)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    assert read(tmp_path, {"steps_per_print": 2}, prefix=b"\xef\xbb\xbf")["steps_per_print"] == 2


class Asked(dict[str, Any]):
    """Remembers every name that it is asked for."""

    names: set[str]

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return super().__contains__(name)

    def keys(self) -> "Asked":  # type: ignore[override]
        return self


def test_every_name_that_deepspeed_reads_is_honoured_or_refused() -> None:
    asked = Asked(train_micro_batch_size_per_gpu=1)
    asked.names = set()
    deepspeed.DeepSpeedConfig(asked)
    known = HONOURED[""] | {name for name in REFUSED if "." not in name}
    assert len(asked.names) > 40
    assert (asked.names | _REMOVED_TOP_LEVEL_CONFIG_KEYS.keys()) - known == set()


@pytest.mark.parametrize(
    ("block", "model"),
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
        ("tensorboard", TensorBoardConfig),
        ("csv_monitor", CSVConfig),
        ("wandb", WandbConfig),
        ("comet", CometConfig),
    ],
)
@pytest.mark.versions
def test_every_name_of_deepspeeds_own_blocks_is_honoured_or_refused(block: str, model: Any) -> None:
    fields = {name for entry, info in model.model_fields.items() for name in (entry, info.alias) if name}
    if block == "zero_optimization":
        fields |= _REMOVED_ZERO_CONFIG_KEYS.keys()
    refused = {name.removeprefix(f"{block}.") for name in REFUSED if name.startswith(f"{block}.")}
    assert fields - HONOURED[block] - refused == set()
    assert HONOURED[block] <= fields, "DeepSpeed does not know these"


class Squares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layer(inputs.to(self.layer.weight.dtype)).float().square().mean()


def steps(config: dict[str, Any], world: World) -> tuple[Engine, list[float]]:
    engine = Engine(Squares(), ds_config=config, weight_decay=0.05, world=world)
    batches = torch.randn(3, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    return engine, [engine.step([(x,) for x in pair], learning_rate=1e-2, seed=0).loss for pair in batches]


@pytest.mark.slow
def test_every_honoured_setting_trains_and_the_precision_is_the_engines_own(tmp_path: Path, world: World) -> None:
    stage3 = {f"stage3_{n}": 10 for n in ("prefetch_bucket_size", "max_live_parameters", "max_reuse_distance")}
    zero = {"stage": 2, "contiguous_gradients": True, "reduce_scatter": True, "reduce_bucket_size": 1000}
    zero |= {"allgather_bucket_size": 1000, "overlap_comm": False, "round_robin_gradients": True}
    loud = {
        "steps_per_print": 1,
        "wall_clock_breakdown": True,
        "memory_breakdown": True,
        "zero_optimization": {"stage": 1},
    }
    told = {"csv_monitor": {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "j"}}
    told |= {"tensorboard": {"enabled": True, "output_path": str(tmp_path / "tb"), "job_name": "j"}}
    found = {}
    for name, config in {
        "plain": {"bf16": {"enabled": False}, "fp16": {"enabled": False}},
        "loud": loud | told | {"zero_optimization": zero},
        "zero3": {"zero_optimization": {"stage": 3, **stage3, "stage3_param_persistence_threshold": 0}},
        "bf16": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}},
    }.items():
        engine, losses = steps(read(tmp_path, {"optimizer": TORCH_ADAM} | config), world)
        found[name] = losses
        assert engine.precision == ("bf16" if name == "bf16" else "fp32")
        assert engine.zero_stage == config.get("zero_optimization", {}).get("stage", 0)
    exact = [found[name] for name in ("plain", "loud", "zero3")]
    assert all(losses == pytest.approx(exact[0], rel=1e-6) for losses in exact)
    assert found["bf16"] == pytest.approx(exact[0], rel=0.05)
    assert found["bf16"] != exact[0]
    assert list((tmp_path / "csv").rglob("*.csv"))
    assert list((tmp_path / "tb").rglob("events.*"))


def test_an_optimizer_that_must_be_compiled_is_told_before_and_one_message_where_it_cannot(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # no ninja, no compiler
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "built"))
    config = read(tmp_path, {"optimizer": {"type": "AdamW", "params": {}}})
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ConfigError, match=r"cannot compile the optimizer AdamW.*torch_adam"),
    ):
        steps(config, world)
    assert "compiles the optimizer AdamW of this ds_config now" in caplog.text


def test_the_files_that_we_ship_are_read_without_a_word() -> None:
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        assert read_ds_config(path)["optimizer"]["params"]["torch_adam"] is True


def test_a_file_of_ds_configs_is_found_by_its_name_from_any_folder_unless_one_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("zero1_bf16.json", "ds_configs/zero1_bf16.json"):
        assert find_ds_config(name) == ROOT / "ds_configs" / "zero1_bf16.json"
    for name in ("mine.json", "other/zero1_bf16.json", str(tmp_path / "zero1_bf16.json")):
        assert find_ds_config(name) == Path(name)
    Path("zero1_bf16.json").write_text("{}")
    assert find_ds_config("zero1_bf16.json") == Path("zero1_bf16.json")
