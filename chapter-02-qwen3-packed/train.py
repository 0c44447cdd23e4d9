"""Train a Qwen3 on text or on conversations: one loop, top to bottom.

    python train.py        (in this folder)
    python train.py --init Qwen/Qwen3-0.6B --data conversations.jsonl --out out-chat

Writes to --out: the model (config.json, model.safetensors, tokenizer files), checkpoint/ for --resume, tensorboard/,
and summary.json with the numbers of the run.
"""
import itertools
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from attention import attention_path, compute_dtype
from checkpoint import load_model
from cli import ArgumentParser, InputError, positive, run, seed
from data import (IGNORE, fetch, learned_text, load_documents, num_bytes, pack, packed_sequence_collate_fn, tokenize,
                  training_packs)
from device import choose_device, device_name, peak_memory
from generate import generate
from model import CONFIGS, Transformer
from optimizer import Optimizer, adamw, schedule
from progress import Progress
from tokenizer import Tokenizer
from training_state import (checkpoint_to_resume, fingerprint, load_training_state, prepare_folder, save_checkpoint,
                            share_done)

SETTINGS = ("config", "init", "batch_tokens", "learning_rate", "seed")   # that make a run this run


def parse_arguments():
    parser = ArgumentParser(description="Train a Qwen3 on text or on conversations.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--init", metavar="DIR|HUB_ID",
                        help="start from pretrained weights and their tokenizer instead of --config; e.g."
                             " Qwen/Qwen3-0.6B")
    parser.add_argument("--batch-tokens", type=positive(int), default=512, metavar="T",
                        help="tokens that are computed together")
    parser.add_argument("--learning-rate", type=positive(float), metavar="LR",
                        help="highest learning rate (None: 3e-3 at width 128, less for wider models; 2e-5 with --init)")
    parser.add_argument("--steps", type=positive(int), metavar="N",
                        help="stop after N steps (2400 if --minutes is not given)")
    parser.add_argument("--minutes", type=positive(float), metavar="M", help="stop after M minutes")
    parser.add_argument("--save-every", type=positive(int), default=500, metavar="N",
                        help="steps between checkpoints, each with a quick validation and a sample")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed on the same machine gives the same run")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR", help="where to write")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --out")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.steps is None:
        arguments.steps = 2400
    if arguments.learning_rate is None:   # about 1 / width (Yang et al. 2022); a trained model needs care, not speed
        arguments.learning_rate = 2e-5 if arguments.init else 3e-3 * 128 / CONFIGS[arguments.config].hidden_size
    return arguments


def loss_sum(model, batch):
    """Nats over all targets of a PackedBatch, a scalar tensor."""
    device = batch.input_ids.device.type
    with torch.autocast(device, torch.bfloat16, enabled=compute_dtype(device) == torch.bfloat16):
        logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)   # (T, V)
        return F.cross_entropy(logits, batch.targets, ignore_index=IGNORE, reduction="sum")


def train_step(model, optimizer, batch, learning_rate):
    """Forward, backward, update. Returns what is to be reported of the step, {name: number or scalar tensor}."""
    device = next(model.parameters()).device
    optimizer.zero_grad()   # before the way forward: old gradients would take part in its peak
    # The mean over targets that count. Dividing by T instead would let the users' questions scale the gradient.
    loss = loss_sum(model, batch.to(device)) / (batch.targets != IGNORE).sum()
    loss.backward()
    norm = optimizer.step(learning_rate)
    return {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate}


@torch.no_grad()
def evaluate(model, documents, tokenizer, batch_tokens, device):
    """Validation: (nats per token, bits per byte) over every token of the documents, their ends included.

    Of a conversation, over what the assistant says.
    """
    model.eval()
    windows, _ = tokenize(documents, tokenizer, min(batch_tokens, model.config.max_position_embeddings))
    nats = tokens = 0
    for chosen in pack(windows, batch_tokens, range(len(windows))):
        batch = packed_sequence_collate_fn(chosen).to(device)
        nats += loss_sum(model, batch).item()
        tokens += (batch.targets != IGNORE).sum().item()
    model.train()
    if not math.isfinite(nats):   # the weights may be finite still, and large
        raise InputError(f"the training diverged: the loss on the validation documents is {nats}; a checkpoint is kept"
                         " as it was; try a lower --learning-rate")
    return nats / tokens, nats / math.log(2) / num_bytes(documents)


def start_new(arguments, train_documents, device):
    """Pretrained weights and their tokenizer, or a new tokenizer and a new model for it."""
    if arguments.init is not None:
        if Path(arguments.init).resolve() == arguments.out.resolve():
            raise InputError(f"--out {arguments.out} is what --init begins with, which would be overwritten; choose"
                             " another folder")
        model, tokenizer = load_model(arguments.init, device, torch.float32)
    else:
        preset = CONFIGS[arguments.config]
        tokenizer = Tokenizer.train(list(map(learned_text, train_documents)), preset.vocab_size)
        ends = [tokenizer.end_of_text, tokenizer.end_of_turn]
        model = Transformer(replace(preset, vocab_size=tokenizer.vocab_size, eos_token_id=ends)).to(device)
    if not all(isinstance(document, str) for document in train_documents):
        tokenizer.eos_token = "<|im_end|>"   # whoever opens the folder is to stop where the user's turn begins
    return model, tokenizer


