"""Which layout for which cluster? Memory, bytes and time of a training step predicted on paper, for thousands of GPUs
in seconds.

    python plan.py --model llama-3.1-405b --gpus 512 --gpu h100 --length 8192 --batch-tokens 4194304

How far this can be trusted: plan_validation.py predicts what others have published, and shows the errors.

There are hundreds of ways to lay a model out over a cluster, dp x cp x pp x tp, and a wrong one wastes half of it. To
try one takes hours of a cluster, to add up what it would do takes none. All numbers are of one GPU and one step.

What a step takes, of the slowest pipeline stage (each function below gives its formula):
    products       FLOPs / (peak * efficiency)           the only number that is calibrated, see EFFICIENCY
    elementwise    bytes / memory bandwidth              norms, rotation, gate, loss, fp8 casts, optimizer
    exposed        bytes on the wires / their bandwidth  of which what hides behind computation is free
    bubble         (p - 1) / v of a microbatch           p stages, v chunks of layers on each

MFU counts attention in full, 12 * layers * length * width for each token, as PaLM, Megatron, llm-foundry and picotron
do. A causal kernel does half of that, and half is what the time is made of.
"""
import functools
import math
from collections import Counter
from dataclasses import dataclass, replace

from cli import ArgumentParser, InputError, positive, run
from model import CONFIGS
from parallel.pipeline import stage_layers

GiB = 2 ** 30


# ---------------------------------------------------------------------------------------------------------- models

@dataclass(frozen=True)
class Model:
    """The sizes that cost something. gpt: GPT-2's architecture, no gate in the MLP, biases, and learned positions."""
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool = False
    qk_norm: bool = False
    gpt: bool = False

    def layer_weights(self):
        """Of the matrices of one layer, by name. Every one is multiplied with every token."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        up = {} if self.gpt else {"up": self.hidden * self.ffn}
        return {"q": self.hidden * q, "k": self.hidden * kv, "v": self.hidden * kv, "o": q * self.hidden,
                "gate": self.hidden * self.ffn, **up, "down": self.ffn * self.hidden}

    def layer_parameters(self):
        vectors = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        if self.gpt:   # biases of the four matrices and of the two norms
            vectors += self.heads * self.head_dim + 2 * self.kv_heads * self.head_dim + self.ffn + 4 * self.hidden
        return sum(self.layer_weights().values()) + vectors

    def parameters(self, length=0):
        """All that is trained. length: of the table of learned positions, where there is one."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2) + self.gpt * length * self.hidden
        return self.layers * self.layer_parameters() + tables + self.hidden * (1 + self.gpt)

    def flops(self, length, causal=False):
        """Training FLOPs for one token: 6 for each weight it is multiplied with (2 forward, 4 backward), and attention.

        A table that is only looked up costs nothing, so of embedding and head one counts. Attention: q k^T and weights
        v are 2 * 2 * length * width forward, three times that with backward; with causal the half that is not masked.
        """
        weights = self.layers * sum(self.layer_weights().values()) + self.vocab * self.hidden
        return 6 * weights + 12 * self.layers * length * self.heads * self.head_dim / (1 + causal)


