"""Two records: the lowest bits per byte after 83 seconds, and after five minutes, of two processor cores.

    python record.py                          83 seconds    (in this folder)
    python record.py --minutes 5
    python record.py --publish                both, with three seeds each: 20 minutes; writes results/record.json
    python record.py --ladder                 what each ingredient is worth: half an hour; writes
    python record.py --ladder --minutes 5     results/record_ladder.json; 100 minutes; ... _5.json

All but the imports counts: the tokenizer's training, the models', the scoring. What train.py does not do:

    one text               windows of the running text, the ends of documents inside: a speech sees the one before
    two models             one on each core, of different seeds; their probabilities are averaged
    Muon                   for the matrices of the layers, muon.py
    attention by matrices  windows of equal length are rectangles: products of matrices instead of a kernel
    short products         float32 products of bfloat16 numbers, where the processor has them
    the row before         a learned share of the previous token's row is added to each input

Each validation token is scored once, ends of documents included, from tokens before it and from nothing else, by models
that learn nothing from validation text. Recipes were chosen on the last tenth of the training documents. A command
that was killed goes on when it is repeated.
"""
import itertools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from attention import packed_attention
from cli import ArgumentParser, InputError, positive, run, seed
from data import fetch, learned_text, load_documents, num_bytes, packed_sequence_collate_fn, shuffled
from device import device_name, keep_memory, peak_memory
from flops import gemm_ceiling, total_flops
from model import ModelConfig, Transformer, check_packing, rotary_angles
from muon import Muon
from results import write_results
from tokenizer import Tokenizer
from train import loss_sum
from training_state import fingerprint, prepare_folder, read_tensors

PROCESSES = 2   # of one thread each: they have nothing to tell each other before the end
SAVE_SECONDS = 10


@dataclass
class Recipe:
    """What a model is made of."""
    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    batch_tokens: int = 1024
    window: int = 128           # tokens that see each other
    apart: bool = False         # documents do not see each other
    kernel: bool = False        # attention by the library's kernel
    products: str = "medium"    # float32 products of bfloat16 numbers; "highest": of float32 numbers
    previous: float = 0.2       # share of the previous token's row in the beginning; 0: there is none
    dropout: float = 0.0        # of what attention and MLP add
    muon: bool = True           # or AdamW for all
    matrix_rate: float = 0.02   # of the matrices of the layers
    rate: float = 8e-3          # of the token table and the vectors
    weight_decay: float = 0.1   # of the matrices
    table_decay: float = 0.5    # of the token table

    def model(self, vocab_size):
        return RecordModel(ModelConfig(
            vocab_size, self.hidden_size, 3 * self.hidden_size, self.num_hidden_layers, self.num_attention_heads,
            self.num_key_value_heads, self.head_dim), self)


MINUTES = (1.38, 5)
SHORT = Recipe()
LONG = replace(SHORT, hidden_size=192, num_attention_heads=3, num_key_value_heads=3, head_dim=64, window=256,
               dropout=0.1, rate=6e-3)
# {minutes: {row: how it differs from the recipe}}. The time is the same, so what costs more has to earn it.
LADDER = {
    MINUTES[0]: {
        "the recipe": {}, "AdamW for all": {"muon": False, "matrix_rate": 3e-3, "weight_decay": 0.5},
        "documents apart": {"apart": True}, "without the row before": {"previous": 0.0},
        "no weight decay": {"weight_decay": 0.0, "table_decay": 0.0},
        "attention by the kernel": {"kernel": True}, "float32 products": {"products": "highest"},
        "dropout 0.1": {"dropout": 0.1}, "2 layers": {"num_hidden_layers": 2},
        "vocabulary 512": {"vocab_size": 512}, "vocabulary 2,048": {"vocab_size": 2048},
        "window 256": {"window": 256}, "512 tokens a step": {"batch_tokens": 512}},
    MINUTES[1]: {
        "the recipe": {}, "dropout 0": {"dropout": 0.0}, "dropout 0.2": {"dropout": 0.2},
        "width 128": {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 2},
        "width 256": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
        "window 128": {"window": 128}},
}


def recipe_for(minutes):
    return SHORT if minutes < 3 else LONG


# ----------------------------------------------------------------------------------------------------------- the model

