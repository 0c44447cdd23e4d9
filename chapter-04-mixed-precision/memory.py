"""What fills the memory? Bytes of a training step on paper, from the configuration and the flags, beside what was held.

    python memory.py                                             the small model   (in this folder)
    python memory.py --config qwen3-0.6b --batch-tokens 4096 --precision bf16 --checkpointing full
    python memory.py --table --config qwen3-0.6b --batch-tokens 4096     every combination, to results/; some minutes
    python memory.py --fit                                       which Qwen3 fits into 16, 24, 40 and 80 GB?

"held" is a real step's, seen by memory_counter.py; where the model is large its tensors are fakes, with shapes and
without memory. So it can be had on a laptop for a model that needs a rack.

D, H, G, K, T, V: as in model.py; F: intermediate_size.
"""
import contextlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cli import ArgumentParser, positive, run
from data import PackedBatch
from flops import num_parameters, weights
from linear_cross_entropy import CHUNK
from memory_counter import Held
from model import CONFIGS, Transformer
from optimizer import adamw
from precision import DTYPES, autocast
from recompute import RUN
from results import write_results
from train import loss_sum


def saved_by_a_layer(config, precision, checkpointing):
    """Bytes for each token that a layer leaves behind for its gradient."""
    D, F = config.hidden_size, config.intermediate_size
    Q, KV = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    stream = 2 if precision == "bf16-pure" else 4         # bytes of a number between the layers
    low = 2 if DTYPES[precision].itemsize == 2 else 4     # of what matrix products read and write
    log_sums = 4 * config.num_attention_heads
    if checkpointing == "full":
        return stream * D                                  # what the layer was given
    if checkpointing == "selective":                       # that, and results of 7 matrix products and of attention
        return stream * D + low * (Q + 2 * KV + D + 2 * F + D + Q) + log_sums
    norm = (stream + low) * D + 4                          # normalized; times weight, as products read it; 1/rms
    # q and k: normalized, rotated. The rotation keeps nothing: cos and sin are no weights, nobody asks for their
    # gradient.
    # Q and k; v; out.
    attention = (low + low) * (Q + KV) + 4 * (Q + KV) / config.head_dim + low * KV + low * Q + log_sums
    return 2 * norm + attention + low * 4 * F              # gate, silu(gate), up, their product


