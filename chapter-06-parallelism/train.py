"""Train a Qwen3 on text or on conversations: one loop, top to bottom.

    python train.py        (in this folder)
    torchrun --nproc_per_node 4 train.py --dp 2 --tp 2
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
from torch.profiler import record_function

import profiling
from attention import attention_path, varlen_obstacle
from checkpoint import load_model
from cli import ArgumentParser, InputError, positive, run, seed
from compiler import check_compiler
from data import (IGNORE, fetch, fill, learned_text, load_documents, num_bytes, pack, packed_sequence_collate_fn,
                  tokenize, training_packs)
from device import choose_device, device_name, keep_memory, peak_memory
from flops import gemm_ceiling, total_flops
from generate import generate
from model import CONFIGS, Transformer
from optimizer import Optimizer, adamw, schedule
from parallel import context, experts, pipeline, tensor
from parallel.checkpoint import read_model
from parallel.data import MODES, own_batches, validation_batches
from parallel.mesh import check_ranks, label, start_ranks
from precision import DTYPES, autocast, choose_precision
from progress import NoProgress, Progress
from recompute import RUN
from tokenizer import Tokenizer
from training_state import (checkpoint_to_resume, compare_starts, fingerprint, load_training_state, prepare_folder,
                            save_checkpoint, share_done)

SETTINGS = ("config", "init", "batch_tokens", "precision", "learning_rate", "seed")   # that make a run this run


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
    parser.add_argument("--accumulate", type=positive(int), default=1, metavar="N",
                        help="packs of T tokens in a step, for each rank of --dp; the microbatches of a pipeline")
    parser.add_argument("--dp", type=positive(int), metavar="N", help="data parallel: ranks with different packs"
                        " (None: as many as torchrun has started, divided by the other three)")
    parser.add_argument("--cp", type=positive(int), default=1, metavar="N",
                        help="context parallel: ranks that share every pack")
    parser.add_argument("--pp", type=positive(int), default=1, metavar="N", help="pipeline parallel: stages")
    parser.add_argument("--tp", type=positive(int), default=1, metavar="N",
                        help="tensor parallel: ranks that share every matrix")
    parser.add_argument("--ep", type=positive(int), default=1, metavar="N",
                        help="expert parallel: ranks of --dp that share the experts")
    parser.add_argument("--zero", choices=MODES, default="0", help="what the ranks of --dp and --cp share instead of"
                        " copying: 1 moments, 2 and gradients, 3 and weights; torch: 3 by fully_shard")
    parser.add_argument("--schedule", choices=pipeline.SCHEDULES, default="1f1b", help="of the pipeline")
    parser.add_argument("--precision", choices=DTYPES,
                        help="see precision.py (None: bf16 on a GPU that has it, else fp32)")
    parser.add_argument("--checkpointing", choices=RUN, default="none",
                        help="what a layer computes again instead of keeping it for its gradient")
    parser.add_argument("--learning-rate", type=positive(float), metavar="LR",
                        help="highest learning rate (None: 3e-3 at width 128, less for wider models; 2e-5 with --init)")
    parser.add_argument("--steps", type=positive(int), metavar="N",
                        help="stop after N steps (2400 if --minutes is not given)")
    parser.add_argument("--minutes", type=positive(float), metavar="M", help="stop after M minutes")
    parser.add_argument("--save-every", type=positive(int), default=500, metavar="N",
                        help="steps between checkpoints, each with a quick validation and a sample")
    parser.add_argument("--seed", type=seed, default=0, help="the same seed on the same machine gives the same run")
    parser.add_argument("--compile", choices=("default", "reduce-overhead", "max-autotune"),
                        help="let torch.compile fuse the step; the first steps then take a minute")
    parser.add_argument("--profile", action="store_true",
                        help="look into a few steps: a table, and OUT/profile/ with a trace and pictures")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto", help="where to train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out", metavar="DIR", help="where to write")
    parser.add_argument("--resume", action="store_true", help="continue from the last complete checkpoint in --out")
    arguments = parser.parse_args()
    if arguments.minutes is None and arguments.steps is None:
        arguments.steps = 2400
    if arguments.learning_rate is None:   # about 1 / width (Yang et al. 2022); a trained model needs care, not speed
        arguments.learning_rate = 2e-5 if arguments.init else 3e-3 * 128 / CONFIGS[arguments.config].hidden_size
    return arguments


def check_flags(arguments, device, dtype):
    """What this machine cannot do, or two flags not together, is an InputError before the work begins."""
    if arguments.compile:
        check_compiler(device)
    recorded = device == "cuda" and arguments.compile in ("reduce-overhead", "max-autotune")   # launches, see --compile
    if arguments.accumulate > 1 and (arguments.profile or recorded):
        raise InputError("--accumulate goes neither with --profile, which looks at single packs, nor with recorded"
                         " launches (--compile reduce-overhead or max-autotune), whose gradients the next pack"
                         " overwrites")
    if arguments.compile and device != "cpu" and varlen_obstacle(torch.device(device), dtype):
        raise InputError(f"--compile on {device} needs attention in one kernel:"
                         f" {varlen_obstacle(torch.device(device), dtype)}")


def loss_sum(model, batch):
    """Nats over all targets of a PackedBatch, a scalar tensor; with --cp over those of this rank's tokens."""
    batch, attend = context.share(batch, model.mesh.cp)
    with autocast(model.precision, batch.input_ids.device.type):
        return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.targets,
                     attend=attend)


