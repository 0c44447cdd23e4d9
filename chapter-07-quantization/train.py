"""Train a Qwen3 on text or on conversations: one loop, top to bottom.

    python train.py        (in this folder)
    torchrun --nproc_per_node 4 train.py --dp 2 --tp 2
    python train.py --init Qwen/Qwen3-0.6B --data conversations.jsonl --out out-chat

Writes to --out: the model (config.json, model.safetensors, tokenizer files), checkpoint/ for --resume, tensorboard/, and
summary.json with the numbers of the run.
"""
import ctypes
import hashlib
import itertools
import json
import math
import os
import resource
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import record_function
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import context_parallel
import data_parallel
import moe
import parallel
import pipeline_parallel
import profiling
import qat
import tensor_parallel
from checkpoint import complete_checkpoint, load_model, not_ours
from checkpointing import RUN
from compiler import check_compiler
from data import (IGNORE, fetch, fill, learned_text, load_documents, num_bytes, pack, packed_sequence_collate_fn, tokenize,
                  training_packs)
from errors import ArgumentParser, InputError, positive, run, seed
from flops import gemm_ceiling, step_flops
from generate import generate
from model import CONFIGS, Transformer, attention_path, varlen_obstacle
from precision import DTYPES, GradScaler, StochasticAdamW, autocast, choose_precision
from report import device_name
from sharded_checkpoint import load_sharded, read_model, read_state, save_checkpoint
from tokenizer import Tokenizer

PATIENCE = 20   # steps in a row whose gradient is not finite


def parse_arguments():
    parser = ArgumentParser(description="Train a Qwen3 on text or on conversations.")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH",
                        help="tinyshakespeare, python-docs, wikitext-2, or a .txt or .jsonl file")
    parser.add_argument("--init", metavar="DIR|HUB_ID",
                        help="start from pretrained weights and their tokenizer instead of --config; e.g. Qwen/Qwen3-0.6B")
    parser.add_argument("--batch-tokens", type=positive(int), default=1024, metavar="T", help="tokens that are computed together")
    parser.add_argument("--accumulate", type=positive(int), default=1, metavar="N",
                        help="packs of T tokens in a step, for each rank of --dp; the microbatches of a pipeline")
    parser.add_argument("--dp", type=positive(int), metavar="N", help="data parallel: ranks with different packs"
                        " (None: as many as torchrun has started, divided by the other three)")
    parser.add_argument("--cp", type=positive(int), default=1, metavar="N", help="context parallel: ranks that share every pack")
    parser.add_argument("--pp", type=positive(int), default=1, metavar="N", help="pipeline parallel: stages")
    parser.add_argument("--tp", type=positive(int), default=1, metavar="N", help="tensor parallel: ranks that share every matrix")
    parser.add_argument("--ep", type=positive(int), default=1, metavar="N", help="expert parallel: ranks of --dp that share the experts")
    parser.add_argument("--zero", choices=data_parallel.WAYS, default="0", help="what the ranks of --dp and --cp share instead of"
                        " copying: 1 moments, 2 and gradients, 3 and weights; torch: 3 by fully_shard")
    parser.add_argument("--schedule", choices=pipeline_parallel.SCHEDULES, default="1f1b", help="of the pipeline")
    parser.add_argument("--precision", choices=DTYPES, help="see precision.py (None: bf16 on a GPU that has it, else fp32)")
    parser.add_argument("--qat", choices=qat.FORMATS, help="train the model that these integers leave, see qat.py")
    parser.add_argument("--checkpointing", choices=RUN, default="none",
                        help="what a layer computes again instead of keeping it for its gradient")
    parser.add_argument("--learning-rate", type=positive(float), metavar="LR",
                        help="highest learning rate (None: 3e-3 at width 128, less for wider models; 2e-5 with --init)")
    parser.add_argument("--steps", type=positive(int), metavar="N", help="stop after N steps (1200 if --minutes is not given)")
    parser.add_argument("--minutes", type=positive(float), metavar="M", help="stop after M minutes")
    parser.add_argument("--save-every", type=positive(int), default=250, metavar="N",
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
        arguments.steps = 1200
    if arguments.learning_rate is None:   # about 1 / width (Yang et al. 2022); a trained model needs care, not speed
        arguments.learning_rate = 2e-5 if arguments.init else 3e-3 * 128 / CONFIGS[arguments.config].hidden_size
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


def keep_memory():
    """Let glibc keep the memory that torch frees, for the next tensor. Elsewhere than on Linux this does nothing.

    It gives each block of 128 KiB or more back to the system at once, and the system hands out every page of a new one
    emptied: two thousand interruptions in a step of the small model.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 32 << 20)   # M_MMAP_THRESHOLD, in bytes: the largest that is allowed
        libc.mallopt(-1, 1 << 30)    # M_TRIM_THRESHOLD: free bytes at the end of the heap before any go back


def adamw(model, learning_rate, weight_decay=0.1):
    """AdamW with weight decay on matrices only: pulling biases and norm weights towards zero helps nothing."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    if matrices[0].dtype == torch.bfloat16:
        return StochasticAdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
    # fused: one pass over memory for all parameters, instead of a dozen.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def schedule(progress, warmup=0.05, floor=0.1):
    """Share of the highest learning rate at progress (0 to 1 of the run): a linear rise, then half a cosine down to floor."""
    if progress < warmup:
        return max(progress, 0.001) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def progress(arguments, state):
    """Share of the run that is done, by its steps or by its minutes; 1 is the end."""
    return max(state["step"] / arguments.steps if arguments.steps else 0,
               state["seconds"] / 60 / arguments.minutes if arguments.minutes else 0)


def loss_sum(model, batch, precision="fp32", mesh=parallel.ALONE, x=None):
    """Nats over all targets of a PackedBatch, a scalar tensor; with --cp over those of this rank's tokens.

    In a pipeline x is what the stage before has made of the batch, and all but the last return what they make of it.
    """
    batch, attend = context_parallel.share(batch, mesh.cp)
    with autocast(precision, batch.input_ids.device.type):
        return model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen, batch.targets, attend=attend, x=x)


