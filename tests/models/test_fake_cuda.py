"""What a GPU would run, traced on fake CUDA tensors in bf16: no GPU is needed, and no kernel runs.

Parameters are cast as DeepSpeed 0.19.8 casts them, buffers are not. A tensor that stayed on the CPU, a value that the
host reads, and a copy from the host fail here, each of which would crash on a GPU or make the host wait for it.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.fake_cuda import traces_cuda
from trainer.config.recipes import DETECTOR_RECIPES, RECIPES
from trainer.config.settings import DetectorRecipe, PretrainRecipe
from trainer.detection.build import build_detector
from trainer.models.mask_utils import draw_mask
from trainer.training.pretraining import build_model

Inputs = Callable[[str], tuple[Tensor, ...]]


class Watch(TorchDispatchMode):
    """Counts operators, and refuses those that read on the host, leave the device or compute in float64."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a value of the device"
        given, made = (
            [leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in ([args, kwargs], result)
        )
        assert not [t for t in given + made if t.dtype == torch.float64], f"{func} computes in float64"
        elsewhere = [tuple(t.shape) for t in given + made if t.device.type != self.device]
        assert not elsewhere, f"{func} has tensors of shapes {elsewhere} that are not on {self.device}"
        return result


def mae(**changes: Any) -> tuple[nn.Module, Inputs]:
    recipe = RECIPES["demo"]()[0]
    assert isinstance(recipe, PretrainRecipe)
    model = build_model(dataclasses.replace(recipe, **changes))
    side, encoder = recipe.image_size, model.encoder

    def inputs(device: str) -> tuple[Tensor, ...]:
        images = torch.zeros(4, 3, side, side, dtype=torch.uint8, device=device)
        noise = torch.rand(4, encoder.num_patches, device=device)
        return images, *draw_mask(noise, mask_ratio=recipe.mask_ratio, grid=encoder.grid)

    return model, inputs


def detector(**changes: Any) -> tuple[nn.Module, Inputs]:
    recipe = DETECTOR_RECIPES["detector_demo"]()[0]
    assert isinstance(recipe, DetectorRecipe)
    recipe = dataclasses.replace(recipe, **changes)
    model, _ = build_detector(recipe, None)

    def inputs(device: str) -> tuple[Tensor, ...]:
        images = torch.zeros(4, 3, recipe.image_size, recipe.image_size, dtype=torch.uint8, device=device)
        return images, torch.ones(4, dtype=torch.int64, device=device), torch.rand(4, model.num_draws, device=device)

    return model, inputs


WITHOUT_ORDER = {
    *("cumsum", "histc", "bincount", "kthvalue", "median", "put", "put_", "nll_loss2d_forward", "nll_loss2d_backward"),
    *("upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "upsample_linear1d_backward"),
    *("_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward", "grid_sampler_2d_backward"),
    *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward"),
    *("reflection_pad2d_backward", "replication_pad2d_backward", "_embedding_bag_backward", "_ctc_loss_backward"),
}
"""Operators without a deterministic kernel on CUDA: the list in torch.use_deterministic_algorithms."""

MODELS = {
    "mae": lambda: mae(decoder_depth=2),
    "mae with learned positions": lambda: mae(fixed_pos_embed=False, norm_pix_loss=False),
    "cross decoder": lambda: mae(decoder_type="cross"),
    "detector": detector,
    "detector, all options": lambda: detector(
        use_mixstyle=True,
        mixstyle_blocks=2,
        mix_group=2,
        mixup_alpha=0.2,
        drop_path=0.1,
        class_weights=(1.0, 2.0),
        label_smoothing=0.1,
    ),
    "detector, margin": lambda: detector(use_margin_loss=True),
    "lora": lambda: detector(use_lora=True),
    "frozen": lambda: detector(freeze_backbone=True),
    "residual branch": lambda: detector(use_lora=True, use_residual_branch=True),
}


@pytest.fixture(params=MODELS)
def model_and_inputs(request: pytest.FixtureRequest) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    return MODELS[request.param]()


def trace(model: nn.Module, inputs: Inputs, device: str) -> tuple[Tensor, dict[str, Tensor], Watch]:
    """Compute the loss of fake parameters in bf16 on a device; and the gradients, where the device is the CPU.

    torch's autograd engine asks the CUDA driver for a context, so that a fake backward pass ends in an error without
    one. Its formulas are torch's own and the same on all devices: gradients are traced on the CPU.
    """
    parameters = {
        name: torch.empty(p.shape, dtype=torch.bfloat16, device=device).requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
    }
    buffers = {name: torch.empty(b.shape, dtype=b.dtype, device=device) for name, b in model.named_buffers()}
    given = inputs(device)
    with Watch(device) as seen:
        loss = functional_call(model.train(), parameters | buffers, given)
        if device == "cpu" or torch.cuda.is_available():
            loss.backward()
    return loss, parameters, seen


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=traces_cuda), "cpu"])
def test_loss_and_gradients_stay_on_the_device_in_bf16(model_and_inputs: tuple[nn.Module, Inputs], device: str) -> None:
    with FakeTensorMode():
        loss, parameters, seen = trace(*model_and_inputs, device)
    assert (loss.dtype, loss.device.type) == (torch.float32, device)
    assert seen.calls.total() > 50
    assert not seen.calls.keys() & WITHOUT_ORDER, "--deterministic true would raise an error on a GPU"
    for name, parameter in parameters.items():
        if device == "cpu" and parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.dtype == torch.bfloat16, name


@pytest.mark.slow
def test_torch_compiles_the_model_as_one_graph(model_and_inputs: tuple[nn.Module, Inputs]) -> None:
    model, inputs = model_and_inputs
    given = inputs("cpu")
    compiled = torch.compile(model.train(), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-5, atol=1e-6)


def test_each_operator_without_an_order_is_one_of_torchs() -> None:
    assert [name for name in WITHOUT_ORDER if not hasattr(torch.ops.aten, name)] == []


@traces_cuda
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda x: x * float(x.sum()), "_local_scalar_dense"),
        (lambda x: x.double(), "computes in float64"),
        (lambda x: x + torch.ones(4), "not on cuda"),
        (lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda"), "not on cuda"),
    ],
    ids=["read", "float64", "CPU tensor", "copy from the host"],
)
def test_the_trace_sees_a_fault(fault: Callable[[Tensor], Tensor], message: str) -> None:
    with FakeTensorMode(), Watch("cuda"):
        given = torch.ones(4, device="cuda")
        with pytest.raises(Exception, match=message):
            fault(given)