def train_step(model, optimizer, batches, learning_rate, loss_sum=loss_sum):
    """Forward, backward, update. Returns what is to be reported of the step, {name: number or scalar tensor}."""
    device, scale = next(model.parameters()).device, optimizer.scaler.scale
    optimizer.zero_grad()   # before the way forward: old gradients would take part in its peak
    # The mean over targets that count. Dividing by T instead would let the users' questions scale the gradient.
    count = sum((batch.targets != IGNORE).sum().item() for batch in batches)
    experts.scale_balance(model, scale / sum(len(batch.targets) for batch in batches))

    def forward(batch):
        # Divided by the targets of all: a mean of means would weigh a pack of few targets like one of many.
        out = loss_sum(model, batch.to(device))
        return out / count * scale if out.dim() == 0 else out   # or what this stage of a pipeline hands on
    # batches: those of all ranks, on all of them the same
    loss = pipeline.run_stage(model, own_batches(batches, model), forward, optimizer.before_last_backward)
    norm = optimizer.step(learning_rate)
    loss = model.mesh.data.all_reduce(loss) / scale   # not before step(), which ends the sums that backward has begun
    return {"loss": loss, "gradient_norm": norm, "learning_rate": learning_rate} | experts.report(model)


@torch.no_grad()
def evaluate(model, documents, tokenizer, batch_tokens, device):
    """Validation: (nats per token, bits per byte) over every token of the documents, their ends included.

    Of a conversation, over what the assistant says.
    """
    model.eval()
    windows, _ = tokenize(documents, tokenizer, min(batch_tokens, model.config.max_position_embeddings))
    batches = [packed_sequence_collate_fn(chosen) for chosen in pack(windows, batch_tokens, range(len(windows)))]
    tokens = sum((batch.targets != IGNORE).sum().item() for batch in batches)
    nats = pipeline.run_stage(model, validation_batches(batches, model.mesh),
                              lambda batch: loss_sum(model, batch.to(device)))
    nats = model.mesh.data.all_reduce(nats).item()
    model.train()
    if not math.isfinite(nats):   # the weights may be finite still, and large
        raise InputError(f"the training diverged: the loss on the validation documents is {nats}; a checkpoint is kept"
                         " as it was; try a lower --learning-rate")
    return nats / tokens, nats / math.log(2) / num_bytes(documents)


