"""What each bit costs: every method, made from one checkpoint and measured side by side.

    python evaluate.py                                     (in this folder, after train.py)
    python evaluate.py --qat out-qat --group 32            also of a run of train.py --qat int4; groups of 32

Quality is bits per byte over all validation documents. Bytes are those of model.safetensors, and those of the tensors
once loaded. Speed is that of one text, with the products of small_batch_matmul.py; the methods take turns. Nothing here
is compiled, so that for a small model the time goes to Python, whatever the bits: benchmark_decode.py has the speeds of
Qwen3 0.6B. Writes OUT/quantized/METHOD/ for each method, results/evaluate.json and figures/evaluate.png.
"""
import itertools
import math
import sys
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from checkpoint import load_model, save_model
from cli import ArgumentParser, positive, run
from data import IGNORE, fetch, load_documents, num_bytes, pack, packed_sequence_collate_fn, tokenize
from device import choose_device, keep_memory
from sampling import Sampling
from static_batching import generate_batch
from pretrained import checkpoint_folder
from quantize import METHODS, predicted_bytes, quantize
from quantized_cache import rounded_attention
from results import FIGURES, write_results
from small_batch_matmul import for_small_batches

CACHE_BLOCK = 32          # tokens that share a scale in a quantized cache
PROMPT, NEW = 256, 48     # tokens of the text that speed is measured with
COLORS = {"float": "#888888", "int8": "#1f6f8b", "int4": "#d9822b", "QAT": "#b23a48"}


@torch.no_grad()
def validate(model, full, documents, tokenizer, batch_tokens=1024, cache_bits=None):
    """Over all targets: bits per byte; the divergence from the full model, in bits per byte; perplexity, e to the nats
    per token.

    The divergence (Kullback-Leibler) is what a text costs more that the full model has written. It is zero only for
    equal models, where bits per byte go up and down: some of the answers that rounding changes become better by chance.
    cache_bits: of the cache that attention reads; None: none.
    """
    windows, _ = tokenize(documents, tokenizer, min(batch_tokens, model.config.max_position_embeddings))
    nats = divergence = targets = 0
    for chosen in pack(windows, batch_tokens, range(len(windows))):
        batch = packed_sequence_collate_fn(chosen).to(model.model.norm.weight.device)
        packed = batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen
        counted = batch.targets != IGNORE
        attend = rounded_attention(batch.cu_seqlens, cache_bits, CACHE_BLOCK) if cache_bits else None
        ours, theirs = (logits[counted].float().log_softmax(-1)
                        for logits in (model(*packed, attend=attend), full(*packed)))   # (T, V)
        nats += F.nll_loss(ours, batch.targets[counted], reduction="sum").item()
        divergence += F.kl_div(ours, theirs, log_target=True, reduction="sum").item()
        targets += counted.sum().item()
    bits = math.log(2) * num_bytes(documents)
    return {"bits_per_byte": nats / bits, "divergence": 1e3 * divergence / bits, "perplexity": math.exp(nats / targets)}


