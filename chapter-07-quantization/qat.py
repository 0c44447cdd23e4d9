"""Quantization-aware training: learn weights that are still good when they have been rounded.

    python train.py --qat int4                                          (in this folder)
    python quantize.py --method int4 --checkpoint out --out out-int4    the model that was trained, in integers

Quantizing a finished model moves every weight to the nearest of a few values, and nobody has asked the loss which of
two neighbours it prefers. Here the loss is asked in every step: forward computes with what rounding would leave of the
weights. But the slope of a staircase is zero wherever it has one, so no gradient would come back through round(). The
straight-through estimator (Bengio et al. 2013) passes it back as if nothing had been rounded:

    forward     y = x rounded(w)^T          the model that will be served, its loss and its gradient
    backward    dw = d rounded(w)           which is wrong, but rarely about the sign
    optimizer   w -= lr ...                 w itself stays in full precision: many small steps add up until an integer
                                            changes

So w is a memory that only training needs, like the "master weights" of precision.py. It is what is saved, as an
ordinary checkpoint, and quantize.py makes of it the very integers that were trained. Scales need no gradient: they are
the largest |w| of a group, found anew in every step. (LSQ, Esser et al. 2020, learns them; LLM-QAT, Liu et al. 2023,
trains on the model's own text.) At work: torchao.

What it costs: every pack rounds every weight, a dozen passes over memory, and autograd keeps the rounded copy from
forward to backward, unless --checkpointing makes it again. With ZeRO 3, which frees a layer's weights in between, it
keeps that copy all the same.
"""
import torch
import torch.nn.functional as F
from torch import nn

from cli import InputError
from integers import Format, rounded
from quantized import linear_layers

FORMATS = {"int8": Format(8), "int4": Format(4, group=128)}   # what quantize.py makes if it is told no more than this
TABLE = Format(8)                                             # of the token table and the head, whatever the others are


class StraightThrough(torch.autograd.Function):
    """What a format leaves of a weight (N, K); back, the gradient as it comes.

    w + (rounded(w) - w).detach() would do the same in one line, but not to the last bit: the sum is rounded once more.
    """

    @staticmethod
    def forward(ctx, weight, format):
        return rounded(weight, format)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class RoundedLinear(nn.Linear):
    """nn.Linear without bias that computes with the weight that is left. Under autocast it is cast after that."""

    def forward(self, x):
        return F.linear(x, StraightThrough.apply(self.weight, self.format))


def prepare(model, name, mesh):
    """Let a Transformer compute as its quantized self. The same parameters under the same names.

    After tensor.split, which has its own table and loss, and before the stages of a pipeline are cut. Raises InputError
    where a scale would belong to weights of several ranks, or a row does not consist of whole groups.
    """
    format = FORMATS[name]
    if mesh.tp.size > 1 and not format.group:
        raise InputError(f"--qat {name} has a scale for each whole row, and --tp {mesh.tp.size} cuts rows; use --qat"
                         " int4, or --dp")
    for _, _, layer in linear_layers(model.model.layers):
        if format.group and layer.in_features % format.group:
            raise InputError(f"--qat {name} has a scale for every {format.group} weights of a row, and there are"
                             f" rows of {layer.in_features}{' on each rank of --tp' if mesh.tp.size > 1 else ''}; use"
                             " --qat int8")
        # Only the method changes, as in small_batch_matmul.py.
        layer.__class__, layer.format = RoundedLinear, format
    model.lm_head.__class__, model.lm_head.format = RoundedLinear, TABLE
    # Every token has a scale of its own, so that it is enough to round the rows that were looked up.
    model.model.embed_tokens.register_forward_hook(lambda module, ids, rows: StraightThrough.apply(rows, TABLE))
    loss = model.loss   # which reads the head's weight itself
    model.loss = lambda x, weight, targets: loss(x, StraightThrough.apply(weight, TABLE), targets)
