"""A recipe's docstring states its cost; the model says what it is."""

import re

import pytest

from trainer.config.recipes import RECIPES
from trainer.training.model_cost import flops_of
from trainer.training.pretraining import build_model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae_vit_small", "mae_vit_base", "mae_vit_base_fast", "mae_vit_large"])
def test_the_stated_cost_is_the_models(name: str) -> None:
    recipe, _ = RECIPES[name]()
    model = build_model(recipe)
    flops = flops_of(model, recipe)
    stated = re.search(r"Cost: (\d+) GFLOP an image and step, ([\de.]+) FLOP", RECIPES[name].__doc__ or "")
    assert stated
    assert flops / 1e9 == pytest.approx(float(stated[1]), rel=0.02)
    assert flops * 800 * 1.28e6 == pytest.approx(float(stated[2]), rel=0.03)


def test_the_same_seed_draws_the_same_weights() -> None:
    recipe, _ = RECIPES["demo"]()
    one, two = (build_model(recipe).state_dict() for _ in range(2))
    assert all(one[name].equal(two[name]) for name in one)
