"""124 million parameters on ten billion tokens, on one GPU: what it takes, and the run.

    python chapter-03-profiling/pretrain_124m.py --plan      at once; writes results/pretrain_124m.json
    python data/download.py fineweb-edu                      28.5 GB
    python chapter-03-profiling/pretrain_124m.py             a day on an A100, a third of that on an H100

The plan is arithmetic: FLOPs by flops.py, the loss by published scaling laws, the hours at a stated MFU. The run reads
each text once. Ten billion tokens fit into no list, so the texts come as a stream: a thousand at a time are cut into
tokens, shuffled and packed, while the GPU computes. GPT-2's tokens, which tiktoken downloads: a vocabulary of 151,936
would be more than half of so small a model.
"""
import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet   # comes with `datasets`, which writes such files
import tiktoken
import torch

from attention import compute_dtype
from checkpoint import load_model
from cli import ArgumentParser, InputError, positive, run
from compiler import check_compiler
from data import DATA, fill, pack, packed_sequence_collate_fn, shuffled, tokenize
from device import choose_device, keep_memory
from flops import num_parameters, total_flops
from model import ModelConfig, Transformer
from optimizer import Optimizer, adamw, schedule
from progress import Progress
from results import write_results
from tokenizer import SPECIAL_TOKENS, Tokenizer
from train import evaluate, loss_sum, train_step, write_sample, write_summary
from training_state import (checkpoint_to_resume, fingerprint, load_training_state, prepare_folder,
                            save_checkpoint)

# GPT-2's size with Qwen3's parts. 50,259 tokens, rounded up: a GPU likes multiples of 64.
CONFIG = ModelConfig(vocab_size=50_304, hidden_size=768, intermediate_size=2304, num_hidden_layers=12,
                     num_attention_heads=12, num_key_value_heads=6, head_dim=64)
CHUNK = 1000        # texts that are shuffled together
VALIDATION = 1000   # the first texts, about a million tokens


# --------------------------------------------------------------------------------------------------------- the plan

# E, A, alpha, B, beta of L = E + A / N^alpha + B / D^beta, nats a token of their own text and tokenizer.
LAWS = {"Hoffmann et al. 2022": (1.69, 406.4, 0.34, 410.7, 0.28),
        "Besiroglu et al. 2024, the same runs fitted anew": (1.8172, 482.01, 0.3478, 2085.43, 0.3658)}
GPUS = {"A100": 312e12, "H100": 989e12}   # FLOP/s in bf16, from the data sheets
MFU = 0.4


def plan(tokens):
    """Rows (what, value) of what a run of so many tokens takes and should give."""
    N, length = num_parameters(CONFIG), CONFIG.max_position_embeddings
    flops = total_flops(CONFIG, torch.tensor([0, length])) / length   # of a token of a text that fills the context
    rows = [("parameters, millions", N / 1e6), ("tokens, billions", tokens / 1e9),
            ("tokens for each parameter", tokens / N), ("GFLOPs a token, in texts of 1,024", flops / 1e9),
            ("FLOPs of the run, 10^18", flops * tokens / 1e18)]
    rows += [(f"nats a token by {paper}", E + A / N ** alpha + B / tokens ** beta)
             for paper, (E, A, alpha, B, beta) in LAWS.items()]
    return rows + [(f"hours on one {gpu} at {MFU:.0%} of {peak / 1e12:.0f} TFLOP/s", flops * tokens / MFU / peak / 3600)
                   for gpu, peak in GPUS.items()]


# --------------------------------------------------------------------------------------------------------- the data

def texts(folder, start):
    """The texts of a folder's Parquet files in the order of their names, from number `start` on."""
    for path in sorted(folder.rglob("*.parquet")):
        try:
            file = pyarrow.parquet.ParquetFile(path)
            if start >= file.metadata.num_rows:   # no need to read it
                start -= file.metadata.num_rows
                continue
            for rows in file.iter_batches(CHUNK, columns=["text"]):
                yield from rows["text"].to_pylist()[start:]
                start = max(0, start - len(rows))
        except (pyarrow.ArrowException, OSError, KeyError) as error:
            raise InputError(f"{path} is damaged or has no column text: {str(error).partition(chr(10))[0]}") from None


def stream_packs(folder, tokenizer, batch_tokens, place):
    """Yield (pack, place behind it). place [n, k]: k packs of the chunk that begins with text n have been taken.

    So a resumed run reads one chunk again, not all that came before. A thread cuts the next chunk while the GPU is busy
    with this one.
    """
    def cut():
        chunk = list(itertools.islice(stream, CHUNK))
        return len(chunk), tokenize(chunk, tokenizer, min(batch_tokens, CONFIG.max_position_embeddings))[0]

    start, taken = place
    stream = texts(folder, start)
    with ThreadPoolExecutor(1) as thread:
        following = thread.submit(cut)
        while (chunk := following.result())[0]:
            following = thread.submit(cut)
            number, windows = chunk
            packs = pack(windows, batch_tokens, shuffled(len(windows), 0, start))
            for k, chosen in enumerate(packs, start=1):
                if k > taken:
                    yield sorted(chosen, key=lambda window: len(window[0])), [start, k]
            start, taken = start + number, 0


