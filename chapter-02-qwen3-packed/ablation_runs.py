"""One run of ablations.py and all of them: training, the files that keep what is finished, processes, and the clock.

A run is determined by its variant, its seed and its number of steps; so is the name of its file. Whatever is killed,
the files of finished runs are whole, and the others are made again.
"""
import collections
import hashlib
import inspect
import itertools
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import train
from ablation_model import AblationConfig, AblationTransformer
from cli import InputError
from data import (IGNORE, PackedBatch, learned_text, load_documents, pack, packed_sequence_collate_fn, shuffled,
                  tokenize, training_packs)
from model import CONFIGS
from optimizer import Optimizer, adamw, schedule
from tokenizer import Tokenizer
from training_state import fingerprint

ROUNDS, EACH = 11, 4   # of the clock: so many turns of so many steps
PIECES = 40            # of a run, whose mean losses are kept
SAME = 0.03            # numbers of steps that differ by no more than this share are one run


# ------------------------------------------------------------------------------------------------- variants

@dataclass(kw_only=True)
class Variant(AblationConfig):
    """A model and how it is trained."""
    batch_tokens: int
    learning_rate: float
    weight_decay: float
    batch_windows: int | None = None   # as many windows a step, padded to the longest: chapter 1's batches
    across: bool = False               # a token sees the documents before its own in the pack
    schedule: str = "default"
    z_loss: float = 0.0                # weight of the square of the logits' normalizer (PaLM, section 5)


def default_variant():
    """(what train.py trains if it is told nothing, number of its steps)."""
    arguments, sys.argv = sys.argv, ["train.py"]
    try:
        flags = train.parse_arguments()
    finally:
        sys.argv = arguments
    return Variant(**asdict(CONFIGS[flags.config]), batch_tokens=flags.batch_tokens, learning_rate=flags.learning_rate,
                   weight_decay=inspect.signature(adamw).parameters["weight_decay"].default), flags.steps


def constant(progress):
    """The warm-up of the default, then no decay."""
    return schedule(min(progress, 0.05))


def linear(progress):
    return constant(progress) * min(1, (1 - progress) / 0.95)


def to_a_tenth(progress):
    """Chapter 1's."""
    return constant(progress) * (0.55 + 0.45 * math.cos(math.pi * max(0, progress - 0.05) / 0.95))


SCHEDULES = {"default": schedule, "constant": constant, "linear": linear, "tenth": to_a_tenth}


# -------------------------------------------------------------------------------------------------- one run

class Text:
    """The documents in three parts, and what the variants make of the first."""

    def __init__(self, source):
        documents, self.validation = load_documents(source)
        cut = len(documents) * 9 // 10
        self.training, self.development = documents[:cut], documents[cut:]
        self.fingerprint, self.tokenizers, self.windows_of = fingerprint([*documents, *self.validation]), {}, {}

    def tokenizer(self, variant):
        if variant.vocab_size not in self.tokenizers:
            texts = list(map(learned_text, self.training))
            self.tokenizers[variant.vocab_size] = Tokenizer.train(texts, variant.vocab_size)
        return self.tokenizers[variant.vocab_size]

    def windows(self, variant):
        key = variant.vocab_size, min(variant.batch_tokens, variant.max_position_embeddings)
        if key not in self.windows_of:
            self.windows_of[key], _ = tokenize(self.training, self.tokenizer(variant), key[1])
        return self.windows_of[key]

    def steps_of_an_epoch(self, variant):
        windows = self.windows(variant)
        if variant.batch_windows:
            return len(windows) / variant.batch_windows
        return sum(1 for _ in pack(windows, variant.batch_tokens, shuffled(len(windows), 0, 0)))


def batches(variant, windows, seed):
    """The batches of a run, without end."""
    if variant.batch_windows:
        epochs = (shuffled(len(windows), seed, epoch) for epoch in itertools.count())
        order = itertools.chain.from_iterable(epochs)
        while True:
            yield padded([windows[i] for i in itertools.islice(order, variant.batch_windows)])
    for chosen in training_packs(windows, variant.batch_tokens, seed):
        batch = packed_sequence_collate_fn(chosen)
        yield one_document(batch) if variant.across else batch


def padded(windows):
    """Chapter 1's rectangle: documents that the filler makes equally long. No token looks at what comes after it."""
    L = max(len(input_ids) for input_ids, _ in windows)
    return packed_sequence_collate_fn([(input_ids + [0] * (L - len(input_ids)), targets + [IGNORE] * (L - len(targets)))
                                       for input_ids, targets in windows])


def one_document(batch):
    """The mistake of exercise 4: the targets stay within the documents, attention does not."""
    T = len(batch.input_ids)
    return PackedBatch(batch.input_ids, batch.targets, torch.arange(T), torch.tensor([0, T], dtype=torch.int32), T)


def z_loss_step(model, optimizer, batch, learning_rate, weight):
    """train_step of train.py with the z-loss on top, which is not reported."""
    optimizer.zero_grad()
    logits = model(batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.max_seqlen)   # (T, V)
    loss = F.cross_entropy(logits, batch.targets, ignore_index=IGNORE)
    normalizers = logits.logsumexp(-1)[batch.targets != IGNORE]
    (loss + weight * normalizers.square().mean()).backward()
    optimizer.step(learning_rate)
    return {"loss": loss}


def new_model(text, variant, seed):
    return AblationTransformer(replace(variant, vocab_size=text.tokenizer(variant).vocab_size), seed)


