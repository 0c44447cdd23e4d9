"""Gradient descent and its descendants, in a valley small enough to be seen.

Training is one rule repeated: move every parameter a little against its gradient. It is hard because the loss is steep
in some directions and flat in others, and one learning rate must serve them all. Here the rule and its refinements
(momentum, Adam, AdamW) are written out and agree with torch.optim step by step; the learning rate at which a run
explodes is predicted, then seen; and the two companions of AdamW follow, the schedule and gradient clipping.

    python chapter-01-foundations/gradient_descent.py

The parameters are a point of shape (2,). In a model they are millions of numbers, and the rules treat each one alike.
"""
import math

import torch
from matplotlib.figure import Figure

from assert_equal import check_equal
from cli import run
from results import FIGURES

CURVATURE = torch.tensor([1.0, 50.0], dtype=torch.float64)   # along the valley and across it
START = torch.tensor([-8.0, 2.0], dtype=torch.float64)


def loss(x):
    """Height of the valley at x: (..., 2) -> (...). The minimum is 0, at the origin."""
    return 0.5 * (CURVATURE * x ** 2).sum(dim=-1)


def gradient(x, i):
    """The gradient of loss in step i: (2,) -> (2,). In training it is that of batch i; here every batch is the same."""
    return CURVATURE * x


# One step each: parameters, their gradient, and a dict the optimizer keeps between steps -> the new parameters.

def gradient_step(x, grad, state, lr):
    return x - lr * grad


def momentum_step(x, grad, state, lr, momentum=0.9):
    """Steps add up: what points the same way every time grows, what changes sign every time cancels."""
    state["velocity"] = momentum * state.get("velocity", 0.0) + grad
    return x - lr * state["velocity"]