def predict(config, T, precision="fp32", checkpointing="none", accumulate=1):
    """{what: bytes} of a training step with AdamW, its moments made already; "peak" is the most held at one moment."""
    D, V, F, N = config.hidden_size, config.vocab_size, config.intermediate_size, config.num_hidden_layers
    low = DTYPES[precision].itemsize
    stored = 2 if precision == "bf16-pure" else 4
    exact = 4 if precision == "fp16" else low   # of what the loss makes, see linear_cross_entropy.py
    matrices, head = weights(config)["linear"], V * D
    parts = {"weights": stored * num_parameters(config), "moments": 2 * stored * num_parameters(config),
             "gradients": stored * num_parameters(config),
             # autocast's copies of the weights; one for each layer's matrices, which live until their gradient is made
             "casts": low * matrices if low < stored else 0}
    kept, everything = (saved_by_a_layer(config, precision, choice) for choice in (checkpointing, "none"))
    last_norm = T * D * (stored + low)
    parts["activations"] = N * T * kept + last_norm
    # What is there besides while a layer's gradient is made, in its MLP, the widest part: what was forgotten, anew,
    # beside what the layer was given; two gradients as wide as the MLP and one of what goes from layer to layer; and
    # the first of a weight.
    again = everything - kept + stored * D if checkpointing != "none" else 0
    parts["one layer"] = T * (again + 2 * low * F + stored * D) + (stored * D * F if accumulate == 1 else 0)
    # The loss: gradients of its input and of the head's table, and a copy of the table in low precision. A chunk: its
    # logits, as they come and in float32; or, when they make the gradients, those of its input and, unless it is summed
    # up in place, the table. In fp16 instead the table itself in float32.
    parts["loss"] = stored * head + exact * T * D + (low * head if low < stored else 0)
    tokens, beside = min(CHUNK, T), exact * head if low < stored else 0
    chunk = max(tokens * V * (4 if low == 4 else 6), exact * tokens * (V + D) + beside)
    # StochasticAdamW, for a piece of the largest weight: its change, the sum and the bits of that in float32, and of
    # isfinite |x| and three masks.
    largest = D * max(V, F, config.num_attention_heads * config.head_dim)
    parts["optimizer"] = (4 * 4 + 3) * min(1 << 22, largest) if precision == "bf16-pure" else 0

    fixed = parts["weights"] + parts["moments"]
    earlier = parts["gradients"] if accumulate > 1 else 0   # of the packs before
    table = stored * head   # the head's gradient; where the head is tied it waits for the lookup's
    waits = table if config.tie_word_embeddings or accumulate == 1 else 0
    moments = [fixed + earlier + parts["casts"] + parts["activations"] + parts["loss"] + chunk]
    # On the way back a layer gives up activations and casts for the gradients of its weights. If those are fewer bytes,
    # most is held at the last layer, which is the first to do so, else at the first.
    for below in (0, N - 1):   # layers whose turn has not come
        gradients = 0 if accumulate > 1 else (N - 1 - below) * stored * matrices / N
        # What is computed again is cast again.
        casts = parts["casts"] / N * (1 + below if checkpointing == "none" else 1)
        moments.append(fixed + earlier + waits + gradients + casts + (1 + below) * T * kept + parts["one layer"])
    # At the end all gradients, and besides that of the lookup, which is added to the head's and to those of earlier
    # packs.
    lookup = table * (config.tie_word_embeddings + (accumulate > 1)) + stored * T * D
    moments += [fixed + parts["gradients"] + lookup, fixed + parts["gradients"] + parts["optimizer"]]
    return parts | {"peak": max(moments)}


# ---------------------------------------------------------------------------------------------------------- held

def packed_batch(T, length, vocab_size):
    """Documents of random tokens, all of one length but perhaps the last."""
    cu_seqlens = torch.tensor([*range(0, T, length), T], dtype=torch.int32)
    position_ids = torch.arange(T) % length
    input_ids, targets = torch.randint(vocab_size, (2, T))
    return PackedBatch(input_ids, targets, position_ids, cu_seqlens, min(length, T))


class HeldInAStep(Held):
    """Held, for a way back. Where a tensor is used twice autograd adds its second gradient to the first in place, but
    not while a mode looks on: then it makes a third. Nothing else adds two tensors while gradients are off, but for the
    random bits of StochasticAdamW, a small piece at a time.
    """

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten.add.Tensor and isinstance(args[1], torch.Tensor) and not torch.is_grad_enabled():
            operator = torch.ops.aten.add_.Tensor
        return super().__torch_dispatch__(operator, types, args, kwargs)


def all_logits(model, batch):
    """The loss as chapter 3 computed it."""
    with autocast(model.precision, "cpu"):
        logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)   # (T, V)
        return F.cross_entropy(logits, batch.targets, reduction="sum")