def held_bytes(model):
    """Of all tensors of a model; one that has two names, as a tied table, counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def step_seconds(model, tokenizer, prompt, new):
    """[prefill of the prompt, each token after the first]."""
    times, start = [], time.perf_counter()
    for _ in generate_batch(model, tokenizer, [prompt], new, Sampling(temperature=0)):
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times


def make_all(arguments, documents, device, folder):
    """{row's name: folder of the model}: the checkpoint itself, in bfloat16, and as each method leaves it.

    Written into folder.
    """
    folders = {"float32": checkpoint_folder(arguments.checkpoint), "bfloat16": folder / "bfloat16"}
    sources = {"": arguments.checkpoint} | ({" after --qat": arguments.qat} if arguments.qat else {})
    for method, (after, source) in itertools.product(METHODS, sources.items()):
        for asymmetric in (False, True)[:1 if METHODS[method].bits == 8 or after else 2]:
            if after and method != "int4":
                continue
            name = method + (", zero point" if asymmetric else "") + after
            folders[name] = folder / name.replace(", ", "-").replace(" ", "-")
            group = arguments.group if METHODS[method].bits == 4 else None
            print(f"\n{name}", file=sys.stderr)
            quantize(source, method, folders[name], group, asymmetric, documents, arguments.calibration_tokens, device)
    model, tokenizer = load_model(arguments.checkpoint, dtype=torch.bfloat16)
    folders["bfloat16"].mkdir(parents=True, exist_ok=True)
    save_model(folders["bfloat16"], model, tokenizer)
    return folders


def measure(folders, documents, device, rounds):
    """The rows of the table."""
    rows, models, times = [], {}, {name: [] for name in folders}
    for name, folder in folders.items():
        model, tokenizer = load_model(folder, device)
        full = models.get("float32", model.eval())
        size, described = (folder / "model.safetensors").stat().st_size, model.config.quantization_config
        rows.append({"name": name, "disk": size / 1e6, "memory": held_bytes(model) / 1e6}
                    | validate(model.eval(), full, documents, tokenizer))
        if described:
            rows[-1]["predicted"] = predicted_bytes(model.config, described, model.model.norm.weight.itemsize) / 1e6
        print(rows[-1], file=sys.stderr, flush=True)
        if name == "float32":
            for cache_bits in (8, 4):
                quality = validate(model, full, documents, tokenizer, cache_bits=cache_bits)
                rows.append({"name": f"float32, cache in int{cache_bits}"} | quality)
        models[name] = for_small_batches(model, use_kernel=device == "cpu")
    encoded = (tokenizer.encode(str(document) * PROMPT) for document in documents)
    prompt = next(ids for ids in encoded if len(ids) >= PROMPT)[:PROMPT]
    for _, (name, model) in itertools.product(range(rounds + 1), models.items()):
        times[name].append(step_seconds(model, tokenizer, prompt, NEW))
    for row in rows:
        if row["name"] in times:   # the first round warms up
            row["prefill"] = PROMPT / median(run[0] for run in times[row["name"]][1:])
            row["decode"] = 1 / median(seconds for run in times[row["name"]][1:] for seconds in run[1:])
    nearest = {row["name"]: row["bits_per_byte"] for row in rows}
    for row in rows:
        row["worse"] = f"{row['bits_per_byte'] / nearest['float32'] - 1:+.2%}"
        like = "int4, zero point" if "zero point" in row["name"] else "int4"
        if row["name"].startswith("int4") and row["name"] != like:
            row["recovered"] = f"{(nearest[like] - row['bits_per_byte']) / (nearest[like] - nearest['float32']):.0%}"
    return rows


def draw(rows, path):
    """Quality against bytes, and speed against bytes."""
    figure = Figure(figsize=(10, 5.2), dpi=120, layout="constrained")
    rows = [row for row in rows if "disk" in row]
    for axes, key, label in zip(figure.subplots(1, 2), ("bits_per_byte", "decode"),
                                ("bits per byte (lower is better)", "tokens/s, one text")):
        gap, heights = (max(row[key] for row in rows) - min(row[key] for row in rows)) / 26, {}
        for row in sorted(rows, key=lambda row: row[key]):
            kind = "QAT" if "qat" in row["name"] else row["name"][:4] if row["name"].startswith("int") else "float"
            # Labels one above the other where points are not.
            height = heights[kind] = max(row[key], heights.get(kind, -math.inf) + gap)
            axes.plot(row["disk"], row[key], "o", color=COLORS[kind])
            left = "int4" in row["name"]   # of the point, because there are many of them and others to their right
            axes.annotate(row["name"], (row["disk"], row[key]),
                          xytext=(row["disk"] * (0.9 if left else 1.1), height), va="center",
                          ha="right" if left else "left", fontsize=8, color=COLORS[kind],
                          arrowprops={"arrowstyle": "-", "color": COLORS[kind], "linewidth": 0.4})
        sizes = [row["disk"] for row in rows if row["name"] in ("float32", "bfloat16", "int8", "int4")]
        axes.set(xlabel="MB on disk", ylabel=label, xscale="log", xlim=(min(sizes) / 3.5, 2 * max(sizes)))
        axes.set_xticks(sizes, [f"{size:,.1f}" for size in sizes])
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


COLUMNS = {"name": "weights", "bits_per_byte": "bits per byte", "worse": "worse by",
           "recovered": "of int4's loss recovered",
           "divergence": "divergence, millibits per byte", "perplexity": "perplexity",
           "disk": "MB on disk", "predicted": "MB predicted", "memory": "MB in memory", "prefill": "prefill tokens/s",
           "decode": "decode tokens/s"}


def main():
    keep_memory()
    parser = ArgumentParser(description="Measure what each way to write the weights costs and gives.")
    parser.add_argument("--checkpoint", default=Path(__file__).parent / "out", metavar="DIR|HUB_ID",
                        help="the model to begin with")
    parser.add_argument("--qat", metavar="DIR", help="also a model that train.py --qat int4 has made")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="validation and calibration text, as in train.py")
    parser.add_argument("--group", type=positive(int), default=128, metavar="N",
                        help="4 bits: neighbours that share a scale")
    parser.add_argument("--calibration-tokens", type=positive(int), default=16384, metavar="N",
                        help="of the training text")
    parser.add_argument("--rounds", type=positive(int), default=5, metavar="N", help="how often speed is measured")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to compute")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR",
                        help="where to write the models: DIR/quantized")
    arguments = parser.parse_args()
    device, source = choose_device(arguments.device), fetch(arguments.data)
    train_documents, val_documents = load_documents(source)
    folders = make_all(arguments, train_documents, device, arguments.out / "quantized")
    rows = measure(folders, val_documents, device, arguments.rounds)
    name = "evaluate" if device == "cpu" else f"evaluate_{device}"
    draw(rows, FIGURES / f"{name}.png")
    # "": it has none.
    rows = [dict.fromkeys(COLUMNS, "") | row | {"bits_per_byte": f"{row['bits_per_byte']:.4f}"} for row in rows]
    command = " ".join([f"python {Path(__file__).resolve().parent.name}/evaluate.py", *sys.argv[1:]])
    print(write_results(name, command, COLUMNS, rows, device, source))


if __name__ == "__main__":
    run(main)
