"""What does autocast do? The same in twenty lines, with every cast on view.

    python autocast_by_hand.py        (in this folder)

autocast has a list of operators that gain from few bits, matrix products above all, and casts their inputs; one of
operators that need many, and casts theirs to float32; everything else takes what comes. Two things are easy to
overlook: it casts at every call, so an activation that three products read is cast three times; and it remembers the
casts of weights until the "with" ends, so a weight is cast once however often it is used, but anew in every step.
"""
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from cli import run

FEW_BITS = {F.linear, torch.matmul, torch.Tensor.matmul}         # of autocast's lists, what Net calls
MANY_BITS = {F.cross_entropy, F.softmax, torch.Tensor.softmax}


class Autocast(TorchFunctionMode):
    """with Autocast(dtype): ... is torch.autocast("cpu", dtype), as far as the lists above go."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.remembered, self.casts = dtype, {}, Counter()

    def cast(self, x, dtype):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == dtype:
            return x
        is_weight = x.is_leaf and x.requires_grad
        if is_weight and x in self.remembered:
            return self.remembered[x]
        self.casts["weights" if is_weight else "activations"] += x.nbytes
        low = x.to(dtype)   # autograd sees this: the way back casts the gradient to float32 again
        if is_weight:
            self.remembered[x] = low
        return low

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in FEW_BITS:
            args = [self.cast(x, self.dtype) for x in args]
        elif function in MANY_BITS:
            args = [self.cast(x, torch.float32) for x in args]
        return function(*args, **(kwargs or {}))


class Net(nn.Module):
    """A table, a layer with a gate, a head. model.py would not do: it knows of autocast, and casts early (RMSNorm)."""

    def __init__(self, V=1024, D=128):
        super().__init__()
        self.embed, self.norm = nn.Embedding(V, D), nn.RMSNorm(D)
        self.gate, self.up, self.down = nn.Linear(D, 3 * D), nn.Linear(D, 3 * D), nn.Linear(3 * D, D)
        self.head = nn.Linear(D, V, bias=False)

    def forward(self, ids):
        x = self.embed(ids)                                             # float32, a lookup is no product
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))            # float32 + bfloat16 is float32
        return self.head(x)


def loss_and_gradients(model, ids, targets, autocast):
    with autocast:
        logits = model(ids)
        loss = F.cross_entropy(logits, targets)
    return loss, logits, torch.autograd.grad(loss, list(model.parameters()))


def main():
    torch.manual_seed(0)
    T, model = 256, Net()
    batch = torch.randint(1024, (2, T)).unbind()
    by_hand = Autocast(torch.bfloat16)
    loss, logits, gradients = loss_and_gradients(model, *batch, by_hand)
    autocast = torch.autocast("cpu", torch.bfloat16)
    expected, expected_logits, expected_gradients = loss_and_gradients(model, *batch, autocast)
    assert logits.dtype == expected_logits.dtype == torch.bfloat16, (logits.dtype, expected_logits.dtype)
    assert loss.equal(expected) and all(map(torch.equal, gradients, expected_gradients)), f"{loss} is not {expected}"
    exact, *_ = loss_and_gradients(model, *batch, torch.autocast("cpu", enabled=False))
    print(f"loss: by hand {loss:.6f}, torch.autocast {expected:.6f}, equal to the last bit, and so are all gradients;"
          f" float32 {exact:.6f}")
    print(f"{T} tokens: {by_hand.casts['weights'] / 1e6:.2f} MB of weights were cast,"
          f" {by_hand.casts['activations'] / 1e6:.2f} MB of activations; twice the tokens would cast the same weights")


if __name__ == "__main__":
    run(main)