def stream(model, batch, mesh):
    """An empty tensor for what the stage before hands on of a pack: (T, D) of this rank's tokens."""
    T = len(batch.input_ids) // mesh.cp.size // mesh.tp.size
    weight = next(model.parameters())   # not weight.new_empty: where fully_shard has cut it that would be a DTensor too
    return torch.empty(T, model.config.hidden_size, dtype=weight.dtype, device=weight.device)


@torch.no_grad()
def evaluate(model, documents, tokenizer, batch_tokens, device, precision="fp32", mesh=parallel.ALONE):
    """Validation: (nats per token, bits per byte) over every token of the documents, their ends included.

    Of a conversation, over what the assistant says.
    """
    model.eval()
    windows, _ = tokenize(documents, tokenizer, min(batch_tokens, model.config.max_position_embeddings))
    batches = [packed_sequence_collate_fn(chosen) for chosen in pack(windows, batch_tokens, range(len(windows)))]
    tokens = sum((batch.targets != IGNORE).sum().item() for batch in batches)
    # As many for each rank, because the ranks wait for each other: where they do not come out even, packs without a target.
    batches += [replace(batches[0], targets=torch.full_like(batches[0].targets, IGNORE))] * (-len(batches) % mesh.dp.size)
    batches = [fill(batch, parallel.round_up(len(batch.targets), mesh)).to(device) for batch in batches[mesh.dp.rank::mesh.dp.size]]
    nats = pipeline_parallel.run([("F", i) for i in range(len(batches))], mesh, batches,
                                 lambda batch, x: loss_sum(model, batch, precision, mesh, x), lambda batch: stream(model, batch, mesh))
    nats = mesh.data.all_reduce(nats).item()
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


