"""Four measurements of serving, each in one run of its own.

    python benchmark_serving.py cache --config qwen3-0.6b      a token's time with and without the cache, against length
    python benchmark_serving.py decode --config qwen3-0.6b     against transformers' generate and the memory
    python benchmark_serving.py serving                        continuous against static batching; nano-vllm's workload
    python benchmark_serving.py prefix                         time to the first token of prompts that begin alike

The weights are random: a matrix product takes as long with them as with trained ones. The answers' lengths are given by
the workload, never by the text. What is compared takes turns, so that a slow minute falls on all. Writes
results/WHAT_CONFIG_DEVICE.json; `transformers` is here to be compared with, nothing else in this chapter imports it.
"""
import itertools
import random
import sys
import time
from pathlib import Path
from statistics import mean, median

import torch
from matplotlib.figure import Figure

from cli import ArgumentParser, InputError, positive, run
from device import choose_device, keep_memory
from engine import Engine
from flops import read_ceiling
from sampling import Sampling
from static_batching import generate_batch
from kv_cache import ContiguousCache
from model import CONFIGS, Transformer
from results import FIGURES, write_results
from small_batch_matmul import for_small_batches

try:
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.generation.streamers import BaseStreamer
except ModuleNotFoundError:
    print("error: transformers is not installed: pip install -r tests/requirements.txt", file=sys.stderr)
    sys.exit(2)

GREEDY = Sampling(temperature=0)
BLOCK = 8     # tokens in a block of the engine's cache
PROMPT = 4    # tokens of the prompts of decode, whose time is not looked at


class NoText:
    """In the place of a tokenizer: no token means anything, so no answer ends before its time."""
    end_of_text = end_of_turn = -1

    def __init__(self, vocab_size):
        self.vocab_size = vocab_size


def build(config, device, dtype):
    """A model of random weights, with torch's own matrix products."""
    torch.manual_seed(0)
    return for_small_batches(Transformer(config).to(device, dtype).eval())


def with_the_weights_of(model):
    """The same model with small_batch_matmul.cpp, and that of transformers, around the same weights."""
    config = model.config
    with torch.device("meta"):
        fast = Transformer(config).eval()
    fast.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    fast.tie_weights()
    settings = {name: value for name, value in vars(config).items() if name not in ("rope_theta", "eos_token_id")}
    with torch.device("meta"):
        rope = {"rope_type": "default", "rope_theta": config.rope_theta}
        reference = Qwen3ForCausalLM(Qwen3Config(**settings, rope_parameters=rope))
    reference.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    # No weights.
    reference.model.rotary_emb = type(reference.model.rotary_emb)(reference.config).to(model.lm_head.weight.device)
    reference.generation_config.eos_token_id = None
    return for_small_batches(fast, use_kernel=True), reference.eval()


def random_prompt(vocab_size, n, seed):
    return random.Random(seed).choices(range(vocab_size), k=n)


# ------------------------------------------------------------------------------------------- one token after another

def our_times(model, prompts, n, forward=None):
    """Seconds of each step of the batch, the prefill first."""
    times, start = [], time.perf_counter()
    for _ in generate_batch(model, NoText(model.config.vocab_size), prompts, n, GREEDY, True, forward):
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
    return times


class Clock(BaseStreamer):
    """transformers calls put() with the prompt, then with each new token."""

    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


def their_times(reference, prompts, n):
    clock = Clock()
    ids = torch.tensor(prompts, device=reference.device)
    # A clock takes one text only, so that of a batch only the whole is known.
    if len(prompts) == 1:
        reference.generate(ids, max_new_tokens=n, do_sample=False, streamer=clock, pad_token_id=0)
        return [after - before for before, after in itertools.pairwise(clock.times)]
    ends = []
    for count in (1, n):
        start = time.perf_counter()
        reference.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        ends.append(time.perf_counter() - start)
    return [ends[0]] + [(ends[1] - ends[0]) / (n - 1)] * (n - 1)


