"""Models for a comparison: weights with which a missing term shows, and gradients that are to be the same."""
import torch


def far_from_initial(module):
    """The module, with other weights than it begins with: those are so small that much hides behind them."""
    for name, parameter in module.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.2)
    return module


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_same(ours, theirs, tolerance=1e-4):
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=tolerance,
                                   msg=lambda m: f"{name}: {m}")