def adamw_step(x, grad, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """Every number has a step size of its own: mean gradient over root mean square (Loshchilov & Hutter 2019)."""
    beta1, beta2 = betas
    step = state["step"] = state.get("step", 0) + 1
    mean = state["mean"] = beta1 * state.get("mean", 0.0) + (1 - beta1) * grad
    square = state["square"] = beta2 * state.get("square", 0.0) + (1 - beta2) * grad ** 2
    # Both averages began at 0 and are too small at first, the slow one by far; these quotients put them right.
    mean = mean / (1 - beta1 ** step)
    square = square / (1 - beta2 ** step)
    # The decay acts on x itself. It never enters the averages: that is the W, see adam_step for the contrast.
    return x * (1 - lr * weight_decay) - lr * mean / (square.sqrt() + eps)


def adam_step(x, grad, state, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Adam (Kingma & Ba 2015). Its weight decay is a gradient like any other (L2) and is normalized like any other."""
    return adamw_step(x, grad + weight_decay * x, state, lr, betas, eps, weight_decay=0.0)


def descend(step_function, gradient, x, steps, **settings):
    """Take steps from x of any shape; gradient is a function of (x, i). Returns the path, (steps + 1, ...)."""
    state, path = {}, [x]
    for i in range(steps):
        path.append(step_function(path[-1], gradient(path[-1], i), state, **settings))
    return torch.stack(path)


def descend_with_torch(optimizer_class, gradient, x, steps, **settings):
    """The same walk by an optimizer of torch.optim."""
    parameter = torch.nn.Parameter(x.clone())
    optimizer, path = optimizer_class([parameter], **settings), [x]
    for i in range(steps):
        parameter.grad = gradient(parameter.detach(), i)
        optimizer.step()
        path.append(parameter.detach().clone())
    return torch.stack(path)


def learning_rate(step, steps, peak, warmup, floor=0.0):
    """The rate of step 0 ... steps - 1: a straight line up to peak in warmup steps, half a cosine down to floor."""
    if step < warmup:
        return peak * (step + 1) / warmup   # + 1: a first step of size 0 would be wasted
    progress = (step - warmup) / (steps - warmup)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def clip_grad_norm(grads, max_norm):
    """Shrink gradients so that their common length is at most max_norm (Pascanu et al. 2013): (clipped, length before).

    One factor for all of them: clipping each tensor by itself would change the direction of the step.
    """
    norm = torch.stack([grad.pow(2).sum() for grad in grads]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return [grad * factor for grad in grads], norm


def show_optimizers():
    """Each rule against torch.optim, and the steps it takes until the loss stays below 0.001; returns the paths."""
    print("1. Written out = torch.optim, 300 steps down a valley 50 times steeper across than along.\n")
    paths = {}
    for name, ours, theirs, settings in (
            ("gradient descent", gradient_step, torch.optim.SGD, dict(lr=0.036)),
            ("momentum", momentum_step, torch.optim.SGD, dict(lr=0.02, momentum=0.8)),
            ("Adam", adam_step, torch.optim.Adam, dict(lr=0.2)),
            ("Adam with L2", adam_step, torch.optim.Adam, dict(lr=0.2, weight_decay=0.1)),
            ("AdamW", adamw_step, torch.optim.AdamW, dict(lr=0.2, weight_decay=0.1))):
        path = paths[name] = descend(ours, gradient, START, 300, **settings)
        steps = (loss(path) > 1e-3).nonzero().max().item() + 1
        check_equal(f"{name:<18} = torch.optim.{theirs.__name__:<6} loss < 0.001 after {steps:>3} steps", path,
                    descend_with_torch(theirs, gradient, START, 300, **settings), tolerance=1e-10)
    return paths


def show_rates():
    """The loss at three learning rates, as fractions of 2 / curvature; returns [(fraction, losses seen, predicted)]."""
    limit = 2 / CURVATURE.max().item()
    print(f"\n2. Too small, right, too large. A step multiplies x by 1 - lr * curvature: below -1 if lr > {limit:g}.\n")
    print(f"    {'lr':>8}{'lr / limit':>13}{'predicted loss':>17}{'seen, 100 steps':>17}")
    curves = []
    for fraction in (0.02, 0.9, 1.03):
        lr = fraction * limit
        seen = loss(descend(gradient_step, gradient, START, 100, lr=lr))
        predicted = torch.stack([loss(START * (1 - lr * CURVATURE) ** i) for i in range(101)])
        print(f"    {lr:>8.4f}{fraction:>13.2f}{predicted[-1]:>17.3g}{seen[-1]:>17.3g}")
        curves.append((fraction, seen, predicted))
    return curves


def show_decay():
    """Two weights whose gradients are noise, one loud and one quiet: how far does weight decay get with them?"""
    print("\n3. The trap in weight decay. Two weights begin at 1, with gradients +g, -g, +g, ... After 1,000 steps:\n")
    noise, one = torch.tensor([100.0, 0.01], dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    ends = [descend(rule, lambda x, i: noise * (-1) ** i, one, 1000, lr=0.003, weight_decay=decay)[-1]
            for rule, decay in ((adamw_step, 0.0), (adamw_step, 0.1), (adam_step, 0.1))]
    print(f"    {'':<36}{'g = 100':>10}{'g = 0.01':>10}")
    for name, end in (("no decay: the noise alone", ends[0]),
                      ("wanted: that * (1 - lr * decay)^1000", ends[0] * (1 - 0.003 * 0.1) ** 1000),
                      ("AdamW, decay decoupled", ends[1]), ("Adam, decay in the gradient (L2)", ends[2])):
        print(f"    {name:<36}{end[0]:>10.3f}{end[1]:>10.3f}")
    print("    Adam divides by the size of the gradient, and L2 along with it: nearly no decay, or far too much.")


def draw(path, paths, curves):
    fig = Figure(figsize=(9, 6.2), dpi=120, layout="constrained")
    walks, rates, schedule = fig.subplot_mosaic([["walks", "walks"], ["rates", "schedule"]]).values()
    x, y = torch.meshgrid(torch.linspace(-9, 1, 120), torch.linspace(-2.2, 2.5, 120), indexing="xy")
    walks.contour(x, y, loss(torch.stack([x, y], dim=-1)), levels=[0.5, 3, 10, 30, 70, 130], colors="#cccccc")
    for name, color in (("gradient descent", "#d9822b"), ("momentum", "#1f6f8b"), ("Adam", "#7a5195")):
        walks.plot(*paths[name][:60].T, ".-", color=color, linewidth=1.2, markersize=4, label=name)
    walks.plot(0, 0, "*", color="#b23a48", markersize=14)
    walks.set(title="60 steps through a valley, 50 times steeper across than along", xlabel="along", ylabel="across")
    walks.legend(frameon=False, loc="upper right")
    for (fraction, seen, predicted), color in zip(curves, ("#7a5195", "#1f6f8b", "#b23a48")):
        rates.semilogy(seen, color=color)
        rates.semilogy(range(0, 101, 10), predicted[::10], "o", color=color, markersize=4)
        rates.text(103, seen[-1], f"{fraction:g}", color=color, va="center")
    rates.set(title="Learning rate / (2 / curvature)", xlabel="step (dots: predicted)", ylabel="loss", xlim=(0, 116))
    schedule.plot([learning_rate(i, 300, 1e-3, 30, 1e-4) for i in range(300)], color="#1f6f8b")
    schedule.set(title="Warm-up and cosine", xlabel="step", ylabel="learning rate", ylim=(0, 1.1e-3))
    for ax in (walks, rates, schedule):
        ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path)


def main():
    paths, curves = show_optimizers(), show_rates()
    show_decay()

    first = [adam_step(torch.tensor(0.0), torch.tensor(g), {}, lr=0.001).item() for g in (1e-4, 1.0, 1e4)]
    print("\n4. Why warm up. Adam's first step with lr = 0.001 for a gradient of 0.0001, 1 and 10,000: "
          + ", ".join(f"{step:.4f}" for step in first) + ".\n    Full size at once, on the word of one batch"
          f" (without bias correction {0.1 / 0.001 ** 0.5:.2f} times as much). So the rate starts low:\n")
    print("    step" + "".join(f"{i:>10}" for i in (0, 4, 9, 10, 55, 99)))
    print("    lr  " + "".join(f"{learning_rate(i, 100, 1e-3, 10, 1e-4):>10.1e}" for i in (0, 4, 9, 10, 55, 99)))

    print("\n5. Clipping. Two gradients of length 5 and 12, together 13, may have 1: each shrinks by a factor 13.\n")
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.0, 12.0])
    clipped, norm = clip_grad_norm([p.grad for p in parameters], max_norm=1.0)
    check_equal("length before = clip_grad_norm_'s", norm, torch.nn.utils.clip_grad_norm_(parameters, max_norm=1.0))
    check_equal("clipped = clip_grad_norm_'s", torch.cat(clipped), torch.cat([p.grad for p in parameters]))

    draw(FIGURES / "gradient_descent.png", paths, curves)
    print("\nAt work: torch.optim.AdamW(..., fused=True) and torch.nn.utils.clip_grad_norm_."
          "\nAs a picture: figures/gradient_descent.png")


if __name__ == "__main__":
    run(main)