def decode(config, device, arguments):
    """Rows: dtype and batch; what a second of decoding gives, for each way."""
    ceiling, rows = read_ceiling(device), []
    for dtype in (torch.bfloat16, torch.float32):
        model = build(config, device, dtype)
        fast, reference = with_the_weights_of(model)
        forward = torch.compile(fast, fullgraph=True, mode="reduce-overhead" if device == "cuda" else None)
        single = {}
        for batch in (1, 16):
            prompts = [random_prompt(config.vocab_size, PROMPT, seed) for seed in range(batch)]
            ways = {"transformers": lambda: their_times(reference, prompts, arguments.tokens),
                    "this chapter": lambda: our_times(model, prompts, arguments.tokens),
                    "and small_batch_matmul.cpp": lambda: our_times(fast, prompts, arguments.tokens),
                    "and compiled": lambda: our_times(fast, prompts, arguments.tokens, forward)}
            times = {name: [] for name in ways}
            for way in ways.values():
                way()   # to warm up, and to compile
            for _ in range(arguments.rounds):
                for name, way in ways.items():
                    times[name] += way()[1:]
            # Every weight is read once for a step, the table too, which scores; of the cache what is filled, on the
            # mean.
            held = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
            moved = sum(p.nbytes for p in model.parameters()) + batch * (PROMPT + arguments.tokens / 2) * held
            for name in ways:
                step = median(times[name])
                single.setdefault(name, batch / step)
                rows.append({"dtype": str(dtype).removeprefix("torch."), "batch": batch, "way": name, "ms": step * 1e3,
                             "tokens_per_second": batch / step, "speed": median(times["transformers"]) / step,
                             "batch_speed": batch / step / single[name], "roofline": moved / step / ceiling})
                print(rows[-1], flush=True)
    columns = {"dtype": "dtype", "batch": "texts", "way": "way", "ms": "ms a step", "tokens_per_second": "tokens/s",
               "speed": "times `transformers`", "batch_speed": "times itself with one text",
               "roofline": "share of the read bandwidth"}
    return columns, rows


# --------------------------------------------------------------------------------------------- with and without a cache

def cache(config, device, arguments):
    """The time of the token at each length, with what came before it in the cache and without.

    Between the lengths, straight lines.
    """
    model = build(config, device, torch.float32)
    lengths = [1, *range(64, arguments.length + 1, 64)]
    tokens = random_prompt(config.vocab_size, arguments.length, 0)
    store = ContiguousCache(config, 1, arguments.length, device)
    times = {length: ([], []) for length in lengths}
    with torch.no_grad():
        for _, length in itertools.product(range(arguments.rounds), lengths):
            ids = torch.tensor(tokens[:length], device=device)
            cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=device)
            start = time.perf_counter()
            scores = model(ids, torch.arange(length, device=device), cu_seqlens, length)[-1].float().cpu()
            times[length][0].append(time.perf_counter() - start)
            if length > 1:
                store.lengths[0] = 0
                model(ids[:-1], *store.place([0], [length - 1]), cache=store)
            for _ in range(3):
                store.lengths[0] = length - 1
                start = time.perf_counter()
                cached = model(ids[-1:], *store.place([0], [1]), cache=store)[0].float().cpu()
                times[length][1].append(time.perf_counter() - start)
            assert (scores - cached).abs().max() < 1e-2 * scores.std(), (scores - cached).abs().max()
            print(f"{length:>5} tokens  {times[length][0][-1] * 1e3:9.1f} ms without"
                  f"  {times[length][1][-1] * 1e3:7.1f} ms with", flush=True)
    without, cached = ([median(times[length][i]) for length in lengths] for i in (0, 1))
    rows, sums = [], [without[0], cached[0]]
    for i, length in enumerate(lengths):
        if i:
            sums = [total + (curve[i - 1] + curve[i]) / 2 * (length - lengths[i - 1])
                    for total, curve in zip(sums, (without, cached))]
        rows.append({"length": length, "without_ms": without[i] * 1e3, "with_ms": cached[i] * 1e3,
                     "ratio": without[i] / cached[i],
                     "without_sum": sums[0], "with_sum": sums[1], "sum_ratio": sums[0] / sums[1]})
    draw_cache(rows, f"{arguments.config}, {device}, float32", FIGURES / f"cache_{arguments.config}.png")
    columns = {"length": "tokens", "without_ms": "ms without", "with_ms": "ms with", "ratio": "ratio",
               "without_sum": "s for all so far, without", "with_sum": "with", "sum_ratio": "ratio "}
    return columns, rows


