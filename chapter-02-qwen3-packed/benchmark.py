"""The same documents, the same weights, the same step, four ways: padded and packed, this chapter and `transformers`.

    python benchmark.py                          small configuration, a few minutes   (in this folder)
    python benchmark.py --config qwen3-0.6b      Qwen3 0.6B with random weights: 24 GB of memory; on two cores, 15 minutes

A useful token is one that a document contains; padding is none. Each step is a whole training step: forward, backward,
gradient norm, AdamW. The four ways take turns, so that a slow minute of the machine falls on all of them, and before the
clock starts they must give the same loss. Writes results/benchmark_CONFIG_DEVICE.json.

`transformers` is here to be compared with. Nothing else in this chapter imports it.
"""
import itertools
import json
import os
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from transformers import Qwen3Config, Qwen3ForCausalLM

from data import IGNORE, fetch, load_documents, packed_sequence_collate_fn, tokenize, training_packs
from errors import ArgumentParser, InputError, positive, run
from model import CONFIGS, Transformer
from report import write_results
from tokenizer import Tokenizer
from train import adamw, choose_device, compute_dtype, peak_memory

# bf16 without sparsity, from the makers' data sheets. MFU on a CPU waits for chapter 3, which measures the ceiling.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


# ------------------------------------------------------------------------------------- the four ways to see a pack

def pad(documents):
    """Documents of a pack as the rows of a rectangle: (input_ids (S, L), targets (S, L), mask (S, L))."""
    L = max(len(input_ids) for input_ids, _ in documents)
    input_ids = torch.tensor([ids + [0] * (L - len(ids)) for ids, _ in documents])
    targets = torch.tensor([targets + [IGNORE] * (L - len(targets)) for _, targets in documents])
    return input_ids, targets, torch.tensor([[1] * len(ids) + [0] * (L - len(ids)) for ids, _ in documents])


def packed(model, reference, documents, device):
    batch = packed_sequence_collate_fn(documents).to(device)
    return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen), batch.targets


def padded(model, reference, documents, device):
    """Chapter 1's rectangle through this chapter's model: every document is as long as the longest."""
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


WAYS = {"transformers, padded": transformers_padded, "transformers, padding-free": transformers_padding_free,
        "this model, padded as in chapter 1": padded, "this chapter: packed": packed}


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
    """The first packs of a training run, made of the training documents; the small BPE tokens serve both configurations."""
    train_documents, _ = load_documents(source)
    tokenizer = Tokenizer.train(train_documents, CONFIGS["small"].vocab_size)
    windows, _ = tokenize(train_documents, tokenizer, min(budget, CONFIGS[config].max_position_embeddings))
    return list(itertools.islice(training_packs(windows, budget, seed=0), number))


# ------------------------------------------------------------------------------------------------------- measuring

def check_equal_losses(model, reference, documents, device):
    losses = {name: loss_of(way, model, reference, documents, device).item() for name, way in WAYS.items()}
    print("losses  " + ", ".join(f"{name}: {loss:.5f}" for name, loss in losses.items()))
    tolerance = 1e-4 if compute_dtype(device) == torch.float32 else 2e-2
    assert max(losses.values()) - min(losses.values()) < tolerance, f"the four ways disagree: {losses}"


def peak_of(way, arguments, documents):
    """Peak memory in bytes of two steps one way. On a CPU that is known for whole processes only: this one starts another."""
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        built = build(arguments.config, "cuda")
        for _ in range(2):
            step(WAYS[way], *built, documents, "cuda")
        return peak_memory("cuda")
    done = subprocess.run([sys.executable, __file__, "--config", arguments.config, "--memory-of", way],
                          input=json.dumps(documents), text=True, stdout=subprocess.PIPE, check=True)
    return int(done.stdout)


def memory_of(way, config):
    """What peak_of starts: two steps on the documents of standard input, the peak to standard output."""
    documents = json.load(sys.stdin)
    built = build(config, "cpu")
    for _ in range(2):
        step(WAYS[way], *built, documents, "cpu")
    print(peak_memory("cpu"))


def utilization(tokens_per_second, model, packs, device):
    """Model FLOPs utilization with the full count of attention, or None where the ceiling is unknown."""
    peak = next((flops for name, flops in PEAK_FLOPS.items() if device == "cuda" and name in torch.cuda.get_device_name()), None)
    cu_seqlens = packed_sequence_collate_fn(list(itertools.chain.from_iterable(packs))).cu_seqlens
    return peak and tokens_per_second * model.flops_per_token(cu_seqlens) / peak


def measure(arguments, packs):
    """One row for each way: useful tokens per second (median of the packs), padding, peak memory."""
    built = build(arguments.config, arguments.device)
    check_equal_losses(*built[:2], packs[0], arguments.device)
    seconds = {name: [] for name in WAYS}
    for name, way in WAYS.items():
        step(way, *built, packs[0], arguments.device)   # to warm up
    for documents in packs:
        for name, way in WAYS.items():
            seconds[name].append(step(way, *built, documents, arguments.device))
    tokens = [sum(len(input_ids) for input_ids, _ in documents) for documents in packs]
    rates = {name: statistics.median(n / t for n, t in zip(tokens, taken)) for name, taken in seconds.items()}
    positions = [len(documents) * max(len(input_ids) for input_ids, _ in documents) for documents in packs]
    padding = 1 - sum(tokens) / sum(positions)
    mfu = {name: utilization(rate, built[0], packs, arguments.device) for name, rate in rates.items()}
    del built
    longest = max(packs, key=lambda documents: len(documents) * max(len(input_ids) for input_ids, _ in documents))
    return [{"way": name, "tokens_per_second": rate, "padding": f"{padding:.0%}" if "padded" in name else "0%",
             "peak_mib": peak_of(name, arguments, longest) / 2 ** 20, "mfu": mfu[name],
             "speed": rate / rates["transformers, padded"],
             "speed_padding_free": rate / rates["transformers, padding-free"]} for name, rate in rates.items()]


def parse_arguments():
    parser = ArgumentParser(description="Padded and packed training, this chapter's and that of transformers, side by side.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--batch-tokens", type=positive(int), default=1024, metavar="T", help="useful tokens per step")
    parser.add_argument("--packs", type=positive(int), default=30, metavar="N", help="steps of each way")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    parser.add_argument("--memory-of", choices=WAYS, help="for the benchmark's own use: peak memory of one way")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    arguments.device = choose_device(arguments.device)
    if arguments.memory_of:
        return memory_of(arguments.memory_of, arguments.config)
    packs = first_packs(arguments.config, fetch(arguments.data), arguments.batch_tokens, arguments.packs)
    rows = measure(arguments, packs)
    for row in rows:
        print(f"{row['way']:<36} {row['tokens_per_second']:>9,.0f} useful tokens/s  {row['padding']:>4} padding"
              f"  {row['peak_mib']:>8,.0f} MiB  {row['speed']:.2f}x padded  {row['speed_padding_free']:.2f}x padding-free")
    columns = {"way": "way", "tokens_per_second": "useful tokens/s", "padding": "padding", "peak_mib": "peak MiB",
               "speed": "times `transformers` padded", "speed_padding_free": "times `transformers` padding-free"}
    if arguments.device == "cuda":
        columns["mfu"] = "MFU"
    command = "python chapter-02-qwen3-packed/benchmark.py" + "".join(f" {argument}" for argument in sys.argv[1:])
    print(write_results(f"benchmark_{arguments.config}_{arguments.device}", command, columns, rows, arguments.device))


if __name__ == "__main__":
    run(main)
