"""--precision: in which numbers a step computes, and in which it remembers.

    fp32        everything in float32
    tf32        float32 in memory; the GPU's matrix units round what they multiply to 10 bits behind the point
    bf16        matrix products in bfloat16, by autocast, and what lies between them within attention and MLP;
                weights, moments, norms, the loss, and what goes from layer to layer in float32
    fp16        the same in float16, whose range is so small that the loss must be scaled up and the gradients down
    bf16-pure   weights, gradients and moments in bfloat16: half the memory, and a rounding that is left to chance

Why the weights stay in float32: a step changes a weight by a thousandth of itself, and bfloat16 has 8 bits, so most
changes would round to nothing. Chapter 4's number_formats.py shows it. These are the "master weights" of Micikevicius
et al. 2018.
"""
import torch

from cli import InputError

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
          "bf16-pure": torch.bfloat16}   # what the matrix products compute in
PATIENCE = 20   # steps in a row whose gradient is not finite


def choose_precision(name, device):
    """The name, or where it is None the fastest that a device is sure to have. What it has not is an InputError."""
    modern = device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    if name is None:
        return "bf16" if modern else "fp32"
    if name == "tf32" and not modern:
        raise InputError(f"--precision tf32 is a mode of NVIDIA's matrix units from Ampere on, and this device is"
                         f" {device}; use fp32")
    if name.startswith("bf16") and device == "cuda" and not modern:
        raise InputError(f"--precision {name} needs an Ampere GPU or newer; use fp16")
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    return name


def autocast(precision, device):
    """Under it a matrix product casts its inputs, and what needs many bits (norms, softmax, sums) does not."""
    return torch.autocast(device, DTYPES[precision], enabled=precision in ("bf16", "fp16"))


def compute_dtype(x):
    """What matrix products make of x here: autocast's dtype where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


class GradScaler:
    """Keeps float16 gradients above its smallest number, 6e-8: backward starts from loss * scale instead of loss.

    The scale finds itself. Where a gradient overflows the step is lost and the scale halved; after 2,000 good steps it
    is doubled. Equal to torch.amp.GradScaler, the one to use at work. For all other precisions the scale is 1, for
    ever.
    """

    def __init__(self, precision, interval=2000):
        self.scale, self.good_steps, self.interval = 2.0 ** 16 if precision == "fp16" else 1.0, 0, interval
        self.enabled = precision == "fp16"
        self.steps = self.skipped = self.in_a_row = 0   # all, those without an update, the last of these

    @torch.no_grad()
    def unscale(self, parameters):
        """Divide the gradients by the scale; they are float32 here, as the weights are."""
        if self.enabled:
            torch._foreach_mul_([parameter.grad for parameter in parameters], 1 / self.scale)

    def step(self, optimizer, norm):
        """Let a torch optimizer step if the norm of the unscaled gradients is finite, and find the next scale.

        Returns whether it did. Raises InputError where PATIENCE steps in a row could not be made.
        """
        finite = norm.isfinite().item()
        if finite:
            optimizer.step()
        self.update(finite)
        self.steps += 1
        self.skipped += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if self.in_a_row == PATIENCE:
            raise InputError(f"the gradient was not finite in {PATIENCE} steps in a row, up to step {self.steps};"
                             " what was saved before is kept as it was; try a lower --learning-rate, and instead of"
                             " fp16 bf16")
        return finite

    def state_dict(self):
        return {"scaler": (self.scale, self.good_steps), "skipped": self.skipped}

    def load_state_dict(self, state):
        """state: that of the run, which counts the steps itself."""
        (self.scale, self.good_steps), self.skipped, self.steps = state["scaler"], state["skipped"], state["step"]

    def update(self, finite):
        """finite: whether all gradients of the step were."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if self.enabled and not finite:
            self.scale /= 2
        elif self.enabled and self.good_steps == self.interval:
            self.scale, self.good_steps = self.scale * 2, 0


def round_stochastically(x):
    """float32 -> bfloat16, up or down with the probability that makes the mean right.

    bfloat16 is the upper half of a float32. Add random bits to the lower half: the chance of a carry into the upper
    half is as large as the part that will be cut off.
    """
    bits = x.view(torch.int32)
    rounded = ((bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).bfloat16()   # a carry would turn nan into zero


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW for weights in bfloat16: the new weight is computed in float32 and rounded stochastically.

    An update far below a weight's last bit then arrives in one step of many, and on average in full (Zamirai et al.
    2020).
    """

    def __init__(self, groups, lr, betas, eps=1e-8):
        super().__init__(groups, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(weight),
                              "exp_avg_sq": torch.zeros_like(weight)}
                state["step"] += 1
                t = state["step"]
                state["exp_avg"].lerp_(weight.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(weight.grad, weight.grad, value=1 - beta2)
                # In pieces: the float32 in between, of the largest weight, would cost what bfloat16 saves.
                pieces = (x.view(-1).split(1 << 22) for x in (weight, state["exp_avg"], state["exp_avg_sq"]))
                for w, mean, square in zip(*pieces):
                    change = mean.float() / (1 - beta1 ** t) / (
                        (square.float() / (1 - beta2 ** t)).sqrt() + group["eps"])
                    exact = w.float() * (1 - group["lr"] * group["weight_decay"]) - group["lr"] * change
                    w.copy_(round_stochastically(exact))
