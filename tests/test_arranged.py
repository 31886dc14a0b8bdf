"""Arranged weights: the same products, and a model that is as it was afterwards."""

import pytest
import torch
from torch import nn

from starling_lib import arranged as module
from starling_lib.arranged import arranged
from starling_lib.rollouts import sample

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


class Tied(nn.Module):
    """Two layers of one weight, and one with a bias."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(24, 40)
        self.second = nn.Linear(40, 24, bias=False)
        self.third = nn.Linear(40, 24, bias=False)
        self.third.weight = self.second.weight

    def forward(self, states):
        states = self.first(states)
        return self.second(states) + 2 * self.third(states)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tied()


@pytest.mark.parametrize("shape", [(1, 24), (7, 24), (3, 1, 24), (2, 5, 24)])
def test_products_are_those_of_the_layers(model, shape):
    states = torch.randn(shape)
    with torch.no_grad():
        expected = model(states)
        with arranged(model):
            found = model(states)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_every_layer_is_replaced_and_a_tied_weight_arranged_once(model, monkeypatch):
    made, arrange = [], module._arrange
    monkeypatch.setattr(module, "_arrange", lambda w: made.append(w) or arrange(w))
    with arranged(model):
        replaced = [name for name, m in model.named_modules() if "forward" in vars(m)]
    assert replaced == ["first", "second", "third"]
    assert [tuple(weight.shape) for weight in made] == [(40, 24), (24, 40)]


def test_afterwards_the_layers_learn_and_read_their_weights_again(model):
    with pytest.raises(RuntimeError, match="inside"), arranged(model):
        raise RuntimeError("inside")
    with torch.no_grad():
        model.second.weight.zero_()
    out = model(torch.ones(2, 24))
    assert (out == 0).all()
    out.sum().backward()
    assert model.second.weight.grad.abs().sum() > 0


@pytest.mark.skipif(
    torch.bfloat16 not in module._offered(), reason="this CPU has no bfloat16"
)
def test_bfloat16_is_arranged_where_the_cpu_has_it(model):
    states = torch.randn(7, 24, dtype=torch.bfloat16)
    with torch.no_grad(), arranged(model.to(torch.bfloat16)):
        found = model(states)
        assert all("forward" in vars(layer) for layer in model.children())
    with torch.no_grad():
        expected = model.float()(states.float())
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


def test_bfloat16_stays_where_the_cpu_lacks_it(model, monkeypatch):
    monkeypatch.setattr(module, "_offered", lambda: (torch.float32,))
    with arranged(model.to(torch.bfloat16)):
        assert not any("forward" in vars(layer) for layer in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_stay_as_they_are(model, dtype):
    with arranged(model.to(dtype)):
        assert not any("forward" in vars(layer) for layer in model.modules())


def test_two_weights_of_one_memory_are_two_products():
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(2)))
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    states = torch.randn(3, 8)
    with torch.no_grad():
        expected = model(states)
        with arranged(model):
            found = model(states)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_neither_a_model_that_is_moved_or_compiled_nor_without_onednn(
    model, monkeypatch
):
    def replaced():
        with arranged(model):
            return sum("forward" in vars(layer) for layer in model.modules())

    assert replaced() == 3
    with monkeypatch.context() as patch:
        patch.setattr(torch.backends.mkldnn, "enabled", False)
        assert replaced() == 0
    model._hf_hook = "as accelerate's cpu_offload_with_hook leaves it"
    assert replaced() == 0
    del model._hf_hook
    model.compile()
    assert replaced() == 0


def test_a_layer_that_somebody_moves_keeps_its_own_forward(model):
    model.first.forward = moved = lambda states: states.new_zeros(
        *states.shape[:-1], 40
    )
    with torch.no_grad(), arranged(model):
        assert model.first.forward is moved
        assert (model(torch.ones(2, 24)) == 0).all()
    assert model.first.forward is moved


@pytest.mark.usefixtures("fp32")
def test_several_prompts_are_sampled_by_arranged_weights_one_is_not(
    policy, tokenizer, monkeypatch
):
    asked, arrange, made = [], module._arrange, []
    monkeypatch.setattr(module, "_arrange", lambda w: made.append(w) or arrange(w))
    prompts = [[{"role": "user", "content": text}] for text in ("one", "and two")]
    for several in (prompts[:1], prompts):
        made.clear()
        sample(policy, tokenizer, several, max_new_tokens=3)
        asked.append(len(made))
    linear = [m for m in policy.modules() if type(m) is nn.Linear]
    assert asked == [0, len(linear)]
    assert not any("forward" in vars(layer) for layer in linear)