def draw_cache(rows, title, path):
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for key, color, label in (("without_ms", "#d9822b", "without: the whole text again"),
                              ("with_ms", "#1f6f8b", "with the cache: one token")):
        axes.plot([row["length"] for row in rows], [row[key] / 1e3 for row in rows], color=color, marker=".")
        axes.annotate(label, (rows[-3]["length"], rows[-3][key] / 1e3), color=color, ha="right",
                      va="bottom", fontsize=11,
                      xytext=(0, 10), textcoords="offset points")
    axes.set(xlabel="tokens of the text", ylabel="seconds for the next one", ylim=(0, None), title=title)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------- many requests

def arrivals(config, requests, scale, seed=0):
    """[(second of arrival, prompt, new tokens)]: exponential gaps and log-normal lengths, as in traces of chat
    services.

    Most answers are short and a few very long. The gaps are small enough that there is always somebody waiting.
    """
    rng, now, trace = random.Random(seed), 0.0, []
    for i in range(requests):
        now += rng.expovariate(1 / 0.005)
        prompt, answer = (max(4, min(int(scale * rng.lognormvariate(middle, 1.0)), int(scale * 1024)))
                          for middle in (4.6, 4.6))   # e^4.6 = 100 tokens, the median of both
        limit = config.max_position_embeddings // 2
        trace.append((now, random_prompt(config.vocab_size, min(prompt, limit), i), min(answer, limit)))
    return trace


def nano_vllm(config, requests, scale, seed=0):
    """nano-vllm's workload: all at once, prompts and answers of 100 to 1,024 tokens."""
    rng = random.Random(seed)
    return [(0.0, random_prompt(config.vocab_size, int(scale * rng.randint(100, 1024)), i),
             int(scale * rng.randint(100, 1024)))
            for i in range(requests)]


def serve(engine, trace, batching):
    """Run a trace. Returns (seconds, waste, first, whole): the share of allocated slots without a token, over all
    steps; the mean seconds to a first token, and to the last.

    batching: "continuous"; "static", where the next batch begins when all of the last one has ended, and until then a
    row that has ended is computed on, as in transformers' generate; or "static, ended rows left out".
    """
    coming, asked, first, whole, slots, filled = list(trace), {}, {}, {}, 0, 0
    start = time.perf_counter()
    while coming or engine.busy():
        now = time.perf_counter() - start
        if batching == "continuous" or not engine.busy():
            here = len(list(itertools.takewhile(lambda request: request[0] <= now, coming)))
            if batching != "continuous":
                here = min(here, engine.scheduler.max_sequences)
            longest = max((new for _, _, new in coming[:here]), default=0)
            for arrival, prompt, new in coming[:here]:
                sequence = engine.add(prompt, longest if batching == "static" else new, GREEDY, end_tokens=())
                asked[sequence] = arrival, new
            del coming[:here]
        if not engine.busy():
            time.sleep(max(0, coming[0][0] - now))
            continue
        answered = engine.step()
        now = time.perf_counter() - start
        for sequence, _ in answered:
            arrival, new = asked[sequence]
            first.setdefault(sequence, now - arrival)
            if len(sequence.answer) == new:
                whole[sequence] = now - arrival
        for sequence in engine.scheduler.running:   # no two of these prompts begin alike: no block counts twice
            slots += len(sequence.table) * BLOCK
            filled += sequence.computed
    assert len(whole) == len(trace)
    return time.perf_counter() - start, 1 - filled / slots, mean(first.values()), mean(whole.values())