def start_afresh(arguments, train_documents, device):
    """Pretrained weights and their tokenizer, or a new tokenizer and a new model for it."""
    dtype = torch.bfloat16 if arguments.precision == "bf16-pure" else torch.float32
    if arguments.init is not None:
        if Path(arguments.init).resolve() == arguments.out.resolve():
            raise InputError(f"--out {arguments.out} is what --init begins with, which would be overwritten; choose another folder")
        model, tokenizer = load_model(arguments.init, device, dtype)
        if model.config.quantization_config:
            raise InputError(f"--init {arguments.init} is quantized, and integers cannot be trained; start from the model it was made of")
    else:
        preset = CONFIGS[arguments.config]
        tokenizer = Tokenizer.train(list(map(learned_text, train_documents)), preset.vocab_size)
        config = replace(preset, vocab_size=tokenizer.vocab_size, eos_token_id=[tokenizer.end_of_text, tokenizer.end_of_turn])
        model = Transformer(config).to(device, dtype)
    if not all(isinstance(document, str) for document in train_documents):
        tokenizer.eos_token = "<|im_end|>"   # whoever opens the folder is to stop where the user's turn begins
    return model, tokenizer


def check_settings(settings, saved, out):
    """A resumed run must be the same run. Only the budget (--steps, --minutes) may grow."""
    if saved.get("documents") == settings["documents"]:   # the same text, by whatever name
        saved = saved | {"data": settings["data"]}
    if os.path.abspath(str(saved.get("init"))) == os.path.abspath(str(settings["init"])):
        saved = saved | {"init": settings["init"]}
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


def write_sample(model, tokenizer, document, tokens):
    """A text of the model's own, or where document is a conversation, its answer to the first message and that message."""
    prompt_ids, question = [tokenizer.end_of_text], ""
    if not isinstance(document, str):
        asked = list(itertools.takewhile(lambda message: message["role"] != "assistant", document))
        prompt_ids, _ = tokenizer.encode_conversation(asked, answer=True)
        question = "".join(f"{message['role']}: {message['content']}\n" for message in asked)
    return question + tokenizer.decode(generate(model, tokenizer, prompt_ids, tokens))


def write_summary(arguments, state, parameters, mesh, source, device, nats, bits):
    """summary.json: the same keys in every chapter, so that any two runs compare. null: not known yet."""
    summary = {
        "chapter": Path(__file__).parent.name, "config": arguments.init or arguments.config, "parameters": parameters,
        "data": str(source), "steps": state["step"], "tokens": state["tokens"], "wall_seconds": state["seconds"],
        "tokens_per_second": state["tokens"] / state["train_seconds"],   # training steps only
        "peak_memory_bytes": peak_memory(device), "val_loss": nats, "val_bits_per_byte": bits,
        "flops_per_token": state["flops"] / state["tokens"],
        "mfu": state["flops"] / state["train_seconds"] / gemm_ceiling(device, DTYPES[arguments.precision]) / mesh.world.size,
        "device": device, "device_name": device_name(device), "dtype": str(DTYPES[arguments.precision]).removeprefix("torch."),
        "torch": torch.__version__, "seed": arguments.seed}
    (arguments.out / "summary.json").write_text(json.dumps(summary, indent=2))
    return summary


