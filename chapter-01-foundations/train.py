"""Train a GPT on text: one loop, top to bottom.

    python train.py        (in this folder)
    python train.py --tokenizer char --minutes 5 --out out-char

Writes to --out: the model (config.json, model.safetensors, tokenizer.json), checkpoint/ for --resume, tensorboard/, and
summary.json with the numbers of the run.
"""
import hashlib
import json
import math
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from checkpoint import complete_checkpoint, load_model, load_training_state, not_ours, save_checkpoint
from data import (IGNORE, BPETokenizer, CharTokenizer, fetch, load_documents, num_bytes, padded_collate_fn, tokenize,
                  training_windows)
from errors import ArgumentParser, InputError, positive, run, seed
from generate import generate
from model import CONFIGS, Transformer
from report import device_name


def parse_arguments():
    parser = ArgumentParser(description="Train a GPT on text.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--tokenizer", choices=("bpe", "char"), default="bpe", help="byte pairs or single characters")
    parser.add_argument("--batch-size", type=positive(int), default=16, metavar="B", help="documents per step")
    parser.add_argument("--learning-rate", type=positive(float), default=3e-3, metavar="LR", help="highest learning rate")
    parser.add_argument("--steps", type=positive(int), metavar="N", help="stop after N steps (1500 if --minutes is not given)")
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


def choose_device(name):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in available.items() if found)
    if not available[name]:
        raise InputError(f"--device {name}: this machine or this build of torch has none; use --device auto")
    return name


def prepare_folder(out):
    """Find out that --out cannot be written, or holds what is not ours, before an hour of training, not after."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
        found = not_ours(out)
    except OSError as error:
        raise InputError(f"--out {out} cannot be written: {error.strerror}") from None
    if found:
        raise InputError(f"--out {out} holds {found[0]}, which no run has written and this one would replace; choose another folder")


def adamw(model, learning_rate, weight_decay=0.1):
    """AdamW with weight decay on matrices only: pulling biases and norm weights towards zero helps nothing."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))


def schedule(progress, warmup=0.05, floor=0.1):
    """Share of the highest learning rate at progress (0 to 1 of the run): a linear rise, then half a cosine down to floor."""
    if progress < warmup:
        return max(progress, 0.001) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def progress(arguments, state):
    """Share of the run that is done, by its steps or by its minutes; 1 is the end."""
    return max(state["step"] / arguments.steps if arguments.steps else 0,
               state["seconds"] / 60 / arguments.minutes if arguments.minutes else 0)


def loss_sum(model, batch):
    """Nats over all real targets of a PaddedBatch, a scalar tensor."""
    logits = model(batch.input_ids)                                                      # (B, L, V)
    return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="sum")


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
        raise InputError(f"the training diverged: the loss on the validation documents is {nats}; a checkpoint is kept as it was;"
                         " try a lower --learning-rate")
    return nats / tokens, nats / math.log(2) / num_bytes(documents)