def serving(config, device, arguments):
    model = build(config, device, torch.float32 if device == "cpu" else torch.bfloat16)
    workloads = {"chat": arrivals(config, arguments.requests, arguments.scale),
                 "nano-vllm's": nano_vllm(config, arguments.requests, arguments.scale)}
    room = 16 * config.max_position_embeddings // BLOCK   # as much as 16 rows of the longest text would take
    rows = []
    for name, trace in workloads.items():
        tokens = sum(new for _, _, new in trace)
        measured = {"static": [], "static, ended rows left out": [], "continuous": []}
        for way in (*measured, *measured):   # twice, in turns
            engine = Engine(model, NoText(config.vocab_size), room, BLOCK, max_tokens=512,
                            max_sequences=arguments.sequences)
            measured[way].append(serve(engine, trace, way))
        for way, runs in measured.items():
            seconds, waste, first, whole = min(runs)
            rows.append({"workload": name, "way": way, "requests": len(trace), "tokens": tokens,
                         "tokens_per_second": tokens / seconds,
                         "speed": min(measured["static"])[0] / seconds, "first": first, "whole": whole,
                         "waste": f"{waste:.1%}"})
            print(rows[-1], flush=True)
    columns = {"workload": "workload", "way": "batching", "requests": "requests", "tokens": "tokens written",
               "tokens_per_second": "tokens/s",
               "speed": "times static", "first": "s to the first token", "whole": "s to the last",
               "waste": "slots without a token"}
    return columns, rows


def prefix(config, device, arguments):
    """Prompts of one long beginning and an end of their own, one after the other."""
    model = build(config, device, torch.float32 if device == "cpu" else torch.bfloat16)
    shared, rows = random_prompt(config.vocab_size, arguments.length, 0), []
    times = {False: [], True: []}
    engines = {known: Engine(model, NoText(config.vocab_size), 4 * arguments.length // BLOCK, BLOCK,
                             prefix_cache=known) for known in times}
    for seed in range(arguments.rounds + 1):
        for known, engine in engines.items():
            engine.add(shared + random_prompt(config.vocab_size, 16, seed + 1), 1, GREEDY, end_tokens=())
            start = time.perf_counter()
            while engine.busy():
                engine.step()
            times[known].append(time.perf_counter() - start)
    for known, name in ((False, "computed"), (True, "remembered")):
        rows.append({"way": name, "shared": len(shared), "own": 16, "ms": median(times[known][1:]) * 1e3,
                     "speed": median(times[False][1:]) / median(times[known][1:])})
        print(rows[-1])
    return {"way": "the shared beginning is", "shared": "tokens shared", "own": "tokens of its own",
            "ms": "ms to the first token", "speed": "ratio"}, rows


WHAT = {"cache": cache, "decode": decode, "serving": serving, "prefix": prefix}


def main():
    keep_memory()
    parser = ArgumentParser(description="Measure serving: the cache, decoding, batching, shared beginnings.")
    parser.add_argument("what", choices=WHAT, help="see above")
    parser.add_argument("--config", choices=CONFIGS, default="small", help="model size, see model.py")
    parser.add_argument("--length", type=positive(int), default=512, metavar="L",
                        help="longest text of cache; shared tokens of prefix")
    parser.add_argument("--tokens", type=positive(int), default=24, metavar="N", help="tokens of each text of decode")
    parser.add_argument("--rounds", type=positive(int), default=3, metavar="N", help="how often each way has its turn")
    parser.add_argument("--requests", type=positive(int), default=256, metavar="N", help="of serving")
    parser.add_argument("--scale", type=positive(float), default=0.5, metavar="X", help="of all lengths of serving")
    parser.add_argument("--sequences", type=positive(int), default=16, metavar="N",
                        help="texts that serving writes at a time")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    arguments = parser.parse_args()
    device, limit = choose_device(arguments.device), CONFIGS[arguments.config].max_position_embeddings
    shortest = 128 if arguments.what == "cache" else 16
    if not shortest <= arguments.length <= limit - 17 or arguments.tokens < 2 or arguments.scale * 2048 > limit:
        raise InputError(f"--length must be {shortest} to {limit - 17}, --tokens 2 or more, and --scale"
                         f" {limit / 2048:g} or less for this model")
    columns, rows = WHAT[arguments.what](CONFIGS[arguments.config], device, arguments)
    command = " ".join([f"python {Path(__file__).resolve().parent.name}/benchmark_serving.py", *sys.argv[1:]])
    print(write_results(f"{arguments.what}_{arguments.config}_{device}", command, columns, rows, device))


if __name__ == "__main__":
    run(main)