def training(text, variant, model, seed, steps):
    """Train the model, and yield the loss of each step."""
    torch.manual_seed(seed)   # for dropout
    optimizer = Optimizer(model, adamw(model, variant.learning_rate, variant.weight_decay))
    for step, batch in zip(range(steps), batches(variant, text.windows(variant), seed)):
        rate = variant.learning_rate * SCHEDULES[variant.schedule](step / steps)
        if variant.z_loss:
            yield z_loss_step(model, optimizer, batch, rate, variant.z_loss)["loss"].item()
        else:
            yield train.train_step(model, optimizer, batch, rate)["loss"].item()


@dataclass
class Run:
    variant: Variant
    seed: int
    steps: int
    path: Path   # of what comes out


def compute(text, run, tell):
    """Train, evaluate, and write the run's file. tell(number): called after so many steps."""
    model, losses = new_model(text, run.variant, run.seed), []
    for loss in training(text, run.variant, model, run.seed, run.steps):
        losses.append(loss)
        tell(1)
    parts = {"development": text.development, "validation": text.validation}
    bits = {name: train.evaluate(model, documents, text.tokenizer(run.variant), run.variant.batch_tokens, "cpu")[1]
            for name, documents in parts.items()}
    curve = [float(piece.mean()) for piece in np.array_split(losses, min(PIECES, run.steps))]
    write_json(run.path, bits | {"parameters": model.num_parameters(), "losses": curve})


# -------------------------------------------------------------------------------------------- files and processes

def digest(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_json(path, content):
    """Whole or not at all, whoever is killed when."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content))
    temporary.replace(path)


def read_json(path):
    """What the file holds, {} if it is not there yet."""
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it, and it is made again") from None


def work(pipe, text):
    """A process that computes the runs that it is sent, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)   # Ctrl-C is for the one that sends
    torch.set_num_threads(1)
    try:
        while True:
            compute(text, pipe.recv(), tell=pipe.send)
            pipe.send("done")
    except (EOFError, ConnectionError):   # nobody sends any more
        pass
    except (InputError, OSError) as error:
        pipe.send(error)


def start_worker(text, first_run):
    """A new process with something to do. Returns our end of the pipe."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(theirs, text), daemon=True).start()
    theirs.close()   # an end that stays open here would hide that the process is gone
    ours.send(first_run)
    return ours


def compute_all(text, runs, workers, tell):
    """Compute the runs, each in one of several processes. tell(run, number): called after so many of its steps."""
    if workers == 1:
        for each in runs:
            compute(text, each, lambda number, each=each: tell(each, number))
        return
    waiting, busy = collections.deque(runs), {}   # busy: {pipe: run}
    while len(busy) < workers and waiting:
        first = waiting.popleft()
        busy[start_worker(text, first)] = first
    while busy:
        for pipe in wait(list(busy)):
            try:
                message = pipe.recv()
            except (EOFError, ConnectionError):
                raise InputError("a process was killed, maybe for want of memory; what is finished is kept: start"
                                 " again, with fewer --workers") from None
            if isinstance(message, Exception):
                raise message
            if message != "done":
                tell(busy[pipe], message)
            elif waiting:
                busy[pipe] = waiting.popleft()
                pipe.send(busy[pipe])
            else:
                del busy[pipe]
                pipe.close()


# ---------------------------------------------------------------------------------------------- equal text, equal time

def step_time_ratio(text, variant, default):
    """How much longer a step of the variant takes than one of the default.

    Both take turns, so that whatever the machine does meets both, and of many turns the median counts. The clock is the
    processor's: what other programs take is not on it.
    """
    pair = [training(text, each, new_model(text, each, 0), 0, 2 ** 31) for each in (variant, default)]
    ratios = []
    for number in range(1 + ROUNDS):
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            start = time.process_time()
            for _ in range(EACH):
                next(pair[which])
            seconds[which] = time.process_time() - start
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])   # the first round warms up


def calibrate(text, arms, chosen, default, path, anew):
    """{name: step_time_ratio} of all variants that are known from the file, the chosen ones being measured if need be.
    """
    keys = {name: digest(text.fingerprint, asdict(default), asdict(variant)) for name, variant in arms.items()}
    known = read_json(path)
    missing = [name for name in chosen if anew or keys[name] not in known]
    for name in tqdm(missing, desc="time of a step", unit="variant", disable=not missing):
        known[keys[name]] = 1.0 if arms[name] == default else step_time_ratio(text, arms[name], default)
        write_json(path, known)
    return {name: known[key] for name, key in keys.items() if key in known}


def plan_steps(text, variant, default, steps, ratio):
    """{budget: steps}: on the same text, for the same time, and on a third of the text."""
    same_text = steps * text.steps_of_an_epoch(variant) / text.steps_of_an_epoch(default)
    same_time = steps / ratio
    if abs(same_time - same_text) <= SAME * same_text:
        same_time = same_text
    return {budget: max(1, round(number))
            for budget, number in (("text", same_text), ("time", same_time), ("third", same_text / 3))}


def plan(text, arms, default, steps, ratios, seeds, folder):
    """{(name, budget): runs, by seed} of the variants whose ratios are known."""
    plans = collections.defaultdict(list)
    for name, ratio in ratios.items():
        for budget, number in plan_steps(text, arms[name], default, steps, ratio).items():
            for seed in range(seeds):
                path = folder / f"{digest(text.fingerprint, asdict(arms[name]), seed, number)}.json"
                plans[name, budget].append(Run(arms[name], seed, number, path))
    return plans