def peak_memory(device):
    """Highest memory use so far, in bytes: of the GPU, or of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")   # Linux; its ru_maxrss begins with the memory of whoever started this process
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss   # macOS counts it in bytes


def start_afresh(arguments, train_documents, val_documents, device):
    """A new tokenizer and a new model for it."""
    preset = CONFIGS[arguments.config]
    if arguments.tokenizer == "bpe":
        tokenizer = BPETokenizer.train(train_documents, preset.vocab_size)
    else:
        tokenizer = CharTokenizer.train(train_documents + val_documents)
    config = replace(preset, vocab_size=tokenizer.vocab_size, pad_token_id=tokenizer.padding)
    return Transformer(config).to(device), tokenizer


def check_settings(settings, saved, out):
    """A resumed run must be the same run. Only the budget (--steps, --minutes) may grow."""
    if saved.get("documents") == settings["documents"]:   # the same text, by whatever name
        saved = saved | {"data": settings["data"]}
    for name, value in settings.items():
        if saved.get(name) != value:
            raise InputError(f"--resume: the checkpoint in {out} has {name} {saved.get(name)}, this command has {value};"
                             " repeat the first command or choose another --out")


def print_resumed(arguments, state):
    """Where the run goes on. In a larger budget that is an earlier place of the schedule, with another learning rate."""
    print(f"resuming after step {state['step']}")
    before, now = state.get("progress", 0), progress(arguments, state)
    if now < before:
        last, following = (arguments.learning_rate * schedule(share) for share in (before, now))
        print(f"        the budget has grown: the schedule goes back from {before:.0%} to {now:.0%} of the run, and the learning rate"
              f" jumps from {last:.2g} to {following:.2g}")


def fingerprint(documents):
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]


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
    start = time.perf_counter()
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    prepare_folder(arguments.out)
    torch.manual_seed(arguments.seed)
    source = fetch(arguments.data)
    train_documents, val_documents = load_documents(source)
    settings = {name: getattr(arguments, name) for name in ("config", "tokenizer", "batch_size", "learning_rate", "seed")}
    settings |= {"data": str(source), "documents": fingerprint(train_documents + val_documents)}

    # state is everything that a resumed run must know besides weights, optimizer and random state.
    state = {"settings": settings, "step": 0, "tokens": 0, "positions": 0, "flops": 0, "train_seconds": 0, "seconds": 0}
    checkpoint = complete_checkpoint(arguments.out) if arguments.resume else None
    if checkpoint:
        model, tokenizer = load_model(checkpoint, device)
        optimizer = adamw(model, arguments.learning_rate)
        state = load_training_state(checkpoint, optimizer)
        check_settings(settings, state["settings"], arguments.out)
        print_resumed(arguments, state)
    else:
        if arguments.resume:
            print(f"no checkpoint in {arguments.out}: starting afresh")
        model, tokenizer = start_afresh(arguments, train_documents, val_documents, device)
        optimizer = adamw(model, arguments.learning_rate)
    windows, cut = tokenize(train_documents, tokenizer, model.config.max_position_embeddings)

    print(f"data    {source}: {len(train_documents):,} documents to train on, {len(val_documents):,} to validate;"
          f" {cut:,} of more than {model.config.max_position_embeddings} tokens cut into windows, {len(windows):,} in all")
    print(f"model   {arguments.config}: {model.num_parameters():,} parameters, {tokenizer.vocab_size:,} {tokenizer.kind} tokens")
    print(f"device  {device} ({device_name(device)}), float32 (chapter 4 uses less);"
          " attention as matrices of all scores (chapter 2 computes fewer)")
    for events in () if checkpoint else (arguments.out / "tensorboard").glob("events.out.tfevents.*"):
        events.unlink()   # the curves of an earlier run would mix with these
    writer = SummaryWriter(arguments.out / "tensorboard", purge_step=state["step"])
    bar = tqdm(total=arguments.steps, initial=state["step"], unit="step", dynamic_ncols=True)
    seen = {}                   # what the bar shows
    start -= state["seconds"]   # time spent before the resume counts too

    while True:
        state["seconds"] = time.perf_counter() - start
        state["progress"] = progress(arguments, state)
        if state["progress"] >= 1 and state["step"] > 0:
            break

        step_start = time.perf_counter()
        lr = arguments.learning_rate * schedule(state["progress"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        batch = padded_collate_fn(
            training_windows(windows, arguments.batch_size, arguments.seed, state["step"]), tokenizer.padding).to(device)
        # The mean over real targets. Dividing by B * L instead would let the padding scale the gradient.
        tokens = (batch.targets != IGNORE).sum()
        loss = loss_sum(model, batch) / tokens
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        B, L = batch.targets.shape
        state["step"] += 1
        state["tokens"] += tokens.item()
        state["positions"] += B * L
        state["flops"] += B * L * model.flops_per_position(L)
        seen |= {"loss": f"{loss.item():.3f}", "padding": f"{1 - state['tokens'] / state['positions']:.0%}"}
        state["train_seconds"] += time.perf_counter() - step_start   # after loss.item(), which waits for the GPU
        bar.update()
        bar.set_postfix(seen)
        for name, value in {"loss": loss, "gradient_norm": norm, "learning_rate": lr}.items():
            writer.add_scalar(f"train/{name}", value, state["step"])

        if state["step"] % arguments.save_every == 0:
            _, bits = evaluate(model, val_documents[::8], tokenizer, device)
            save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
            writer.add_scalar("validation/bits_per_byte_of_an_eighth", bits, state["step"])
            writer.add_text("sample", write_sample(model, tokenizer, 60), state["step"])
            seen["validation"] = f"{bits:.3f} bits per byte"
    bar.close()

    nats, bits = evaluate(model, val_documents, tokenizer, device)
    state["seconds"] = time.perf_counter() - start
    save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
    summary = write_summary(arguments, state, model, source, device, nats, bits)
    writer.add_hparams({**settings, "steps": state["step"]}, {"validation/bits_per_byte": bits}, run_name=".")
    writer.close()
    print(write_sample(model, tokenizer, 200), end="\n\n")
    print(f"{bits:.4f} bits per byte on the validation documents ({nats:.4f} nats per token) after {state['step']:,} steps,"
          f" {state['tokens']:,} tokens, {state['seconds']:.0f} s; {summary['tokens_per_second']:,.0f} tokens/s;"
          f" {1 - state['tokens'] / state['positions']:.0%} of all positions were padding")
    print(f'talk to it: python {Path(__file__).parent.name}/generate.py "ROMEO:" 200 --checkpoint {arguments.out}')


if __name__ == "__main__":
    run(main)