def window_attention(q, k, v, length):
    """Causal attention within windows of `length` tokens: packed_attention where all documents are equally long.

    On a processor the kernel's way back takes several times as long, as long as the scores fit into the cache.
    """
    T, H, K = q.shape
    B, G = T // length, k.shape[1]
    q = q.view(B, length, G, H // G, K).permute(0, 2, 3, 1, 4).reshape(B * G, -1, K)       # (B G, H/G L, K)
    k, v = (x.view(B, length, G, K).transpose(1, 2).reshape(B * G, length, K) for x in (k, v))
    later = torch.full((length, length), -torch.inf).triu(1).repeat(H // G, 1)             # (H/G L, L)
    weights = torch.baddbmm(later, q, k.transpose(1, 2), alpha=K ** -0.5).softmax(-1)      # (B G, H/G L, L)
    return (weights @ v).view(B, G, H // G, length, K).permute(0, 3, 1, 2, 4).reshape(T, H, K)


class RecordModel(Transformer):
    """Qwen3 with two additions: dropout, and a share of the previous token's row in each input."""

    def __init__(self, config, recipe):
        super().__init__(config)
        self.kernel, dropout = recipe.kernel, recipe.dropout
        self.previous = nn.Parameter(torch.full((config.hidden_size,), recipe.previous), recipe.previous > 0)
        for layer in self.model.layers:
            for part in (layer.self_attn, layer.mlp):
                part.register_forward_hook(lambda part, _, out: F.dropout(out, dropout, part.training))

    def init_weights(self):
        super().init_weights()
        for parameter in self.model.layers.parameters():
            if parameter.dim() == 2:   # larger than GPT-2's: a step of Muon does not depend on the gradient's size
                nn.init.normal_(parameter, std=0.4 / math.sqrt(parameter.shape[1]))

    def forward(self, input_ids, position_ids, cu_seqlens, max_seqlen):
        """As Transformer.forward."""
        check_packing(input_ids, position_ids, cu_seqlens, max_seqlen)
        x = self.model.embed_tokens(input_ids)                                             # (T, D)
        before = x.roll(1, 0).masked_fill(position_ids[:, None] == 0, 0)                   # nothing is before the first
        x = x + self.previous * before
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta, x.dtype)
        rectangle = len(input_ids) == max_seqlen * (len(cu_seqlens) - 1) and not self.kernel
        attend = (partial(window_attention, length=max_seqlen) if rectangle else
                  partial(packed_attention, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen))
        for layer in self.model.layers:
            x = layer(x, rotary, attend)
        return self.lm_head(self.model.norm(x))                                            # (T, V)


class Optimizers:
    """Muon for the matrices of the layers, AdamW for the rest; both rates rise, then fall to zero, linearly."""

    def __init__(self, model, recipe):
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.matrices = [name for name, p in self.parameters.items() if ".layers." in name and p.dim() == 2]
        inside = [self.parameters[name] for name in self.matrices]
        others = [{"params": [p for name, p in self.parameters.items() if name not in self.matrices and p.dim() == dim],
                   "weight_decay": decay} for dim, decay in ((2, recipe.table_decay), (1, 0.0))]
        adamw = partial(torch.optim.AdamW, betas=(0.9, 0.95), fused=True)
        self.inner = [(Muon if recipe.muon else adamw)(inside, weight_decay=recipe.weight_decay), adamw(others)]
        self.rates = [recipe.matrix_rate, recipe.rate]

    def step(self, done):
        """done: share of the run, 0 to 1. Clears the gradients."""
        nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        for optimizer, rate in zip(self.inner, self.rates):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(max(done, 0.001) / 0.05, (1 - done) / 0.95)
                group["momentum"] = 0.85 + 0.1 * min(1, done / 0.2)   # AdamW does not look at it
            optimizer.step()
            optimizer.zero_grad()

    def moments(self, name):
        """{moment: tensor} of a parameter."""
        return self.inner[name not in self.matrices].state[self.parameters[name]]


# ------------------------------------------------------------------------------------------------------------ the text

def running_text(documents, tokenizer):
    """All documents as one list of N + 1 ids, end-of-text before, between and after them. N of them are targets."""
    ids = [tokenizer.end_of_text]
    for document in documents:
        ids += [*tokenizer.encode(learned_text(document)), tokenizer.end_of_text]
    return ids


def make_batch(ids, starts, length, end=None):
    """The windows that start there as a PackedBatch; cut once more where an `end` stands, if one is given."""
    windows = [(ids[start:start + length], ids[start + 1:start + length + 1]) for start in starts]
    if end is not None:
        cuts = [sorted({0, length, *(i for i, token in enumerate(inputs) if token == end)}) for inputs, _ in windows]
        windows = [(inputs[i:j], targets[i:j]) for (inputs, targets), places in zip(windows, cuts)
                   for i, j in itertools.pairwise(places)]
    return packed_sequence_collate_fn(windows)


def training_batches(ids, recipe, seed, end):
    """Without end. Each epoch cuts the text into windows at other places, and takes them in another order."""
    L, B = recipe.window, recipe.batch_tokens // recipe.window
    for epoch in itertools.count():
        first = shuffled(L, seed, epoch)[0]
        starts = [first + L * i for i in shuffled((len(ids) - 1 - first) // L, seed, epoch)]
        for i in range(0, len(starts) - B + 1, B):
            yield make_batch(ids, starts[i:i + B], L, end)


def scoring_windows(n, window):
    """Windows that score n tokens once: (start, its first tokens that an earlier window has scored), ... From the
    second on, a token that counts has three quarters of a window before it."""
    starts = [*range(0, n - window, max(1, window // 4)), n - window]
    return [(start, before + window - start) for before, start in zip([-window, *starts], starts)]


@torch.no_grad()
def log_probabilities(model, ids, window, end):
    """(N,): of each token of a running text of N + 1 but the first, given those before it."""
    model.eval()
    window = min(window, len(ids) - 1)
    places, found = scoring_windows(len(ids) - 1, window), []
    for i in range(0, len(places), 8):
        starts, scored = zip(*places[i:i + 8])
        batch = make_batch(ids, starts, window, end)
        logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)
        rows = -F.cross_entropy(logits, batch.targets, reduction="none").view(-1, window)
        found += [row[number:] for row, number in zip(rows, scored)]
    model.train()
    return torch.cat(found)


def average(scores):
    """Logarithms of the mean of the models' probabilities, (N,)."""
    return torch.stack(scores).logsumexp(0) - math.log(len(scores))


def bits_per_byte(scores, documents):
    return -scores.double().sum().item() / math.log(2) / num_bytes(documents)


# --------------------------------------------------------------------------------------------------------------- a run

def write_model(path, settings, state, model, optimizers, **tensors):
    """Replace the file of a model as a whole: killed at any instant, a complete one is there."""
    unfinished = path.with_name(f".{path.name}")
    moments = {f"{name}/{key}": value for name in optimizers.parameters
               for key, value in optimizers.moments(name).items()}
    save_file({"random_state": torch.get_rng_state(), **dict(model.named_parameters()), **moments, **tensors},
              unfinished, {"state": json.dumps(state), "settings": json.dumps(settings)})
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_model(path, settings):
    """(tensors, state) of the file of a model, ({}, {"seconds": 0}) where there is none."""
    if not path.is_file():
        return {}, {"seconds": 0}
    tensors, metadata = read_tensors(path)
    saved = json.loads(metadata.get("settings", "{}"))
    if different := [name for name in settings if saved.get(name) != settings[name]]:
        raise InputError(f"{path} is of a run with other {' and '.join(different)}; choose another --out")
    return tensors, json.loads(metadata["state"])


@torch.no_grad()
def make_model(recipe, seed, vocab_size, tensors):
    """A new model and its optimizers, or what the file of a killed run holds."""
    torch.manual_seed(seed)
    model = recipe.model(vocab_size)
    optimizers = Optimizers(model, recipe)
    if tensors:
        torch.set_rng_state(tensors["random_state"])
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])
        for name, key in (key.split("/") for key in tensors if "/" in key):
            optimizers.moments(name)[key] = tensors[f"{name}/{key}"]
    return model, optimizers


def train_model(recipe, seed, tokenizer, train_ids, val_ids, path, settings, start, seconds):
    """One model, in a process of its own, which ends `seconds` after `start` (time.perf_counter), scores included.

    Leaves the file path. Returns (scores (N,), state).
    """
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(recipe.products)
    keep_memory()
    parent = os.getppid()
    tensors, state = read_model(path, settings)
    if "scores" in tensors:
        return tensors["scores"], state
    model, optimizers = make_model(recipe, seed, tokenizer.vocab_size, tensors)
    state = {"step": 0, "tokens": 0, "flops": 0, "train_seconds": 0, "parameters": model.num_parameters()} | state
    end = tokenizer.end_of_text if recipe.apart else None
    batches = itertools.islice(training_batches(train_ids, recipe, seed, end), state["step"], None)
    now = saved = time.perf_counter()
    with tqdm(total=seconds, disable=seed % PROCESSES > 0, dynamic_ncols=True,
              bar_format="{l_bar}{bar}| {n:.0f} of {total:.0f} s{postfix}") as bar:
        while True:
            left = start + seconds - now
            if state["step"] >= 10:   # the first steps are slower, and nothing to go by
                # Scoring reads each token four times, forward only: a third of a step.
                left -= len(val_ids) * 4 / 3 * state["train_seconds"] / state["tokens"]
            if left <= 0 < state["step"]:
                break
            batch = next(batches)
            loss = loss_sum(model, batch) / len(batch.targets)
            loss.backward()
            optimizers.step(state["train_seconds"] / (state["train_seconds"] + max(left, 1e-9)))
            before, now = now, time.perf_counter()
            state["train_seconds"] += now - before
            state["step"] += 1
            state["tokens"] += len(batch.targets)
            state["flops"] += total_flops(model.config, batch.cu_seqlens)
            state["seconds"] = now - start
            bar.set_postfix(step=state["step"], loss=f"{loss.item():.3f}", refresh=False)
            bar.update(min(state["seconds"], seconds) - bar.n)   # beyond its total a bar has no total
            if os.getppid() != parent:   # it was killed, and whoever repeats the command would meet us here
                os._exit(1)
            if now - saved > SAVE_SECONDS:
                write_model(path, settings, state, model, optimizers)
                saved = now
    scores = log_probabilities(model, val_ids, recipe.window, end)
    state["seconds"] = time.perf_counter() - start
    write_model(path, settings, state, model, optimizers, scores=scores)
    return scores, state


def train_models(recipe, seeds, documents, folder, start, seconds):
    """A model for each seed, PROCESSES at once, in files of the folder: [(scores, state), ...].

    documents: to train on, to score. seconds: for each PROCESSES of them, the first from `start` on.
    """
    settings = {"documents": fingerprint(documents), "seconds": seconds, "recipe": asdict(recipe)}
    paths = [folder / f"model-{seed}.safetensors" for seed in seeds]
    start -= max(read_model(path, settings)[1]["seconds"] for path in paths)   # what was killed has used its time
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state.json").write_text(json.dumps({"step": 0, "settings": settings}))   # the folder is ours
    tokenizer = Tokenizer.train(list(map(learned_text, documents[0])), recipe.vocab_size)
    ids = [running_text(part, tokenizer) for part in documents]
    # fork: a new interpreter would import torch once more, within the time that counts.
    with ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("fork")) as pool:
        runs = [pool.submit(train_model, recipe, seed, tokenizer, *ids, path, settings, start,
                            seconds * (i // PROCESSES + 1)) for i, (seed, path) in enumerate(zip(seeds, paths))]
        return [run.result() for run in runs]


def record(arguments, start):
    """Two models, one score; writes OUT/summary.json."""
    prepare_folder(arguments.out)
    source = fetch(arguments.data)
    documents = load_documents(source)
    seeds = range(arguments.seed * PROCESSES, (arguments.seed + 1) * PROCESSES)
    scores, states = zip(*train_models(recipe_for(arguments.minutes), seeds, documents, arguments.out / "checkpoint",
                                       start, arguments.minutes * 60))
    mean = average(scores)
    total = {key: sum(state[key] for state in states) for key in states[0]}
    summary = {
        "chapter": Path(__file__).parent.name, "config": f"record, {arguments.minutes:g} minutes",
        "parameters": total["parameters"], "data": str(source), "steps": total["step"], "tokens": total["tokens"],
        "wall_seconds": max(state["seconds"] for state in states),
        "tokens_per_second": total["tokens"] / max(state["train_seconds"] for state in states),
        "peak_memory_bytes": peak_memory("cpu"), "val_loss": -mean.mean().item(),
        "val_bits_per_byte": bits_per_byte(mean, documents[1]), "flops_per_token": total["flops"] / total["tokens"],
        "mfu": total["flops"] / total["train_seconds"] / gemm_ceiling("cpu", torch.float32),   # of one thread
        "device": "cpu", "device_name": device_name(), "dtype": "float32", "torch": torch.__version__,
        "seed": arguments.seed}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    alone = ", ".join(f"{bits_per_byte(score, documents[1]):.4f}" for score in scores)
    print(f"{summary['val_bits_per_byte']:.4f} bits per byte on the validation documents after"
          f" {summary['wall_seconds']:.1f} s; of each model alone {alone}")


def interval(values):
    """{"bits": mean, "half": half of its 95 % interval by Student's t} of a few values."""
    quantile = {3: 4.303, 4: 3.182}[len(values)]
    return {"bits": statistics.mean(values), "half": quantile * statistics.stdev(values) / math.sqrt(len(values))}


def publish(arguments):
    """Both records with three seeds, each run as a reader would start it; writes results/record.json."""
    rows = []
    for minutes in MINUTES:
        summaries = []
        for number in range(3):
            out = arguments.out / f"{minutes:g}-minutes-{number}"
            if not (out / "summary.json").is_file():
                subprocess.run([sys.executable, __file__, "--minutes", str(minutes), "--data", arguments.data, "--seed",
                                str(number), "--out", out], check=True)
            summaries.append(json.loads((out / "summary.json").read_text()))
        keys = ("parameters", "tokens", "wall_seconds")
        rows.append({"minutes": minutes} | interval([summary["val_bits_per_byte"] for summary in summaries])
                    | {key: statistics.mean(summary[key] for summary in summaries) for key in keys})
    columns = {"minutes": "minutes", "wall_seconds": "seconds", "parameters": "parameters of both models",
               "tokens": "tokens of both models", "bits": "bits per byte, three seeds", "half": "± (95 %)"}
    print(write_results("record", "python chapter-03-profiling/record.py --publish", columns, rows,
                        data=arguments.data))


def ladder(arguments):
    """Each row of the ladder with four seeds, on the last tenth of the training documents."""
    source, minutes = fetch(arguments.data), arguments.minutes
    documents, recipe = load_documents(source)[0], recipe_for(minutes)
    documents = documents[:len(documents) * 9 // 10], documents[len(documents) * 9 // 10:]
    rows, first = [], None
    for name, changes in LADDER[minutes].items():
        results = train_models(replace(recipe, **changes), range(4), documents, arguments.out / f"{minutes:g}" / name,
                               time.perf_counter(), minutes * 60)
        bits = [bits_per_byte(scores, documents[1]) for scores, _ in results]
        first = first or bits
        worse = interval([own - that for own, that in zip(bits, first)])
        pairs = [bits_per_byte(average([results[i][0], results[i + 1][0]]), documents[1]) for i in (0, 2)]
        rows.append({"name": name, "parameters": results[0][1]["parameters"],
                     "tokens": statistics.mean(state["tokens"] for _, state in results), **interval(bits),
                     "worse": worse["bits"], "worse_half": worse["half"], "pair": statistics.mean(pairs)})
        print(json.dumps(rows[-1]))
    columns = {"name": "what differs", "parameters": "parameters", "tokens": "tokens", "bits": "bits per byte",
               "half": "± (95 %)", "worse": "more than the first row", "worse_half": "± (95 %), paired",
               "pair": "two models averaged"}
    command = f"python chapter-03-profiling/record.py --ladder --minutes {minutes:g}"
    print(write_results(f"record_ladder_{minutes:g}", command, columns, rows, data=source))


def parse_arguments():
    parser = ArgumentParser(description="The lowest bits per byte that two processor cores reach in a given time. Takes"
                            " --minutes; with --publish 20 minutes, with --ladder (rows) x 2 x --minutes.")
    parser.add_argument("--minutes", type=positive(float), default=MINUTES[0], metavar="M",
                        help="all that a run takes, but for the imports")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--seed", type=seed, default=0, help="other models, other windows")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out-record", metavar="DIR",
                        help="where to write")
    parser.add_argument("--publish", action="store_true", help="both records, three seeds each")
    parser.add_argument("--ladder", action="store_true", help="what each part of the recipe is worth")
    arguments = parser.parse_args()
    if arguments.ladder and arguments.minutes not in LADDER:
        raise InputError(f"--ladder: there is one for --minutes {' and '.join(map(str, MINUTES))}, none for"
                         f" {arguments.minutes}")
    return arguments


def main():
    start = time.perf_counter()
    arguments = parse_arguments()
    if arguments.publish:
        publish(arguments)
    elif arguments.ladder:
        ladder(arguments)
    else:
        record(arguments, start)


if __name__ == "__main__":
    run(main)
