"""The same documents, the same weights, the same step, four ways: padded and packed, this chapter and `transformers`.

    python benchmark_padding.py                          small configuration, a few minutes   (in this folder)
    python benchmark_padding.py --config qwen3-0.6b --batch-tokens 512 --packs 3      24 GB; 15 minutes on two cores
    python benchmark_padding.py --config qwen3-0.6b --padding-free --packs 3          twice the tokens in less memory

A useful token is one that a document contains; padding is none. FLOPs per useful token count all that a way computes
for it, padding included: their ratio is the prediction, that of the tokens per second the measurement. Each step is a
whole training step: forward, backward, gradient norm, AdamW. The four ways take turns, so that a slow minute of the
machine falls on all of them, and before the clock starts they must give the same loss. Writes
results/benchmark_CONFIG_DEVICE.json.

`transformers` is here to be compared with. Nothing else in this chapter imports it.
"""
import itertools
import json
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from attention import compute_dtype
from cli import ArgumentParser, positive, run
from data import IGNORE, fetch, learned_text, load_documents, packed_sequence_collate_fn, tokenize, training_packs
from device import choose_device
from flops import total_flops
from model import CONFIGS, Transformer
from optimizer import adamw
from results import write_results
from tokenizer import Tokenizer

try:
    from transformers import Qwen3Config, Qwen3ForCausalLM
except ModuleNotFoundError:
    print("error: transformers is not installed: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

# bf16 without sparsity, from the makers' data sheets. MFU on a CPU waits for chapter 3, which measures the ceiling.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


# ------------------------------------------------------------------------------------- the four ways to see a pack

def pad(documents):
    """Documents of a pack as the rows of a rectangle: (input_ids (S, L), targets (S, L), mask (S, L))."""
    L = max(len(input_ids) for input_ids, _ in documents)
    input_ids = torch.tensor([ids + [0] * (L - len(ids)) for ids, _ in documents])
    targets = torch.tensor([targets + [IGNORE] * (L - len(targets)) for _, targets in documents])
    return input_ids, targets, torch.tensor([[1] * len(ids) + [0] * (L - len(ids)) for ids, _ in documents])


def lengths_of(documents):
    return [len(input_ids) for input_ids, _ in documents]


def rectangle(documents):
    """The lengths of a pack's documents once they are padded: all as long as the longest."""
    return [max(lengths_of(documents))] * len(documents)


def packed(model, reference, documents, device):
    batch = packed_sequence_collate_fn(documents).to(device)
    return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen), batch.targets


def padded(model, reference, documents, device):
    """A rectangle, through this chapter's model: every document is as long as the longest."""
    input_ids, targets, _ = pad(documents)
    rows = [(ids, targets) for ids, targets in zip(input_ids.tolist(), targets.tolist())]
    return packed(model, reference, rows, device)


def transformers_padded(model, reference, documents, device):
    input_ids, targets, mask = (x.to(device) for x in pad(documents))
    return reference(input_ids=input_ids, attention_mask=mask).logits.flatten(0, 1), targets.flatten()


def transformers_padding_free(model, reference, documents, device):
    """One row of all documents. transformers sees from position_ids where each begins, and masks the others out."""
    batch = packed_sequence_collate_fn(documents).to(device)
    logits = reference(input_ids=batch.input_ids[None], position_ids=batch.position_ids[None]).logits
    return logits[0], batch.targets


def in_one(documents):
    """transformers computes all T * T scores of a row and masks most of them out: to attention it is one document."""
    return [sum(lengths_of(documents))]


# How each way computes the logits, and the lengths of what it computes attention over.
MODES = {"transformers, padded": (transformers_padded, rectangle),
        "transformers, padding-free": (transformers_padding_free, in_one),
        "this model, padded": (padded, rectangle),
        "this chapter: packed": (packed, lengths_of)}


# ------------------------------------------------------------------------------------------------------ one step

def loss_of(way, model, reference, documents, device):
    """Nats per target of a pack, a scalar tensor."""
    with torch.autocast(device, torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16):
        logits, targets = way(model, reference, documents, device)
        return F.cross_entropy(logits, targets, ignore_index=IGNORE)


def step(way, model, reference, optimizer, documents, device):
    """One training step; returns its seconds."""
    start = time.perf_counter()
    loss = loss_of(way, model, reference, documents, device)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    loss.item()   # waits for the GPU
    return time.perf_counter() - start


def share_weights(model):
    """transformers' Qwen3 around the very parameters of ours: the same weights, and the memory of one model."""
    config = {name: value for name, value in vars(model.config).items() if name != "rope_theta"}
    with torch.device("meta"):
        reference = Qwen3ForCausalLM(Qwen3Config(
            **config, attn_implementation="sdpa", use_cache=False,
            rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta}))
    reference.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config)   # its buffers are not weights
    return reference.to(next(model.parameters()).device)


def build(config_name, device):
    torch.manual_seed(0)
    model = Transformer(CONFIGS[config_name]).to(device)
    return model, share_weights(model), adamw(model, 1e-4)


def first_packs(config, source, budget, number):
    """The first packs of a training run, made of the training documents; the small BPE tokens serve both
    configurations.
    """
    train_documents, _ = load_documents(source)
    tokenizer = Tokenizer.train(list(map(learned_text, train_documents)), CONFIGS["small"].vocab_size)
    windows, _ = tokenize(train_documents, tokenizer, min(budget, CONFIGS[config].max_position_embeddings))
    return list(itertools.islice(training_packs(windows, budget, seed=0), number))