def llama(layers, hidden, ffn, heads, kv_heads, vocab=128256, tied=False):
    return Model(layers, hidden, ffn, heads, kv_heads, hidden // heads, vocab, tied)


def gpt(layers, hidden, heads, vocab=51200):
    return Model(layers, hidden, 4 * hidden, heads, heads, hidden // heads, vocab, tied=True, gpt=True)


MODELS = {
    **{name: Model(c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads,
                   c.num_key_value_heads,
                   c.head_dim, c.vocab_size, c.tie_word_embeddings, qk_norm=True)
       for name, c in CONFIGS.items() if not c.num_experts},
    "llama-3.1-8b": llama(32, 4096, 14336, 32, 8),
    "llama-3.1-70b": llama(80, 8192, 28672, 64, 8),
    "llama-3.1-405b": llama(126, 16384, 53248, 128, 8),
    "llama-2-7b": llama(32, 4096, 11008, 32, 32, 32000),
    "llama-2-13b": llama(40, 5120, 13824, 40, 40, 32000),
    "llama-2-70b": llama(80, 8192, 28672, 64, 8, 32000),
    "smollm-1.7b": llama(24, 2048, 8192, 32, 32, 49152, tied=True),
    "mpt-1b": gpt(24, 2048, 16, 50368), "mpt-3b": gpt(32, 2560, 20, 50368), "mpt-7b": gpt(32, 4096, 32, 50368),
    "mpt-13b": gpt(40, 5120, 40, 50368), "mpt-30b": gpt(48, 7168, 56, 50368), "mpt-70b": gpt(80, 8192, 64, 50368),
    "gpt-7.5b": gpt(36, 4096, 32), "gpt-22b": gpt(48, 6144, 64), "gpt-39b": gpt(48, 8192, 64),
    "gpt-145b": gpt(80, 12288, 96),
    "gpt-175b": gpt(96, 12288, 96), "gpt-530b": gpt(105, 20480, 128), "gpt-1t": gpt(128, 25600, 160),
    "gpt-175b-131k": gpt(96, 12288, 96, 131072),
}


# --------------------------------------------------------------------------------------------------------- clusters

@dataclass(frozen=True)
class GPU:
    """From data sheets: FLOP/s by precision, bytes of memory, bytes/s of memory, of NVLink and of the network, each
    way.
    """
    peak: dict
    memory: float
    bandwidth: float
    inside: float
    between: float
    attention: float   # rate of the attention kernel as a share of that of matrix products


# FlashAttention-2 reaches half of what matrix products do on an H100 (about 335 of 650 TFLOP/s, the paper's best) and
# three quarters on an A100 (about 190 of 250): it was written for the A100. torchtitan's H100s have slower memory and
# run at 500 of 700 W.
H100_PEAK = {"bf16": 989e12, "fp8": 1979e12}
GPUS = {
    "a100": GPU({"bf16": 312e12}, 80e9, 2.04e12, 300e9, 25e9, 0.75),
    "a100-40gb": GPU({"bf16": 312e12}, 40e9, 1.55e12, 300e9, 25e9, 0.75),
    "h100": GPU(H100_PEAK, 80e9, 3.35e12, 450e9, 50e9, 0.5),
    "h100-500w": GPU(H100_PEAK, 96e9, 2.4e12, 450e9, 50e9, 0.5),
    "h200": GPU(H100_PEAK, 141e9, 4.8e12, 450e9, 50e9, 0.5),
}
# Share of the peak that matrix products reach in training: one number for each GPU and precision, from the one
# published run that calibrates it (plan_validation.calibrate; a test holds it to that). All other runs are predictions.
EFFICIENCY = {("a100", "bf16"): 0.6561, ("h100", "bf16"): 0.4985, ("h100", "fp8"): 0.5907,
              ("h100-500w", "bf16"): 0.4743, ("h100-500w", "fp8"): 0.3964}
SAME_CHIP = {"a100-40gb": "a100", "h200": "h100"}
COPY = 0.85    # share of the memory bandwidth that a large elementwise kernel reaches
LINK = 0.8     # share of a wire's bandwidth that a large collective reaches
CALL = 1e-5    # seconds that a call of a collective, or one round of a ring of ours, takes however little it sends
USABLE = 0.94  # share of the memory that tensors can have: the CUDA context, NCCL's buffers and holes take the rest


@dataclass(frozen=True)
class Cluster:
    gpus: int
    gpu: GPU
    chip: str            # a key of EFFICIENCY
    per_node: int = 8


def cluster(name, gpus, per_node=8):
    return Cluster(gpus, GPUS[name], SAME_CHIP.get(name, name), per_node)


# ---------------------------------------------------------------------------------------------------------- layouts

@dataclass(frozen=True)
class Layout:
    """How a step is cut and run.

    Ranks are numbered dp x cp x pp x tp, tp fastest: it talks most and gets the fastest wires.
    """
    dp: int = 1
    cp: int = 1
    pp: int = 1
    tp: int = 1
    # Cut over dp x cp: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 weights too.
    zero: int = 0
    micro: int = 1                 # documents of a microbatch
    microbatches: int = 1          # of a step, for each dp rank
    chunks: int = 1                # v of the interleaved schedule
    checkpointing: str = "none"    # selective: all but products runs again; every-other: every second product too; full
    precision: str = "bf16"
    compiled: bool = True          # elementwise operations fused
    flash: bool = True             # else attention writes its scores into memory, as before 2022
    # Tp communication cut into tp parts, all but the first hidden behind the products (async TP)
    hide_tp: bool = False

    def __str__(self):
        axes = " ".join(f"{axis}{size}" for axis in ("dp", "cp", "pp", "tp")
                        if (size := getattr(self, axis)) > 1) or "one GPU"
        chunks = f", v {self.chunks}" * (self.chunks > 1)
        return f"{axes}, zero {self.zero}, {self.microbatches} x {self.micro}{chunks}"


@functools.cache
def spread(gpus, per_node, ranks, stride):
    """(machines, fewest members in one of them) of the group that has the least of them together, of `ranks` ranks
    `stride` apart.

    Groups begin at multiples of ranks * stride. Where that does not divide per_node some of them lie across machines.
    """
    worst, block = (1, ranks), ranks * stride
    for start in range(0, min(gpus, math.lcm(block, per_node)), block):
        for first in range(start, start + min(stride, per_node)):
            last = first + (ranks - 1) * stride
            machines = min(ranks, last // per_node - first // per_node + 1)
            if machines > 1:   # its first machine, its last, and those between
                fewest = min(-(-(per_node - first % per_node) // stride), last % per_node // stride + 1,
                             max(1, per_node // stride))
                worst = min(worst, (machines, fewest), key=lambda group: group[1])
    return worst


def wire(cluster, ranks, stride):
    """Bytes/s at which each rank of a group sends, and the share of its bytes that leave the machine. Neighbours in the
    group are `stride` ranks apart. A ring enters and leaves each machine once; NCCL lays as many rings as there are
    members in it, each over the network card of another one, so together they have all those cards. All wait for the
    group that has the fewest.
    """
    machines, members = spread(cluster.gpus, cluster.per_node, ranks, stride)
    if machines == 1:
        return LINK * cluster.gpu.inside, 0.0
    return LINK * min(cluster.gpu.inside, members * cluster.gpu.between), machines / ranks


def recomputed(model, layout):
    """Share of a layer's forward products that run a second time. "every-other" is torchtitan's: it keeps the odd ones.
    """
    weights = list(model.layer_weights().values())
    return {"none": 0, "selective": 0, "every-other": sum(weights[1::2]) / sum(weights),
            "full": 1}[layout.checkpointing]


def elementwise_numbers(model, compiled):
    """Numbers that what lies between the products of a layer reads and writes for one token: (forward, backward).

    Compiled, each tensor is read or written once by each group of operations that follow each other: two residual sums
    with their norm (4 D each way), the rotation of q and k, the gate. Operation by operation it is what chapter 3
    counts, forward a third of it.
    """
    D, F, rotated = model.hidden, model.ffn, 0 if model.gpt else (model.heads + model.kv_heads) * model.head_dim
    if compiled:
        return 8 * D + 2 * rotated + (2 if model.gpt else 3) * F, 8 * D + 2 * rotated + (3 if model.gpt else 5) * F
    norm, gate = (6, 5) if model.gpt else (22, 12)   # PyTorch has one kernel for a LayerNorm and for GELU
    numbers = 2 * norm * D + 20 * rotated + gate * F + 12 * D
    return numbers / 3, numbers * 2 / 3


def layer_seconds(model, length, cluster, layout):
    """Of one layer for one microbatch on one GPU, forward and backward: (products, elementwise)."""
    gpu, tokens = cluster.gpu, layout.micro * length / layout.cp / layout.tp   # of whose work this GPU does all
    rate = gpu.peak["bf16"] * EFFICIENCY[cluster.chip, "bf16"]
    linear_rate = gpu.peak[layout.precision] * EFFICIENCY[cluster.chip, layout.precision]
    again, full = recomputed(model, layout), layout.checkpointing == "full"
    weights = sum(model.layer_weights().values())
    # With few tokens a product waits for its weights: two bytes read forward and backward, eight to add to the
    # gradient.
    products = max(2 * tokens * weights * (3 + again) / linear_rate, 12 * weights / layout.tp / (COPY * gpu.bandwidth))
    pairs, width = tokens * length, model.heads * model.head_dim
    forward, backward = elementwise_numbers(model, layout.compiled)
    numbers = forward * (1 + (layout.checkpointing != "none")) + backward
    if layout.flash:   # half of the pairs; its backward computes the scores anew, 5 products instead of 4
        products += 2 * pairs * width * (3.5 + full) / (rate * gpu.attention)
    else:              # all pairs; scores, softmax and dropout pass through memory 6 times forward, 9 backward
        products += 4 * pairs * width * (3 + (layout.checkpointing != "none")) / rate
        numbers += length * model.heads * (15 + 6 * (layout.checkpointing != "none"))
    moved = 2 * tokens * numbers
    # Each round of the ring adds to sums in float32, read, added to and written: one forward, three backward, those of
    # dq, dk and dv.
    moved += (layout.cp - 1) * tokens * width * 12 * (4 + full)
    # Inputs and gradients are read for the largest, read again, and written in both orders.
    if layout.precision == "fp8":
        inputs = 2 * model.hidden + width + model.ffn
        gradients = width + 2 * model.kv_heads * model.head_dim + 2 * model.hidden + (1 if model.gpt else 2) * model.ffn
        moved += 6 * tokens * (inputs * (1 + again) + gradients)
    return products, moved / (COPY * gpu.bandwidth)


def head_seconds(model, length, cluster, layout):
    """The last product, in bf16 even with fp8, and the loss: ten passes over logits in float32, five if compiled.

    Two numbers.
    """
    tokens = layout.micro * length / layout.cp / layout.tp
    products = 6 * tokens * model.vocab * model.hidden / (cluster.gpu.peak["bf16"] * EFFICIENCY[cluster.chip, "bf16"])
    return products, 4 * (5 if layout.compiled else 10) * tokens * model.vocab / (COPY * cluster.gpu.bandwidth)


def largest_stage(model, layout, head=0.0):
    """Layers of the slowest rank, the head counted as so many; and the most layers of any rank.

    Interleaved, rank r has chunks r, r + p, r + 2 p ... (Narayanan et al. 2021). The head belongs to the last rank's
    last one.
    """
    counts = [end - start for start, end in stage_layers(model.layers, layout.pp * layout.chunks, head)]
    ranks = [sum(counts[rank::layout.pp]) for rank in range(layout.pp)]
    return max(*ranks[:-1], ranks[-1] + head) if layout.pp > 1 else ranks[0] + head, max(ranks)


def memory(model, length, cluster, layout):
    """Bytes on the fullest GPU, {part: bytes}; GPipe would hold all microbatches, 1F1B holds at most as many as there
    are stages.

    A parameter: 2 for the bf16 copy that computes, 4 for the exact one, 4 for the gradient, 8 for Adam's two moments
    (Rajbhandari et al. 2020). ZeRO cuts them over the n = dp * cp ranks: 1 the last 12, 2 the gradient, 3 the copy;
    what is at work is then gathered layer by layer, two of them at a time. Activations of a layer for one token, in
    numbers of two bytes (Korthikanti et al. 2022, here without dropout): inputs and results of norms, products,
    rotation, attention and gate. Logits, where the loss is not cut into chunks: in bf16, and in float32 their
    log-softmax and the two gradients that exist at once.
    """
    n, T = layout.dp * layout.cp, layout.micro * length / layout.cp
    _, layers = largest_stage(model, layout)
    tables = 1 if layout.pp > 1 or model.tied else 2
    held = (layers * model.layer_parameters() + tables * model.vocab * model.hidden) / layout.tp
    weights, gradients, optimizer = 2 * held, 4 * held, 12 * held
    if layout.zero >= 1:
        optimizer /= n
    if layout.zero >= 2:
        gradients = gradients / n + 4 * model.layer_parameters() / layout.tp
    if layout.zero == 3:
        weights = 2 * 2 * model.layer_parameters() / layout.tp   # no copy is kept: it is made of the exact one
    D, F, q, kv = model.hidden, model.ffn, model.heads * model.head_dim, model.kv_heads * model.head_dim
    everything = 4 * D + 3 * q + 3 * kv + (2 if model.gpt else 4) * F
    kept = {"none": everything, "selective": 3 * D + 2 * q + 2 * kv + (1 if model.gpt else 2) * F,
            "every-other": 3 * D + 2 * q + kv + F, "full": D}[layout.checkpointing]
    scores = 0 if layout.flash else 2.5 * length * model.heads   # scores, weights, and the dropout's mask of one byte
    kept += scores if layout.checkpointing == "none" else 0
    flying = min(layout.microbatches, layout.pp)
    if layout.chunks > 1:   # interleaved, more begin before the first is done
        flying = layout.pp + (layout.pp - 1) / layout.chunks
    activations = 2 * T / layout.tp * (layers * kept * flying + everything + scores)
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "activations": activations,
            "logits": 14 * T * model.vocab / layout.tp}


def communication(model, length, cluster, layout):
    """What one GPU sends in a step: {axis: (bytes, seconds, share between machines)}. The table in parallel/mesh.py
    counts the bytes.

    tp, in every layer: all-gather before and reduce-scatter after attention and MLP, forward and backward, so 8 times
    the activations of a microbatch, 12 if the forward pass runs again; the vocabulary-parallel head adds 4. cp: keys
    and values go round the ring, forward, and backward with their gradients. pp: an activation forward and a gradient
    back for each microbatch and chunk. dp (with cp: both see other tokens): gradients are summed in float32, weights
    gathered in bf16. Without ZeRO an all-reduce once a step; ZeRO 1 its first half, and then the new weights; from 2 on
    gradients after each microbatch, and 3 gathers the weights for its forward and for its backward pass.
    """
    n, T = layout.dp * layout.cp, layout.micro * length / layout.cp
    _, layers = largest_stage(model, layout)
    m, again = layout.microbatches, layout.checkpointing == "full"
    activation = 2 * T * model.hidden
    parameters = (layers * model.layer_parameters() + model.vocab * model.hidden) / layout.tp
    kv = 4 * T * model.kv_heads * model.head_dim / layout.tp   # keys and values
    inner, rounds = layout.tp * layout.pp, 2 * m * layout.chunks
    sent = {   # axis: ranks, their distance, bytes of the whole that is gathered or scattered, calls
        "tp": (layout.tp, 1, m * activation * (layers * (8 + 4 * again) + 4), m * layers * (8 + 4 * again)),
        "pp": (layout.pp, layout.tp, rounds * activation / layout.tp * layout.pp / max(layout.pp - 1, 1), rounds),
        "cp": (layout.cp, inner, m * layers * (3 + again) * layout.cp * kv, m * layers * (3 + again) * (layout.cp - 1)),
        "dp": (n, inner, parameters * {0: 8, 1: 6, 2: 4 * m + 2, 3: 8 * m}[layout.zero], 0)}
    out = {}
    for axis, (ranks, stride, whole, calls) in sent.items():
        speed, leaving = wire(cluster, ranks, stride)
        bytes = whole * (ranks - 1) / ranks
        out[axis] = (bytes, bytes / speed + CALL * calls * (ranks > 1), leaving)
    return out


@dataclass
class Prediction:
    layout: Layout
    memory: dict
    bytes: dict
    seconds: dict    # products, elementwise, exposed, bubble, optimizer
    tokens_per_second: float
    mfu: float

    def gib(self):
        return sum(self.memory.values()) / GiB


def predict(model, length, cluster, layout):
    """A Prediction. tokens_per_second: of each GPU.

    The pipeline's rule: m microbatches of the slowest stage and (p - 1) / v more for filling and draining, so the
    bubble is (p - 1) / (v m + p - 1) of the step (Narayanan et al. 2021). What hides: cp behind attention and dp behind
    computation, ZeRO 3 and 2 all along, 0 and 1 behind the last microbatch's backward pass, two thirds of its time. tp
    does not, unless hide_tp; pp does not.
    """
    m = layout.microbatches
    layer, head = layer_seconds(model, length, cluster, layout), head_seconds(model, length, cluster, layout)
    layers, _ = largest_stage(model, layout, sum(head) / sum(layer))
    micro = layers * sum(layer)
    sent = communication(model, length, cluster, layout)
    window = micro * m if layout.zero >= 2 else micro * 2 / 3
    exposed = (sent["tp"][1] / (layout.tp if layout.hide_tp else 1) + sent["pp"][1] + max(0, sent["dp"][1] - window)
               + max(0, sent["cp"][1] - m * layers * layer[0] / 2))
    sizes = memory(model, length, cluster, layout)
    bubble = (micro + exposed / m) * (layout.pp - 1) / layout.chunks
    # Reads four numbers of a parameter, writes three.
    optimizer = 28 * sizes["optimizer"] / 12 / (COPY * cluster.gpu.bandwidth)
    products = m * micro * layer[0] / sum(layer)
    seconds = {"products": products, "elementwise": m * micro - products, "exposed": exposed, "bubble": bubble,
               "optimizer": optimizer}
    tokens = layout.dp * layout.micro * m * length / (layout.dp * layout.cp * layout.pp * layout.tp)
    speed = tokens / sum(seconds.values())
    bytes = {"inside": sum(b * (1 - leaving) for b, _, leaving in sent.values()),
             "between": sum(b * leaving for b, _, leaving in sent.values())}
    return Prediction(layout, sizes, bytes, seconds, speed,
                      speed * model.flops(length) / cluster.gpu.peak[layout.precision])


# ------------------------------------------------------------------------------------------------------- the search

def divisors(n):
    return sorted({d for i in range(1, math.isqrt(n) + 1) if n % i == 0 for d in (i, n // i)})


def illegal(model, length, tokens, cluster, dp, cp, pp, tp):
    """Why this mesh cannot be, in a few words, or None."""
    if tp > cluster.per_node:
        return "tp reaches over more than one machine"
    if model.heads % tp or model.kv_heads % tp or model.ffn % tp:
        return "heads or MLP do not divide by tp"
    if pp > model.layers:
        return "fewer layers than stages"
    if cp > 1 and length % (2 * cp * tp):
        return "length does not divide by 2 cp tp"
    if length % tp:
        return "length does not divide by tp"
    if tokens % (dp * length):
        return "batch does not divide by dp documents"


def layouts(model, length, tokens, cluster, base=Layout(), zeros=(0, 1, 2, 3),
            checkpointing=("none", "selective", "full")):
    """All legal layouts of a step of so many tokens, and why the other meshes are not: [Layout, ...], Counter."""
    found, reasons = [], Counter()
    for tp in divisors(cluster.gpus):
        for pp in divisors(cluster.gpus // tp):
            for cp in divisors(cluster.gpus // tp // pp):
                dp = cluster.gpus // tp // pp // cp
                reason = illegal(model, length, tokens, cluster, dp, cp, pp, tp)
                if reason:
                    reasons[reason] += 1
                    continue
                documents = tokens // dp // length
                for micro in (size for size in (1, 2, 4, 8, 16) if documents % size == 0):
                    m = documents // micro
                    interleaved = [v for v in (2, 4) if pp > 1 and pp * v <= model.layers and m % pp == 0]
                    # From stage 2 on gradients are scattered after every microbatch: with a pipeline that would be in
                    # its way.
                    for zero in (z for z in zeros if (pp == 1 or z < 2) and (dp * cp > 1 or z == 0)):
                        found += [replace(base, dp=dp, cp=cp, pp=pp, tp=tp, zero=zero, micro=micro, microbatches=m,
                                          chunks=chunks,
                                          checkpointing=choice) for chunks in (1,
                                          *interleaved) for choice in checkpointing]
    return found, reasons


def remedy(model, length, tokens, cluster, **options):
    """Which change of one flag would make a layout fit, as the end of a message; found by trying.

    Empty if nothing is found.
    """
    twos = [2 ** k for k in range(18)]
    filled = [gpus for gpus in {*twos, *(cluster.per_node * two for two in twos)}
              if gpus <= cluster.per_node or gpus % cluster.per_node == 0]
    tries = [("--gpus", gpus, (length, tokens, replace(cluster, gpus=gpus)))
             for gpus in sorted(filled, key=lambda gpus: max(gpus / cluster.gpus, cluster.gpus / gpus))]
    tries += [("--batch-tokens", length * two, (length, length * two, cluster)) for two in twos]
    tries += [("--length", two, (two, tokens, cluster)) for two in twos[::-1] if tokens % two == 0]
    for flag, number, (length, tokens, cluster) in tries:
        if any(sum(memory(model, length, cluster, layout).values()) <= USABLE * cluster.gpu.memory
               for layout in layouts(model, length, tokens, cluster, **options)[0]):
            return f"; {flag} {number} would fit"
    return ""


def plan(model, length, tokens, cluster, **options):
    """The best layout of each mesh that fits, fastest first, and why the others do not: [Prediction, ...], Counter of
    reasons.
    """
    candidates, reasons = layouts(model, length, tokens, cluster, **options)
    if not candidates:
        why = ", ".join(f"{number} because {reason}" for reason, number in reasons.most_common())
        raise InputError(f"none of the {sum(reasons.values())} ways to lay out {cluster.gpus} GPUs is possible, {why}"
                         + remedy(model, length, tokens, cluster, **options))
    best, least = {}, {}
    for layout in candidates:
        mesh = (layout.dp, layout.cp, layout.pp, layout.tp)
        size = sum(memory(model, length, cluster, layout).values())
        least[mesh] = min(size, least.get(mesh, math.inf))
        if size > USABLE * cluster.gpu.memory:
            continue
        prediction = predict(model, length, cluster, layout)
        if mesh not in best or prediction.tokens_per_second > best[mesh].tokens_per_second:
            best[mesh] = prediction
    reasons["memory"] = len(least) - len(best)
    if not best:
        usable = USABLE * cluster.gpu.memory / GiB
        raise InputError(f"nothing fits: the smallest of {len(candidates):,} layouts takes"
                         f" {math.ceil(10 * min(least.values()) / GiB) / 10:,} GiB on each GPU, and tensors can have"
                         f" {math.floor(10 * usable) / 10:,}, {USABLE:.0%} of its {cluster.gpu.memory / GiB:,.1f}"
                         + remedy(model, length, tokens, cluster, **options))
    return sorted(best.values(), key=lambda prediction: -prediction.tokens_per_second), +reasons


# ----------------------------------------------------------------------------------------------------- command line

def parse_arguments():
    parser = ArgumentParser(description="Memory, traffic and speed of all layouts of a model over a cluster, ranked.")
    parser.add_argument("--model", default="llama-3.1-8b", help="one of " + ", ".join(MODELS))
    parser.add_argument("--gpus", type=positive(int), default=8, metavar="N", help="how many")
    parser.add_argument("--gpu", default="h100", help="one of " + ", ".join(GPUS))
    parser.add_argument("--length", type=positive(int), default=8192, metavar="L", help="tokens of a document")
    parser.add_argument("--batch-tokens", type=positive(int), default=2 ** 20, metavar="T",
                        help="tokens of a step, all GPUs")
    parser.add_argument("--precision", choices=H100_PEAK, default="bf16", help="of the products in the layers")
    parser.add_argument("--per-node", type=positive(int), default=8, metavar="N", help="GPUs in a machine")
    parser.add_argument("--memory", type=positive(float), metavar="GB",
                        help="of a GPU, in 1e9 bytes (None: as --gpu has)")
    parser.add_argument("--peak", type=positive(float), metavar="TFLOPS",
                        help="of a GPU in this precision (None: as --gpu has)")
    parser.add_argument("--inside", type=positive(float), metavar="GBS",
                        help="GB/s of a GPU in a machine (None: as --gpu has)")
    parser.add_argument("--between", type=positive(float), metavar="GBS",
                        help="GB/s of a GPU's network (None: as --gpu has)")
    parser.add_argument("--top", type=positive(int), default=10, metavar="N", help="how many layouts to show")
    return parser.parse_args()


def build_cluster(arguments):
    """Raises InputError for a GPU that is not known, or machines that are not full."""
    if arguments.gpu not in GPUS:
        raise InputError(f"--gpu {arguments.gpu} is not known; there are {', '.join(GPUS)},"
                         " and --peak, --memory, --inside and --between change them")
    if arguments.gpus > arguments.per_node and arguments.gpus % arguments.per_node:
        raise InputError(f"--gpus {arguments.gpus} do not fill machines of {arguments.per_node};"
                         " take a multiple of it, or another --per-node")
    machines = cluster(arguments.gpu, arguments.gpus, arguments.per_node)
    if (machines.chip, arguments.precision) not in EFFICIENCY:
        raise InputError(f"--gpu {arguments.gpu} does not compute in {arguments.precision}; use --precision bf16")
    changes = {name: vars(arguments)[name] * 1e9 for name in ("memory", "inside", "between") if vars(arguments)[name]}
    if arguments.peak:
        changes["peak"] = machines.gpu.peak | {arguments.precision: arguments.peak * 1e12}
    return replace(machines, gpu=replace(machines.gpu, **changes))


def main():
    arguments = parse_arguments()
    if arguments.model not in MODELS:
        raise InputError(f"--model {arguments.model} is not known; there are {', '.join(MODELS)}")
    model, length, tokens = MODELS[arguments.model], arguments.length, arguments.batch_tokens
    machines = build_cluster(arguments)
    if tokens % length:
        raise InputError(f"--batch-tokens {tokens} is not a multiple of --length {length}: a step has whole documents")
    best, reasons = plan(model, length, tokens, machines, base=Layout(precision=arguments.precision))
    print(f"{arguments.model}: {model.parameters(length) / 1e9:.2f} B parameters, {model.flops(length) / 1e9:,.1f}"
          " GFLOP a token;"
          f" {arguments.gpus} {arguments.gpu}, {tokens:,} tokens a step, {arguments.precision}\n")
    print("  dp  cp  pp  tp  zero  microbatches  v  checkpointing   GiB  tok/s/GPU    MFU  step, s"
          "  compute exposed  bubble  GB inside  between")
    for prediction in best[:arguments.top]:
        layout, seconds, sent = prediction.layout, prediction.seconds, prediction.bytes
        step, speed = sum(seconds.values()), prediction.tokens_per_second
        compute = seconds["products"] + seconds["elementwise"] + seconds["optimizer"]
        print(f"{layout.dp:>4}{layout.cp:>4}{layout.pp:>4}{layout.tp:>4}{layout.zero:>6}{layout.microbatches:>9}"
              f" x {layout.micro:<2}{layout.chunks:>3}  {layout.checkpointing:<13}{prediction.gib():>6.1f}"
              f"{speed:>11,.0f}{prediction.mfu:>7.1%}{step:>9.2f}{compute / step:>9.0%}"
              f"{seconds['exposed'] / step:>8.0%}{seconds['bubble'] / step:>8.0%}"
              f"{sent['inside'] / 1e9:>11,.1f}{sent['between'] / 1e9:>9,.1f}")
    print(f"\nthe best of each of the {len(best)} meshes that fit"
          + "".join(f"\n{number:>5} do not: {reason}" for reason, number in reasons.most_common()))


if __name__ == "__main__":
    run(main)
