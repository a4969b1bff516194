"""The first bad tensor, where it is known which one that is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vlm.training.reports.diagnosis import first_bad_tensor


class Root(nn.Module):
    """Finite at 0, but not its derivative; NaN below."""

    def forward(self, x):
        return {"roots": [x.sqrt()]}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.root = Root()
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.root(self.first(x))["roots"][0]).sum()


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Model()
    nn.init.zeros_(model.first.weight)
    nn.init.ones_(model.first.bias)
    return model


def test_nothing_is_wrong(model):
    model(torch.ones(1, 3)).backward()
    assert first_bad_tensor(model, lambda: model(torch.ones(1, 3))) == ""
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_weight_comes_before_what_it_spoils(model):
    model.last.bias.data[1] = torch.inf
    found = first_bad_tensor(model, lambda: model(torch.ones(1, 3)))
    assert found == "the weight last.bias (2,) holds 1 numbers that are not finite"


def test_the_first_bad_output_is_named_not_what_follows_from_it(model):
    model.first.bias.data[0] = -1.0
    found = first_bad_tensor(model, lambda: model(torch.ones(2, 3)))
    assert found == "the output of root (Root) (2, 3) holds 2 numbers that are not finite"


def test_a_bad_batch_is_an_input(model):
    found = first_bad_tensor(model, lambda: model(torch.full((1, 3), torch.nan)))
    assert found == "an input of Model (1, 3) holds 3 numbers that are not finite"


def test_of_gradients_the_one_computed_first(model):
    model.first.bias.data[2] = 0.0
    model(torch.ones(1, 3)).backward()
    found = first_bad_tensor(model, lambda: model(torch.ones(1, 3)))
    assert found == "the gradient of first.bias (3,) holds 1 numbers that are not finite"