def held_by_a_step(config, T, precision="fp32", checkpointing="none", accumulate=1, loss_of=loss_sum,
                   length=64, fake=True):
    """Most bytes that the tensors of a training step hold at one moment, weights and moments included.

    fake: tensors have no memory and nothing is computed. Otherwise the step is taken.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext():
        # Fakes cannot be cast in place.
        torch.set_default_dtype(torch.bfloat16 if precision == "bf16-pure" else torch.float32)
        model, batch = Transformer(config), packed_batch(T, length, config.vocab_size)
        torch.set_default_dtype(torch.float32)
        model.precision, model.checkpointing = precision, checkpointing
        optimizer, held = adamw(model, 1e-3), HeldInAStep()
        for weight in model.parameters():
            held.add(weight)
        with held:
            for _ in range(2):   # the first step makes the moments
                held.peak = held.now
                optimizer.zero_grad()
                for _ in range(accumulate):
                    loss_of(model, batch).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
        return held.peak


# ----------------------------------------------------------------------------------------------------- what fits

def largest_batch(config, budget, *flags):
    """Most tokens of a pack with which a step stays within budget bytes, in steps of 128; 0 if none do."""
    low, high = 0, 1 << 15   # in 128 tokens
    while low < high:
        middle = (low + high + 1) // 2
        fits = predict(config, 128 * middle, *flags)["peak"] <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return 128 * low


def print_what_fits():
    budgets = 16, 24, 40, 80
    print("most tokens in a pack, by prediction; full: --checkpointing full; the GPU's own context takes another GB"
          " or so\n")
    print(f"{'':<12}{'':<20}" + "".join(f"{f'{budget} GB':>12}" for budget in budgets))
    for name, config in CONFIGS.items():
        for flags in (("bf16", "none"), ("bf16", "full"), ("bf16-pure", "full")):
            tokens = [largest_batch(config, budget * 1e9, *flags) for budget in budgets]
            if name != "small" and any(tokens):
                numbers = "".join(f"{number:>12,}" if number else f"{'-':>12}" for number in tokens)
                print(f"{name:<12}{', '.join(flags):<20}{numbers}")


def write_table(config_name, T):
    """results/memory_CONFIG.json: a row for each precision and each way of checkpointing."""
    config, rows = CONFIGS[config_name], []
    plain = held_by_a_step(config, T, loss_of=all_logits)
    for precision in ("fp32", "bf16", "bf16-pure"):
        for checkpointing in RUN:
            parts = predict(config, T, precision, checkpointing)
            rows.append({"precision": precision, "checkpointing": checkpointing,
                         "state": (parts["weights"] + parts["moments"] + parts["gradients"]) / 2 ** 20,
                         "activations": parts["activations"] / 2 ** 20, "predicted": parts["peak"] / 2 ** 20,
                         "held": held_by_a_step(config, T, precision, checkpointing) / 2 ** 20})
            rows[-1] |= {"ratio": rows[-1]["predicted"] / rows[-1]["held"],
                         "plain": rows[-1]["held"] / (plain / 2 ** 20)}
            print(rows[-1])
    rows.insert(0, {"precision": "fp32, all logits", "checkpointing": "none", "held": plain / 2 ** 20, "plain": 1.0})
    columns = {"precision": "`--precision`", "checkpointing": "`--checkpointing`",
               "state": "weights, gradients, moments, MiB",
               "activations": "activations, MiB", "predicted": "peak predicted, MiB", "held": "peak held, MiB",
               "ratio": "predicted / held", "plain": "of the first row"}
    script = f"{Path(__file__).resolve().parent.name}/memory.py"
    command = f"python {script} --table --config {config_name} --batch-tokens {T}"
    print(write_results(f"memory_{config_name}", command, columns, rows))


def main():
    parser = ArgumentParser(description="Bytes of a training step, on paper and held.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--batch-tokens", type=positive(int), default=1024, metavar="T", help="as in train.py")
    parser.add_argument("--precision", choices=DTYPES, default="fp32", help="as in train.py")
    parser.add_argument("--checkpointing", choices=RUN, default="none", help="as in train.py")
    parser.add_argument("--accumulate", type=positive(int), default=1, metavar="N", help="as in train.py")
    parser.add_argument("--fit", action="store_true", help="the largest model and number of tokens that fit")
    parser.add_argument("--table", action="store_true", help="all precisions and ways of checkpointing, to results/")
    arguments = parser.parse_args()
    if arguments.fit:
        return print_what_fits()
    if arguments.table:
        return write_table(arguments.config, arguments.batch_tokens)
    config = CONFIGS[arguments.config]
    flags = arguments.precision, arguments.checkpointing, arguments.accumulate
    for name, size in predict(config, arguments.batch_tokens, *flags).items():
        print(f"{name:<14}{size / 2 ** 20:>12,.1f} MiB")
    print(f"{'held':<14}{held_by_a_step(config, arguments.batch_tokens, *flags) / 2 ** 20:>12,.1f} MiB")


if __name__ == "__main__":
    run(main)
