"""Lengths that nobody wants are told with their numbers and a command that fits; the end of a run is foretold."""

import re
import shlex

import pytest
import torch

from trainer.config.parse import with_flags
from trainer.config.recipes import RECIPES
from trainer.data.stream import Batch
from trainer.training.monitor import labelled_views
from trainer.training.plausible import doubts, fitting_batch
from trainer.training.throughput import Forecast, duration

PLAIN = {
    "global_batch": 256,
    "num_images": 100_000,
    "total_steps": 40_000,
    "num_ranks": 2,
    "step_flops": 1e13,
    "cpu_threads": None,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        (
            {"global_batch": 4096, "num_images": 98},
            "4096, but .* has 98 images: every step sees each 41.8 times",
        ),
        ({"total_steps": 3}, "the schedule is 3 steps of 256 images"),
        ({"spare_workers": 6}, "start 6 more loader processes than it has cores: try a smaller --num_workers"),
        ({"spare_workers": -6}, ""),
        ({"total_steps": 9_000_000}, "more than anyone trains"),
        (
            {"cpu_threads": 2},
            "on this CPU a step of 1e.13 .* about 2.8 minutes, and all 40000 steps about 77.2 days",
        ),
        ({"cpu_threads": 2, "step_flops": 1e9}, ""),
        (
            {"cpu_threads": 2, "step_flops": 2.3e14, "total_steps": 16},
            "about 63.9 minutes, and all 16 steps about 17.0 h",
        ),
    ],
)
def test_an_odd_length_is_told_with_its_numbers(change: dict[str, float], message: str) -> None:
    found = list(doubts(**(PLAIN | change)))  # type: ignore[arg-type]
    assert len(found) == bool(message)
    assert not message or re.search(message, found[0]), found


@pytest.mark.parametrize(("num_images", "num_ranks"), [(98, 1), (98, 4), (3, 2), (5000, 8), (10**6, 1)])
def test_the_proposed_batch_fits_the_data_and_the_ranks(num_images: int, num_ranks: int) -> None:
    batch = fitting_batch(num_images, num_ranks)
    assert batch % num_ranks == 0
    assert batch <= max(num_images, num_ranks)
    text = next(doubts(**(PLAIN | {"global_batch": 10**7, "num_images": num_images, "num_ranks": num_ranks})))  # type: ignore[arg-type]
    words = shlex.split(text.partition("try ")[2])
    recipe, runtime = RECIPES["mae_vit_base"]()
    flags = dict(zip([w.lstrip("-") for w in words[::2]], words[1::2], strict=True))
    assert with_flags(recipe, flags).global_batch == batch
    assert with_flags(runtime, flags).micro_batch * num_ranks == batch


class Clock:
    now = 1e9

    def __call__(self) -> float:
        return self.now


def after(seconds: list[float], num_steps: int) -> list[str | None]:
    clock = Clock()
    forecast = Forecast(num_steps, clock=clock)
    told = []
    for taken in seconds:
        clock.now += taken
        told.append(forecast.step_done())
    return told


def test_the_end_is_foretold_once_and_a_slow_first_step_at_once() -> None:
    told = after([30.0, *[2.0] * 8], num_steps=3606)
    assert [text is not None for text in told] == [False] * 5 + [True] + [False] * 3
    assert str(told[5]).startswith("a step takes 2 s: about 2.0 hours to go, until 2001-09-09 ")
    told = after([3600.0, 10.0, 10.0], num_steps=801)
    assert str(told[0]).startswith("a step takes 3.6e+03 s: about 33.3 days to go, until ")
    assert told[1:] == [None, None]
    assert [duration(s) for s in (5, 150, 7200, 86400 * 800)] == ["5 seconds", "2.5 minutes", "2.0 hours", "2.2 years"]


def test_training_views_show_the_name_of_their_class() -> None:
    images = torch.zeros(3, 3, 40, 40, dtype=torch.uint8)
    batches = [Batch(images, torch.zeros(3, 1), [0, 1, 2], ["a"] * 3, labels) for labels in ([0, 1, 0], [0, 0, 0])]
    drawn = [labelled_views(batch) for batch in batches]
    assert drawn[0].shape == (3, 54, 120)
    first, second, third = drawn[0].split(40, dim=2)
    assert torch.equal(first, third)
    assert not torch.equal(first[:, 40:], second[:, 40:])
    assert not first[:, :40].any()
    assert torch.equal(drawn[1].split(40, dim=2)[1], first)