# ------------------------------------------------------------------------------------------------------- measuring

def check_equal_losses(ways, model, reference, documents, device):
    losses = {name: loss_of(way, model, reference, documents, device).item() for name, (way, _) in ways.items()}
    print("losses  " + ", ".join(f"{name}: {loss:.5f}" for name, loss in losses.items()))
    tolerance = 1e-4 if compute_dtype(device) == torch.float32 else 2e-2
    assert max(losses.values()) - min(losses.values()) < tolerance, f"they disagree: {losses}"


def peak_of(name, arguments, documents):
    """Peak of the memory that torch holds, in bytes, from the first weight to the end of the second step one way."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        built = build(arguments.config, arguments.device)
        for _ in range(2):
            step(MODES[name][0], *built, documents, arguments.device)
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated()
    with tempfile.TemporaryDirectory() as folder:   # on a CPU only the trace has the running sum
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    sums = [event["args"] for event in events if event.get("name") == "[memory]"]
    # What an earlier profile saw begin and not end is still in the sum.
    before = sums[0]["Total Allocated"] - sums[0]["Bytes"]
    return max(now["Total Allocated"] for now in sums) - before


def flops_per_useful_token(model, packs, computed):
    """Training FLOPs with the full count of attention, all that computed(documents) names, over the tokens that count.
    """
    flops = 0
    for documents in packs:
        cu_seqlens = torch.tensor([0, *computed(documents)]).cumsum(0)
        flops += total_flops(model.config, cu_seqlens)
    return flops / sum(sum(lengths_of(documents)) for documents in packs)


def measure(arguments, ways, packs):
    """One row for each of the ways: useful tokens per second over all packs, FLOPs, padding, peak memory.

    No median: the packs with a long document are the expensive ones for those who pad, and belong into the count.
    """
    largest = max(packs, key=lambda pack: sum(rectangle(pack)))
    # Each in a process of its own, which takes along what it leaves behind: a large model and its pieces.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = dict(zip(ways, pool.starmap(peak_of, [(name, arguments, largest) for name in ways], chunksize=1)))
    built = build(arguments.config, arguments.device)
    check_equal_losses(ways, *built[:2], packs[0], arguments.device)
    seconds = dict.fromkeys(ways, 0)
    for way, _ in ways.values():
        step(way, *built, packs[0], arguments.device)   # to warm up
    for documents in packs:
        for name, (way, _) in ways.items():
            seconds[name] += step(way, *built, documents, arguments.device)
    useful = sum(sum(lengths_of(documents)) for documents in packs)
    peak_flops = next((flops for name, flops in PEAK_FLOPS.items()
                       if arguments.device == "cuda" and name in torch.cuda.get_device_name()), None)
    needed = flops_per_useful_token(built[0], packs, lengths_of)
    rows = []
    for name, (_, computed) in ways.items():
        rate = useful / seconds[name]
        row = {"way": name, "tokens_per_second": rate,
               "mflops": flops_per_useful_token(built[0], packs, computed) / 1e6,
               "padding": f"{1 - useful / sum(sum(computed(documents)) for documents in packs):.0%}",
               "peak_mib": peaks[name] / 2 ** 20, "speed_padding_free": seconds["transformers, padding-free"]
               / seconds[name]}
        if "transformers, padded" in ways:
            row["speed"] = seconds["transformers, padded"] / seconds[name]
        if peak_flops:
            row["mfu"] = rate * needed / peak_flops   # useful FLOPs only: padding is no use
        rows.append(row)
    return rows


def parse_arguments():
    parser = ArgumentParser(description="Padded and packed training, this chapter's and that of transformers, side"
                                        " by side.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--batch-tokens", type=positive(int), default=1024, metavar="T", help="useful tokens per step")
    parser.add_argument("--packs", type=positive(int), default=30, metavar="N", help="steps of each way")
    parser.add_argument("--padding-free", action="store_true",
                        help="only the ways without padding: they need less memory")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    arguments.device = choose_device(arguments.device)
    source = fetch(arguments.data)
    packs = first_packs(arguments.config, source, arguments.batch_tokens, arguments.packs)
    ways = {name: way for name, way in MODES.items() if not (arguments.padding_free and "padded" in name)}
    rows = measure(arguments, ways, packs)
    for row in rows:
        print(f"{row['way']:<26} {row['tokens_per_second']:>9,.0f} useful tokens/s  {row['mflops']:>8,.2f} MFLOPs each"
              f"  {row['padding']:>4} padding  {row['peak_mib']:>8,.0f} MiB  {row['speed_padding_free']:.2f}x"
              " padding-free"
              + (f"  {row['speed']:.2f}x padded" if "speed" in row else ""))
    columns = {"way": "way", "padding": "padding", "mflops": "MFLOPs per useful token",
               "tokens_per_second": "useful tokens/s", "peak_mib": "peak MiB",
               "speed_padding_free": "times `transformers` padding-free"}
    if not arguments.padding_free:
        columns["speed"] = "times `transformers` padded"
    if arguments.device == "cuda":
        columns["mfu"] = "MFU"
    command = " ".join([f"python {Path(__file__).resolve().parent.name}/benchmark_padding.py", *sys.argv[1:]])
    name = f"benchmark_{arguments.config}_{arguments.device}" + "_padding_free" * arguments.padding_free
    print(write_results(name, command, columns, rows, arguments.device, source))


if __name__ == "__main__":
    run(main)
