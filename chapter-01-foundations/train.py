"""Train a GPT on text: one loop, top to bottom.

    python train.py        (in this folder)
    python train.py --tokenizer char --minutes 5 --out out-char

Writes to --out: the model (config.json, model.safetensors, tokenizer.json), checkpoint/ for --resume, tensorboard/, and
summary.json with the numbers of the run.
"""
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from checkpoint import load_model
from cli import ArgumentParser, InputError, positive, run, seed
from data import (IGNORE, fetch, load_documents, num_bytes, padded_collate_fn, tokenize, train_tokenizer,
                  training_windows)
from device import choose_device, device_name, peak_memory
from generate import generate
from model import CONFIGS, Transformer
from optimizer import Optimizer, adamw, schedule
from progress import Progress
from training_state import (checkpoint_to_resume, fingerprint, load_training_state, prepare_folder, save_checkpoint,
                            share_done)

SETTINGS = ("config", "tokenizer", "batch_size", "learning_rate", "seed")   # that make a run this run


def parse_arguments():
    parser = ArgumentParser(description="Train a GPT on text.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--tokenizer", choices=("bpe", "char"), default="bpe", help="byte pairs or single characters")
    parser.add_argument("--batch-size", type=positive(int), default=16, metavar="B", help="documents per step")
    parser.add_argument("--learning-rate", type=positive(float), default=3e-3, metavar="LR",
                        help="highest learning rate")
    parser.add_argument("--steps", type=positive(int), metavar="N",
                        help="stop after N steps (1500 if --minutes is not given)")
    parser.add_argument("--minutes", type=positive(float), metavar="M", help="stop after M minutes")
    parser.add_argument("--save-every", type=positive(int), default=250, metavar="N",
                        help="steps between checkpoints, each with a quick validation and a sample")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed on the same machine gives the same run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR", help="where to write")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --out")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.steps is None:
        arguments.steps = 1500
    return arguments


def loss_sum(model, batch):
    """Nats over all real targets of a PaddedBatch, a scalar tensor."""
    logits = model(batch.input_ids)                                                      # (B, L, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")


def train_step(model, optimizer, batch, learning_rate):
    """Forward, backward, update. Returns what is to be reported of the step, {name: number or scalar tensor}."""
    optimizer.zero_grad()   # before the way forward: old gradients would take part in its peak
    # The mean over real targets. Dividing by B * L instead would let the padding scale the gradient.
    loss = loss_sum(model, batch) / (batch.targets != IGNORE).sum()
    loss.backward()
    norm = optimizer.step(learning_rate)
    return {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate}


@torch.no_grad()
def evaluate(model, documents, tokenizer, device):
    """Validation: (nats per token, bits per byte) over every token of the documents, their ends included."""
    model.eval()
    windows, _ = tokenize(documents, tokenizer, model.config.max_position_embeddings)
    windows.sort(key=len)   # neighbours of equal length need little padding; the sum does not depend on the order
    nats = tokens = 0
    for start in range(0, len(windows), 32):
        batch = padded_collate_fn(windows[start:start + 32], tokenizer.padding).to(device)
        nats += loss_sum(model, batch).item()
        tokens += (batch.targets != IGNORE).sum().item()
    model.train()
    if not math.isfinite(nats):   # the weights may be finite still, and large
        raise InputError(f"the training diverged: the loss on the validation documents is {nats}; a checkpoint is kept"
                         " as it was; try a lower --learning-rate")
    return nats / tokens, nats / math.log(2) / num_bytes(documents)


def start_new(arguments, train_documents, val_documents, device):
    """A new tokenizer and a new model for it."""
    preset = CONFIGS[arguments.config]
    tokenizer = train_tokenizer(arguments.tokenizer, train_documents, val_documents, preset.vocab_size)
    config = replace(preset, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.padding)
    return Transformer(config).to(device), tokenizer


def write_sample(model, tokenizer, tokens):
    text = tokenizer.decode(generate(model, tokenizer, [], tokens))
    model.train()
    return text


