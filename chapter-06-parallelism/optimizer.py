"""AdamW, its learning rate over a run, and everything that happens between backward and the next step's forward."""
import math

import torch

from parallel.mesh import clip_gradients, count_copies
from parallel.pipeline import sum_tied
from parallel.tensor import sum_partial
from precision import GradScaler, StochasticAdamW


def adamw(model, learning_rate, weight_decay=0.5):
    """AdamW with weight decay on matrices only: pulling norm weights towards zero helps nothing.

    A text that is read several times needs a stronger decay than one that is read once, for which 0.1 is usual.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if matrices[0].dtype == torch.bfloat16:
        return StochasticAdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    # fused: one pass over memory for all parameters, instead of a dozen.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(progress, warmup=0.05):
    """Share of the highest learning rate at progress (0 to 1 of the run): a linear rise, then half a cosine down to
    zero.
    """
    if progress < warmup:
        return max(progress, 0.001) / warmup
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class Optimizer:
    """inner: a torch optimizer for replicas.parameters(), adamw(replicas, ...) for instance. Gradients are clipped to
    norm 1.

    replicas: what the ranks with the same part of the model share, one of parallel.data.MODES.
    """

    def __init__(self, model, inner, replicas):
        self.parameters, self.inner, self.replicas, self.mesh = replicas.parameters(), inner, replicas, model.mesh
        self.scaler = GradScaler(model.precision)
        self.copies = count_copies(self.parameters, self.mesh)

    def zero_grad(self):
        self.inner.zero_grad()

    def before_last_backward(self):
        """From here on the ranks may sum the gradients that are complete."""
        self.replicas.before_backward(last=True)

    def step(self, learning_rate):
        """After backward: clip the gradients and update the weights.

        Returns the norm before clipping, a scalar tensor.
        """
        # Before any other sum: other ranks may have begun some in this group that this one only begins here.
        self.replicas.finish()
        sum_partial(self.parameters, self.mesh)
        sum_tied(self.parameters, self.mesh)
        self.scaler.unscale(self.parameters)
        norm = clip_gradients(self.parameters, self.copies, self.mesh, 1.0)
        for group in self.inner.param_groups:
            group["lr"] = learning_rate
        if self.scaler.step(self.inner, norm):
            self.replicas.after_step()
        return norm