def load_packs(arguments, documents, tokenizer, config):
    """The packs of a run, without end."""
    max_length = min(arguments.batch_tokens, config.max_position_embeddings)
    windows, cut = tokenize(documents, tokenizer, max_length)
    print(f"        {cut:,} of more than {max_length} tokens are cut into windows, {len(windows):,} in all")
    return training_packs(windows, arguments.batch_tokens, arguments.seed)


def next_batch(packs, model, state):
    """The next pack as a batch. Counts its tokens and FLOPs."""
    batch = packed_sequence_collate_fn(next(packs))
    state["tokens"] += len(batch.targets)
    state["flops"] += len(batch.targets) * model.flops_per_token(batch.cu_seqlens)
    return batch


def write_sample(model, tokenizer, document, tokens):
    """A text of the model's own, or where document is a conversation, its answer to the first message and that message.
    """
    prompt_ids, question = [tokenizer.end_of_text], ""
    if not isinstance(document, str):
        asked = list(itertools.takewhile(lambda message: message["role"] != "assistant", document))
        prompt_ids, _ = tokenizer.encode_conversation(asked, answer=True)
        question = "".join(f"{message['role']}: {message['content']}\n" for message in asked)
    text = question + tokenizer.decode(generate(model, tokenizer, prompt_ids, tokens))
    model.train()
    return text


def write_summary(arguments, state, model, source, device, dtype, nats, bits):
    """summary.json: the same keys in every chapter, so that any two runs compare. null: not known yet."""
    summary = {
        "chapter": Path(__file__).parent.name, "config": arguments.init or arguments.config,
        "parameters": model.num_parameters(),
        "data": str(source), "steps": state["step"], "tokens": state["tokens"], "wall_seconds": state["seconds"],
        "tokens_per_second": state["tokens"] / state["train_seconds"],   # training steps only
        "peak_memory_bytes": peak_memory(device), "val_loss": nats, "val_bits_per_byte": bits,
        "flops_per_token": state["flops"] / state["tokens"],
        "mfu": None,                                           # needs the machine's ceiling: chapter 3
        "device": device, "device_name": device_name(device), "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__, "seed": arguments.seed}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


def main():
    # ------------------------------------------------------------------------------------------------- set-up
    start = time.perf_counter()
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    dtype = compute_dtype(device)
    prepare_folder(arguments.out)
    torch.manual_seed(arguments.seed)
    source = fetch(arguments.data)
    train_documents, val_documents = load_documents(source)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {"data": str(source), "documents": fingerprint(train_documents + val_documents)}

    checkpoint = checkpoint_to_resume(arguments.out) if arguments.resume else None
    model, tokenizer = load_model(checkpoint, device) if checkpoint else start_new(arguments, train_documents, device)
    optimizer = Optimizer(model, adamw(model, arguments.learning_rate))
    state = load_training_state(checkpoint, optimizer, settings, arguments)

    print(f"data    {source}: {len(train_documents):,} documents to train on, {len(val_documents):,} to validate")
    packs = load_packs(arguments, train_documents, tokenizer, model.config)
    packs = itertools.islice(packs, state["step"], None)   # a resumed run has had the first ones
    print(f"model   {arguments.init or arguments.config}: {model.num_parameters():,} parameters,"
          f" {tokenizer.vocab_size:,} tokens")
    print(f"device  {device} ({device_name(device)}), {dtype}; {attention_path(device, dtype)}")

    # --------------------------------------------------------------------------------------------------- loop
    start -= state["seconds"]   # time spent before the resume counts too
    with Progress(arguments.out, arguments.steps, state["step"]) as progress:
        while True:
            state["seconds"] = time.perf_counter() - start
            done = state["progress"] = share_done(arguments, state)
            if done >= 1 and state["step"] > 0:
                break

            step_start = time.perf_counter()
            batch = next_batch(packs, model, state)
            report = train_step(model, optimizer, batch, arguments.learning_rate * schedule(done))

            state["step"] += 1
            filling = state["tokens"] / state["step"] / arguments.batch_tokens
            shown = {"loss": f"{report['loss'].item():.3f}", "packed": f"{filling:.1%}"}
            state["train_seconds"] += time.perf_counter() - step_start   # after loss.item(), which waits for the GPU
            progress.step(state["step"], shown, report)

            if state["step"] % arguments.save_every == 0:
                _, bits = evaluate(model, val_documents[::8], tokenizer, arguments.batch_tokens, device)
                save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
                progress.validation(bits, write_sample(model, tokenizer, val_documents[0], 60))

    # ------------------------------------------------------------------------------------------------- report
    nats, bits = evaluate(model, val_documents, tokenizer, arguments.batch_tokens, device)
    state["seconds"] = time.perf_counter() - start
    save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
    summary = write_summary(arguments, state, model, source, device, dtype, nats, bits)
    print(write_sample(model, tokenizer, val_documents[0], 200), end="\n\n")
    progress.finish(settings | {"steps": state["step"]}, summary)
    prompt = '"ROMEO:" 200' if isinstance(val_documents[0], str) else '--chat "..." 200'
    print(f"talk to it: python {Path(__file__).parent.name}/generate.py {prompt} --checkpoint {arguments.out}")


if __name__ == "__main__":
    run(main)