def start_new(arguments, train_documents, device):
    """Pretrained weights and their tokenizer, or a new tokenizer and a new model for it."""
    dtype = torch.bfloat16 if arguments.precision == "bf16-pure" else torch.float32
    if arguments.init is not None:
        if Path(arguments.init).resolve() == arguments.out.resolve():
            raise InputError(f"--out {arguments.out} is what --init begins with, which would be overwritten; choose"
                             " another folder")
        model, tokenizer = load_model(arguments.init, device, dtype)
    else:
        preset = CONFIGS[arguments.config]
        tokenizer = Tokenizer.train(list(map(learned_text, train_documents)), preset.vocab_size)
        ends = [tokenizer.end_of_text, tokenizer.end_of_turn]
        model = Transformer(replace(preset, vocab_size=tokenizer.vocab_size, eos_token_id=ends)).to(device, dtype)
    if not all(isinstance(document, str) for document in train_documents):
        tokenizer.eos_token = "<|im_end|>"   # whoever opens the folder is to stop where the user's turn begins
    return model, tokenizer


def distribute(model, mesh, arguments):
    """Cut the model: what is left of it is this rank's part.

    Returns what the ranks with the same part share, see MODES.
    """
    check_ranks(arguments, model.config, mesh)
    label(model, mesh)
    experts.spread(model, mesh)
    tensor.split(model, mesh)
    pipeline.keep_stage(model, mesh, arguments.schedule)
    return MODES[arguments.zero](model, mesh)


def load_packs(arguments, documents, tokenizer, config):
    """The packs of a run, without end."""
    max_length = min(arguments.batch_tokens, config.max_position_embeddings)
    windows, cut = tokenize(documents, tokenizer, max_length)
    print(f"        {cut:,} of more than {max_length} tokens are cut into windows, {len(windows):,} in all")
    return training_packs(windows, arguments.batch_tokens, arguments.seed)


def next_batch(packs, arguments, model, state):
    """The next pack as a batch. Counts its tokens and FLOPs."""
    with record_function("data"):
        batch = packed_sequence_collate_fn(next(packs))
        state["tokens"] += len(batch.targets)
        state["flops"] += total_flops(model.config, batch.cu_seqlens)
        return fill(batch, arguments.batch_tokens) if arguments.compile else batch


def write_sample(out, mesh, tokenizer, document, tokens):
    """A text of the model's own, or where document is a conversation, its answer to the first message and that message.
    """
    if not mesh.is_main:
        return mesh.wait()
    model, _ = load_model(out)   # whole, on the CPU: beside its part of the model a GPU may have no room for it
    prompt_ids, question = [tokenizer.end_of_text], ""
    if not isinstance(document, str):
        asked = list(itertools.takewhile(lambda message: message["role"] != "assistant", document))
        prompt_ids, _ = tokenizer.encode_conversation(asked, answer=True)
        question = "".join(f"{message['role']}: {message['content']}\n" for message in asked)
    text = question + tokenizer.decode(generate(model, tokenizer, prompt_ids, tokens))
    mesh.wait()
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
        "mfu": state["flops"] / state["train_seconds"] / gemm_ceiling(device, dtype) / model.mesh.world.size,
        "device": device, "device_name": device_name(device), "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__, "seed": arguments.seed}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