def main():
    start = time.perf_counter()
    keep_memory()
    arguments = parse_arguments()
    device = choose_device(arguments.device)
    arguments.precision = choose_precision(arguments.precision, device)
    dtype = DTYPES[arguments.precision]
    mesh = parallel.start(device, arguments)
    if mesh.world.size > 1 and (arguments.compile or arguments.profile):
        raise InputError("--compile and --profile are for a single process: the compiler cannot follow what the ranks tell each other")
    if arguments.compile:
        check_compiler(device)
    if arguments.accumulate > 1 and (arguments.profile or (device == "cuda" and arguments.compile in ("reduce-overhead", "max-autotune"))):
        raise InputError("--accumulate goes neither with --profile, which looks at single packs, nor with recorded launches"
                         " (--compile reduce-overhead or max-autotune), whose gradients the next pack overwrites")
    if arguments.compile and device != "cpu" and varlen_obstacle(torch.device(device), dtype):
        raise InputError(f"--compile on {device} needs attention in one kernel: {varlen_obstacle(torch.device(device), dtype)}")
    if mesh.is_main:
        prepare_folder(arguments.out)
    torch.manual_seed(arguments.seed)   # the same in all ranks, so that all begin with the same model
    source = fetch(arguments.data)
    train_documents, val_documents = load_documents(source)
    settings = {name: getattr(arguments, name) for name in ("config", "init", "batch_tokens", "precision", "qat", "learning_rate", "seed")}
    packs_per_step = arguments.accumulate * mesh.dp.size   # as long as this stays, a run may go on with another number of ranks
    settings |= {"accumulate x dp": packs_per_step}
    settings |= {"data": str(source), "documents": fingerprint(train_documents + val_documents)}

    # state is everything that a resumed run must know besides weights, optimizer and random state.
    state = {"settings": settings, "step": 0, "tokens": 0, "flops": 0, "train_seconds": 0, "seconds": 0, "skipped": 0}
    scaler = GradScaler(arguments.precision)
    # Ranks that torchrun has started again go on. On several machines only some may know that they have been.
    arguments.resume = any(mesh.gather(arguments.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0))
    checkpoint = complete_checkpoint(arguments.out) if arguments.resume else None
    if arguments.resume and not checkpoint:
        print(f"no checkpoint in {arguments.out}: starting afresh")
    model, tokenizer = read_model(checkpoint, device) if checkpoint else start_afresh(arguments, train_documents, device)
    config, parameters = model.config, model.num_parameters()
    if mesh.world.size > 1:
        parallel.compare(mesh.gather({
            "data": f"{Path(source).name} with fingerprint {settings['documents']}",
            "checkpoint": f"of step {read_state(checkpoint)['step']}" if checkpoint else "missing",
            "sum of the weights": None if checkpoint else sum(map(parallel.checksum, model.parameters()))}))
    model.checkpointing = arguments.checkpointing

    if arguments.compile and config.num_experts:
        raise InputError("--compile: the compiler cannot follow how many tokens each expert gets; train without it")
    if arguments.precision == "bf16-pure" and (arguments.pp > 1 and config.tie_word_embeddings or config.vocab_size % arguments.tp):
        raise InputError("--precision bf16-pure rounds by chance, and ranks that hold the same weights would round them differently: with"
                         " --pp where the token table is tied, with --tp where it does not divide the vocabulary; use bf16")

    # Cut the model: what is left of it is this rank's part. Then share among those that hold the same part what need not be there twice.
    parallel.label(model, mesh)
    moe.spread(model, mesh)
    tensor_parallel.split(model, mesh)
    if arguments.qat:
        qat.prepare(model, arguments.qat, mesh)
    pipeline_parallel.keep_stage(model, mesh)
    data = data_parallel.WAYS[arguments.zero](model, mesh)
    optimizer = adamw(data, arguments.learning_rate)
    copies = parallel.count_copies(data.parameters(), mesh)
    if checkpoint:
        state = load_sharded(checkpoint, data.parameters(), optimizer, mesh)
        data.after_step()   # ZeRO has read its own rows; where it keeps all, it needs the others'
        check_settings(settings, state["settings"], arguments.out)
        scaler.scale, scaler.good_steps = state["scaler"]
        print_resumed(arguments, state)
    if arguments.profile and arguments.steps and arguments.steps - state["step"] < profiling.STEPS:
        raise InputError(f"--profile needs {profiling.STEPS} steps, not {arguments.steps - state['step']}")
    max_length = min(arguments.batch_tokens, model.config.max_position_embeddings)
    windows, cut = tokenize(train_documents, tokenizer, max_length)
    packs = training_packs(windows, arguments.batch_tokens, arguments.seed)
    packs = itertools.islice(packs, state["step"] * packs_per_step, None)   # a resumed run has had the first ones

    print(f"data    {source}: {len(train_documents):,} documents to train on, {len(val_documents):,} to validate;"
          f" {cut:,} of more than {max_length} tokens cut into windows, {len(windows):,} in all")
    print(f"model   {arguments.init or arguments.config}: {parameters:,} parameters, {tokenizer.vocab_size:,} tokens")
    print(f"device  {device} ({device_name(device)}), {arguments.precision}: products in {dtype}; {attention_path(device, dtype)}")
    if arguments.qat:
        print(f"qat     {arguments.qat}: computes, and is validated, with the weights that rounding leaves; saved are those before it")
    if mesh.world.size > 1:
        print(f"mesh    {mesh.world.size} ranks: dp {mesh.dp.size} x cp {mesh.cp.size} x pp {mesh.pp.size} x tp {mesh.tp.size};"
              f" ep {mesh.ep.size}, ZeRO stage {arguments.zero}; rank 0 has {sum(p.numel() for p in data.parameters()):,} parameters")
    for events in () if checkpoint or not mesh.is_main else (arguments.out / "tensorboard").glob("events.out.tfevents.*"):
        events.unlink()   # the curves of an earlier run would mix with these
    writer = SummaryWriter(arguments.out / "tensorboard", purge_step=state["step"]) if mesh.is_main else None
    bar = tqdm(total=arguments.steps, initial=state["step"], unit="step", dynamic_ncols=True, disable=not mesh.is_main)
    seen = {}                   # what the bar shows
    start -= state["seconds"]   # time spent before the resume counts too
    loss_of = torch.compile(loss_sum, fullgraph=True, mode=arguments.compile) if arguments.compile else loss_sum
    sampler = device if mesh.world.size == 1 else "cpu"   # beside its part of the model a GPU may have no room for the whole
    profiler, skipped = None, 0

    while True:
        state["seconds"] = mesh.largest(time.perf_counter() - start)   # all ranks must stop at the same step
        state["progress"] = progress(arguments, state)
        if state["progress"] >= 1 and state["step"] > 0:
            break

        step_start = time.perf_counter()
        lr = arguments.learning_rate * schedule(state["progress"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        with record_function("data"):
            batches = [packed_sequence_collate_fn(chosen) for chosen in itertools.islice(packs, packs_per_step)]
            tokens = sum(len(batch.targets) for batch in batches)
            state["tokens"] += tokens
            flops = [sum(map(sum, step_flops(config, batch.cu_seqlens).values())) for batch in batches]
            state["flops"] += sum(flops)
            # The mean over targets that count. Dividing by T instead would let the users' questions scale the gradient.
            count = sum((batch.targets != IGNORE).sum().item() for batch in batches)
            moe.scale_balance(model, scaler.scale / tokens)
            batches = data_parallel.share_out(batches, flops, mesh.dp.size)[mesh.dp.rank]
            batches = [fill(batch, arguments.batch_tokens if arguments.compile else parallel.round_up(len(batch.targets), mesh))
                       for batch in batches]
            if arguments.profile and profiler is None:
                profiler = profiling.start(arguments.out / "profile", model.config, batches[0], device, dtype)

        def forward(batch, x=None):
            # Divided by the targets of all: a mean of means would weigh a pack of few targets like one of many.
            out = loss_of(model, batch.to(device), arguments.precision, mesh, x)
            return out / count * scaler.scale if out.dim() == 0 else out   # or what this stage hands on
        optimizer.zero_grad()   # before the way forward: old gradients would take part in its peak
        order = pipeline_parallel.SCHEDULES[arguments.schedule](mesh.pp.rank, mesh.pp.size, len(batches))
        loss = pipeline_parallel.run(order, mesh, batches, forward, lambda batch: stream(model, batch, mesh),
                                     before_last_backward=lambda: data.before_backward(last=True))
        data.finish()   # before the next sum: other ranks may have begun some in this group that this one only begins here
        loss = mesh.data.all_reduce(loss) / scaler.scale
        tensor_parallel.sum_partial(data.parameters(), mesh)
        pipeline_parallel.sum_tied(data.parameters(), mesh)
        scaler.unscale(data.parameters())
        norm = parallel.clip_gradients(data.parameters(), copies, mesh, 1.0)
        finite = norm.isfinite().item()
        if finite:
            if mesh.world.size > 1:   # whatever they have drawn before: those who hold the same weights must round them alike
                torch.manual_seed((arguments.seed + 1_000_003 * state["step"]) % 2 ** 63)
            optimizer.step()
            data.after_step()
        scaler.update(finite)
        skipped = 0 if finite else skipped + 1
        if skipped == PATIENCE:
            bar.close()
            raise InputError(f"the gradient was not finite in {PATIENCE} steps in a row, the last one step {state['step'] + 1};"
                             f" a checkpoint in {arguments.out} is kept as it was; try a lower --learning-rate, and instead of fp16 bf16")

        state["step"] += 1
        state["skipped"] += not finite
        state["scaler"] = scaler.scale, scaler.good_steps
        filling = state["tokens"] / state["step"] / arguments.batch_tokens / packs_per_step
        seen |= {"loss": f"{loss.item():.3f}", "packed": f"{filling:.1%}"} | ({"skipped": state["skipped"]} if state["skipped"] else {})
        state["train_seconds"] += time.perf_counter() - step_start   # after loss.item(), which waits for the GPU
        if profiler:
            profiler.step()
        bar.update()
        bar.set_postfix(seen)
        if mesh.is_main:
            for name, value in {"loss": loss, "gradient_norm": norm, "learning_rate": lr}.items():
                writer.add_scalar(f"train/{name}", value, state["step"])

        if state["step"] % arguments.save_every == 0:
            _, bits = evaluate(model, val_documents[::8], tokenizer, arguments.batch_tokens, device, arguments.precision, mesh)
            save_checkpoint(arguments.out, config, data.parameters(), optimizer, state, tokenizer, mesh)
            if mesh.is_main:
                writer.add_scalar("validation/bits_per_byte_of_an_eighth", bits, state["step"])
                writer.add_text("sample", write_sample(load_model(arguments.out, sampler)[0], tokenizer, val_documents[0], 60), state["step"])
            mesh.wait()
            seen["validation"] = f"{bits:.3f} bits per byte"
    bar.close()

    nats, bits = evaluate(model, val_documents, tokenizer, arguments.batch_tokens, device, arguments.precision, mesh)
    state["seconds"] = time.perf_counter() - start
    save_checkpoint(arguments.out, config, data.parameters(), optimizer, state, tokenizer, mesh)
    if not mesh.is_main:
        return mesh.wait()
    summary = write_summary(arguments, state, parameters, mesh, source, device, nats, bits)
    writer.add_hparams({**settings, "steps": state["step"]}, {"validation/bits_per_byte": bits}, run_name=".")
    writer.close()
    print(write_sample(load_model(arguments.out, sampler)[0], tokenizer, val_documents[0], 200), end="\n\n")
    print(f"{bits:.4f} bits per byte on the validation documents ({nats:.4f} nats per token) after {state['step']:,} steps,"
          f" {state['tokens']:,} tokens, {state['seconds']:.0f} s; {summary['tokens_per_second']:,.0f} tokens/s")
    prompt = '"ROMEO:" 200' if isinstance(val_documents[0], str) else '--chat "..." 200'
    print(f"talk to it: python {Path(__file__).parent.name}/generate.py {prompt} --checkpoint {arguments.out}")
    mesh.wait()   # all leave together: torchrun would end rank 0 for another that comes to grief


if __name__ == "__main__":
    run(main)