def write_summary(arguments, state, model, source, device, nats, bits):
    """summary.json: the same keys in every chapter, so that any two runs compare. null: not known yet."""
    summary = {
        "chapter": Path(__file__).parent.name, "config": arguments.config, "parameters": model.num_parameters(),
        "data": str(source), "steps": state["step"], "tokens": state["tokens"], "wall_seconds": state["seconds"],
        "tokens_per_second": state["tokens"] / state["train_seconds"],   # training steps only, padding not counted
        "peak_memory_bytes": peak_memory(device), "val_loss": nats, "val_bits_per_byte": bits,
        "flops_per_token": state["flops"] / state["tokens"],   # what the padding cost is in here
        "mfu": None,                                           # needs the machine's ceiling: chapter 3
        "device": device, "device_name": device_name(device), "dtype": "float32", "torch": torch.__version__,
        "seed": arguments.seed}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


def main():
    # ------------------------------------------------------------------------------------------------- set-up
    start = time.perf_counter()
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    prepare_folder(arguments.out)
    torch.manual_seed(arguments.seed)
    source = fetch(arguments.data)
    train_documents, val_documents = load_documents(source)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {"data": str(source), "documents": fingerprint(train_documents + val_documents)}

    checkpoint = checkpoint_to_resume(arguments.out) if arguments.resume else None
    if checkpoint:
        model, tokenizer = load_model(checkpoint, device)
    else:
        model, tokenizer = start_new(arguments, train_documents, val_documents, device)
    optimizer = Optimizer(model, adamw(model, arguments.learning_rate))
    state = load_training_state(checkpoint, optimizer, settings, arguments)
    windows, cut = tokenize(train_documents, tokenizer, model.config.max_position_embeddings)

    print(f"data    {source}: {len(train_documents):,} documents to train on, {len(val_documents):,} to validate;"
          f" {cut:,} of more than {model.config.max_position_embeddings} tokens cut into windows, {len(windows):,}"
          " in all")
    print(f"model   {arguments.config}: {model.num_parameters():,} parameters, {tokenizer.vocab_size:,}"
          f" {tokenizer.kind} tokens")
    print(f"device  {device} ({device_name(device)}), float32 (chapter 4 uses less);"
          " attention as matrices of all scores (chapter 2 computes fewer)")

    # --------------------------------------------------------------------------------------------------- loop
    start -= state["seconds"]   # time spent before the resume counts too
    with Progress(arguments.out, arguments.steps, state["step"]) as progress:
        while True:
            state["seconds"] = time.perf_counter() - start
            done = state["progress"] = share_done(arguments, state)
            if done >= 1 and state["step"] > 0:
                break

            step_start = time.perf_counter()
            batch = padded_collate_fn(
                training_windows(windows, arguments.batch_size, arguments.seed, state["step"]),
                tokenizer.padding).to(device)
            report = train_step(model, optimizer, batch, arguments.learning_rate * schedule(done))

            B, L = batch.targets.shape
            state["step"] += 1
            state["tokens"] += (batch.targets != IGNORE).sum().item()
            state["positions"] += B * L
            state["flops"] += B * L * model.flops_per_position(L)
            shown = {"loss": f"{report['loss'].item():.3f}",
                     "padding": f"{1 - state['tokens'] / state['positions']:.0%}"}
            state["train_seconds"] += time.perf_counter() - step_start   # after loss.item(), which waits for the GPU
            progress.step(state["step"], shown, report)

            if state["step"] % arguments.save_every == 0:
                _, bits = evaluate(model, val_documents[::8], tokenizer, device)
                save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
                progress.validation(bits, write_sample(model, tokenizer, 60))

    # ------------------------------------------------------------------------------------------------- report
    nats, bits = evaluate(model, val_documents, tokenizer, device)
    state["seconds"] = time.perf_counter() - start
    save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
    summary = write_summary(arguments, state, model, source, device, nats, bits)
    print(write_sample(model, tokenizer, 200), end="\n\n")
    progress.finish(settings | {"steps": state["step"]}, summary,
                    f"; {1 - state['tokens'] / state['positions']:.0%} of all positions were padding")
    print(f'talk to it: python {Path(__file__).parent.name}/generate.py "ROMEO:" 200 --checkpoint {arguments.out}')


if __name__ == "__main__":
    run(main)