# ---------------------------------------------------------------------------------------------------------- the run

def gpt2_tokenizer():
    encoding = tiktoken.get_encoding("gpt2")
    ranks = encoding._mergeable_ranks
    return Tokenizer(ranks, {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)},
                     pattern=encoding._pat_str)


def parse_arguments():
    parser = ArgumentParser(description="Train 124 million parameters on ten billion tokens: a day on an A100.")
    parser.add_argument("--plan", action="store_true", help="only say what it takes, and write it to results/")
    parser.add_argument("--data", type=Path, default=DATA / "fineweb-edu", metavar="DIR",
                        help="a folder of Parquet files with a column text")
    parser.add_argument("--tokens", type=positive(float), default=1e10, metavar="N", help="tokens to train on")
    parser.add_argument("--batch-tokens", type=positive(int), default=32_768, metavar="T",
                        help="tokens that are computed together; 32,768 take about 40 GB")
    parser.add_argument("--learning-rate", type=positive(float), default=6e-4, metavar="LR",
                        help="highest learning rate")
    parser.add_argument("--save-every", type=positive(int), default=2000, metavar="N",
                        help="steps between checkpoints, each with a validation")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out-124m", metavar="DIR",
                        help="where to write")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --out")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    if arguments.plan:
        rows = [dict(zip(("what", "value"), row)) for row in plan(arguments.tokens)]
        print(write_results("pretrain_124m", "python chapter-03-profiling/pretrain_124m.py --plan",
                            {"what": "what", "value": "value"}, rows))
        return
    # ------------------------------------------------------------------------------------------------- set-up
    start = time.perf_counter()
    keep_memory()
    device = choose_device(arguments.device)
    if device != "cpu":
        check_compiler(device)
    prepare_folder(arguments.out)
    torch.manual_seed(0)
    val_documents = list(itertools.islice(texts(arguments.data, 0), VALIDATION))
    if len(val_documents) < VALIDATION:
        raise InputError(f"--data {arguments.data}: {len(val_documents)} texts in Parquet files are not enough; python"
                         " data/download.py fineweb-edu fetches ten billion tokens")
    checkpoint = checkpoint_to_resume(arguments.out) if arguments.resume else None
    if checkpoint:
        model, tokenizer = load_model(checkpoint, device)
    else:
        tokenizer = gpt2_tokenizer()
        model = Transformer(replace(CONFIG, eos_token_id=tokenizer.end_of_text)).to(device)
    optimizer = Optimizer(model, adamw(model, arguments.learning_rate, weight_decay=0.1))
    arguments.steps, arguments.minutes = math.ceil(arguments.tokens / arguments.batch_tokens), None
    arguments.init, arguments.config, arguments.seed = None, "124m", 0   # for the summary, as train.py has them
    settings = {name: getattr(arguments, name) for name in ("init", "config", "batch_tokens", "learning_rate")}
    settings |= {"data": str(arguments.data), "documents": fingerprint(val_documents)}
    state = {"place": [VALIDATION, 0]} | load_training_state(checkpoint, optimizer, settings, arguments)

    # --------------------------------------------------------------------------------------------------- loop
    start -= state["seconds"]
    loss_of = loss_sum if device == "cpu" else torch.compile(loss_sum, fullgraph=True)
    packs = stream_packs(arguments.data, tokenizer, arguments.batch_tokens, state["place"])
    with Progress(arguments.out, arguments.steps, state["step"]) as progress:
        while state["tokens"] < arguments.tokens:
            step_start = time.perf_counter()
            chosen, state["place"] = next(packs, (None, None))
            if chosen is None:
                raise InputError(f"--data {arguments.data} ends after {state['tokens']:,} tokens, and none is read"
                                 " twice; the last checkpoint is kept; give a smaller --tokens")
            batch = packed_sequence_collate_fn(chosen)
            state["progress"] = state["tokens"] / arguments.tokens
            report = train_step(model, optimizer, fill(batch, arguments.batch_tokens),
                                arguments.learning_rate * schedule(state["progress"]), loss_of)
            state["step"] += 1
            state["tokens"] += len(batch.targets)
            state["flops"] += total_flops(model.config, batch.cu_seqlens)
            progress.step(state["step"], {"loss": f"{report['loss'].item():.3f}"}, report)
            now = time.perf_counter()
            state["train_seconds"] += now - step_start
            state["seconds"] = now - start
            if state["step"] % arguments.save_every == 0:
                _, bits = evaluate(model, val_documents, tokenizer, arguments.batch_tokens, device)
                save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
                progress.validation(bits, write_sample(model, tokenizer, val_documents[0], 60))

    # ------------------------------------------------------------------------------------------------- report
    nats, bits = evaluate(model, val_documents, tokenizer, arguments.batch_tokens, device)
    state["seconds"] = time.perf_counter() - start
    save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
    summary = write_summary(arguments, state, model, arguments.data, device, compute_dtype(device), nats, bits)
    progress.finish(settings | {"steps": state["step"]}, summary)


if __name__ == "__main__":
    run(main)