def main():
    # ------------------------------------------------------------------------------------------------- set-up
    start = time.perf_counter()
    keep_memory()
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    arguments.precision = choose_precision(arguments.precision, device)
    dtype = DTYPES[arguments.precision]
    check_flags(arguments, device, dtype)
    mesh = start_ranks(device, arguments)
    prepare_folder(arguments.out, mesh)
    torch.manual_seed(arguments.seed)
    source = fetch(arguments.data)
    train_documents, val_documents = load_documents(source)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    settings |= {"data": str(source), "documents": fingerprint(train_documents + val_documents)}
    packs_per_step = settings["accumulate x dp"] = arguments.accumulate * mesh.dp.size   # may be resumed by other ranks

    checkpoint = checkpoint_to_resume(arguments, mesh)
    model, tokenizer = read_model(checkpoint, device) if checkpoint else start_new(arguments, train_documents, device)
    compare_starts(source, settings, checkpoint, model, mesh)
    model.precision, model.checkpointing = arguments.precision, arguments.checkpointing
    replicas = distribute(model, mesh, arguments)
    optimizer = Optimizer(model, adamw(replicas, arguments.learning_rate), replicas)
    state = load_training_state(checkpoint, optimizer, settings, arguments)
    profiling.check(arguments, state)

    print(f"data    {source}: {len(train_documents):,} documents to train on, {len(val_documents):,} to validate")
    packs = load_packs(arguments, train_documents, tokenizer, model.config)
    packs = itertools.islice(packs, state["step"] * packs_per_step, None)   # a resumed run has had the first ones
    print(f"model   {arguments.init or arguments.config}: {model.num_parameters():,} parameters,"
          f" {tokenizer.vocab_size:,} tokens")
    print(f"device  {device} ({device_name(device)}), {arguments.precision} ({dtype}); {attention_path(device, dtype)}")
    print(f"mesh    {mesh}, ZeRO {arguments.zero}; rank 0: {sum(map(torch.numel, replicas.parameters())):,} parameters")

    # --------------------------------------------------------------------------------------------------- loop
    start -= state["seconds"]   # time spent before the resume counts too
    loss_of = torch.compile(loss_sum, fullgraph=True, mode=arguments.compile) if arguments.compile else loss_sum
    profiler = None
    with Progress(arguments.out, arguments.steps, state["step"]) if mesh.is_main else NoProgress() as progress:
        while True:
            state["seconds"] = mesh.largest(time.perf_counter() - start)   # all ranks must stop at the same step
            done = state["progress"] = share_done(arguments, state)
            if done >= 1 and state["step"] > 0:
                break

            step_start = time.perf_counter()
            batches = [next_batch(packs, arguments, model, state) for _ in range(packs_per_step)]
            if arguments.profile and profiler is None:
                profiler = profiling.start(arguments.out / "profile", model.config, batches[0], device, dtype)
            mesh.seed(arguments.seed, state["step"])
            report = train_step(model, optimizer, batches, arguments.learning_rate * schedule(done), loss_of)

            state["step"] += 1
            filling = state["tokens"] / state["step"] / arguments.batch_tokens / packs_per_step
            shown = {"loss": f"{report['loss'].item():.3f}", "packed": f"{filling:.1%}"}
            shown |= {"skipped": optimizer.scaler.skipped} if optimizer.scaler.skipped else {}
            state["train_seconds"] += time.perf_counter() - step_start   # after loss.item(), which waits for the GPU
            if profiler:
                profiler.step()
            progress.step(state["step"], shown, report)

            if state["step"] % arguments.save_every == 0:
                _, bits = evaluate(model, val_documents[::8], tokenizer, arguments.batch_tokens, device)
                save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
                progress.validation(bits, write_sample(arguments.out, mesh, tokenizer, val_documents[0], 60))

    # ------------------------------------------------------------------------------------------------- report
    nats, bits = evaluate(model, val_documents, tokenizer, arguments.batch_tokens, device)
    state["seconds"] = time.perf_counter() - start
    save_checkpoint(arguments.out, model, tokenizer, optimizer, state)
    sample = write_sample(arguments.out, mesh, tokenizer, val_documents[0], 200)
    if not mesh.is_main:
        return mesh.wait()
    summary = write_summary(arguments, state, model, source, device, dtype, nats, bits)
    print(sample, end="\n\n")
    progress.finish(settings | {"steps": state["step"]}, summary)
    prompt = '"ROMEO:" 200' if isinstance(val_documents[0], str) else '--chat "..." 200'
    print(f"talk to it: python {Path(__file__).parent.name}/generate.py {prompt} --checkpoint {arguments.out}")
    mesh.wait()   # all leave together: torchrun would end rank 0 for another that comes to grief


if __name__ == "__main__":
    run(main)
