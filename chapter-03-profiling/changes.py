"""What is each change worth? The same training steps with it and without it, in turns; those that are worth nothing
too.

    python changes.py                        small configuration, a few minutes   (in this folder)
    python changes.py --without-compile      where there is no C++ compiler

Each way of taking a step lives in a process of its own, because some changes touch all of a process, and waits there
for its turn: in each round every way takes the same steps. Disturbances only ever add time, so each way's fastest round
counts, pack by pack. Every way must arrive at the same loss. Writes results/changes.json.
"""
import itertools
import multiprocessing
import random
import shutil
import sys
import threading
import time
from pathlib import Path

PACKS, ROUNDS, SETS, WARM_UP = 12, 6, 2, 4


# ------------------------------------------------------------ changes to chapter 3's step; each may touch its modules

def plain_optimizer(ways):
    """Chapter 2's AdamW: a dozen passes over memory."""
    for group in ways.optimizer.param_groups:
        group["fused"] = False


def unsorted_packs(ways):
    """Documents as the packer found them: fewer neighbours of equal length."""
    for pack in ways.packs:
        random.Random(0).shuffle(pack)


def attention_by_autograd(ways):
    """Chapter 2's loop over stacks of equal documents, every call with autograd nodes of its own."""
    def attention(q, k, v, cu_seqlens):
        return [ways.torch.cat([ways.F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True)
                                .transpose(1, 2).flatten(0, 1) for qkv in ways.custom_ops.stacks(cu_seqlens, q, k, v)])]
    ways.model_file.grouped_attention = attention


def data_ahead(ways):
    """A thread lays out the next pack while this one is computed."""
    collate, ready = ways.collate, {}

    def prepare(pack):
        ready[id(pack)] = collate(pack)

    def next_batch(pack):
        if ways.helper:
            ways.helper.join()
        batch = ready.pop(id(pack), None) or collate(pack)
        following = ways.packs[(ways.packs.index(pack) + 1) % len(ways.packs)]
        ways.helper = threading.Thread(target=prepare, args=(following,))
        ways.helper.start()
        return batch
    ways.helper, ways.collate = None, next_batch


def memory_given_back(ways):
    """Without keep_memory: glibc as it is."""
    ways.keep_memory = lambda: None


def norm_by_autograd(ways):
    """Chapter 2's RMSNorm, step by step."""
    def forward(self, x):
        y = x * ways.torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * y
    ways.model_file.RMSNorm.forward = forward


def gate_and_up_together(ways):
    """One matrix product for the two branches of the MLP."""
    def forward(self, x):
        weight = ways.torch.cat([self.gate_proj.weight, self.up_proj.weight])
        gate, up = ways.F.linear(x, weight).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)
    ways.model_file.MLP.forward = forward


def profiled(ways):
    """As under train.py --profile, while the profiler is active."""
    profiler = ways.torch.profiler.profile(record_shapes=True, profile_memory=True)
    profiler.start()
    ways.profiler = profiler   # never stopped: what it has found is not looked at here


def compiled(ways):
    """train.py --compile default."""
    collate = ways.collate
    ways.collate = lambda pack: ways.fill(collate(pack), 1024)
    ways.loss_sum = ways.torch.compile(ways.loss_sum, fullgraph=True)


# name, the chapter whose step it is, and the changes to it
MODES = [("chapter 2", "chapter-02-qwen3-packed", []),
        ("chapter 3", "chapter-03-profiling", []),
        ("chapter 3 without the fused optimizer", "chapter-03-profiling", [plain_optimizer]),
        ("chapter 3 without sorted packs", "chapter-03-profiling", [unsorted_packs]),
        ("chapter 3 without the operator", "chapter-03-profiling", [attention_by_autograd]),
        ("chapter 3 without freed memory kept", "chapter-03-profiling", [memory_given_back]),
        ("chapter 3 without RMSNorm's gradient by hand", "chapter-03-profiling", [norm_by_autograd]),
        ("chapter 3 and data ahead, in a thread", "chapter-03-profiling", [data_ahead]),
        ("chapter 3 and gate and up in one product", "chapter-03-profiling", [gate_and_up_together]),
        ("chapter 3 while it is profiled", "chapter-03-profiling", [profiled]),
        ("chapter 3, --compile default", "chapter-03-profiling", [compiled])]


# ---------------------------------------------------------------------------------------- one way, in its own process

class Steps:
    """The training step of a chapter, its parts as attributes for the changes above."""

    def __init__(self, chapter, changes, source):
        # A script of one chapter never imports another's files; this process is that of the other chapter.
        sys.path[0] = str(Path(__file__).resolve().parent.parent / chapter)
        import torch
        import torch.nn.functional as F
        import benchmark_padding, data, model, train
        self.torch, self.F, self.model_file, self.loss_sum = torch, F, model, train.loss_sum
        self.collate, self.IGNORE = data.packed_sequence_collate_fn, data.IGNORE
        self.packs = benchmark_padding.first_packs("small", source, 1024, PACKS + WARM_UP)
        torch.manual_seed(0)
        self.model = model.Transformer(model.CONFIGS["small"])
        self.optimizer, self.keep_memory = train.adamw(self.model, 1e-3), lambda: None   # chapter 2 has no keep_memory
        if "03" in chapter:
            import custom_ops
            self.custom_ops, self.fill, self.keep_memory = custom_ops, data.fill, train.keep_memory
        for change in changes:
            change(self)
        self.keep_memory()

    def step(self, number):
        """(seconds, loss) of a step on a pack."""
        start = time.perf_counter()
        batch = self.collate(self.packs[number])
        loss = self.loss_sum(self.model, batch) / (batch.targets != self.IGNORE).sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return loss.item(), time.perf_counter() - start


def serve(connection, *way):
    steps = Steps(*way)
    first = time.perf_counter()
    for number in range(WARM_UP):
        steps.step(PACKS + number)
    connection.send(time.perf_counter() - first)
    while True:
        connection.send(steps.step(connection.recv()))


def in_turns(ways, source):
    """[(seconds of each pack, seconds of the first steps, last loss)], one for each of the ways."""
    spawn, children = multiprocessing.get_context("spawn"), []
    for _, chapter, changes in ways:
        connection, other = spawn.Pipe()
        process = spawn.Process(target=serve, args=(other, chapter, changes, source), daemon=True)
        process.start()
        # One after the other: no way warms up beside another.
        children.append((connection, connection.recv(), process))
    fastest = [[float("inf")] * PACKS for _ in ways]
    losses = [None] * len(ways)
    # All packs in a row before the next way's turn: after another process the caches are cold.
    for _, (way, (connection, *_)), number in itertools.product(range(ROUNDS), enumerate(children), range(PACKS)):
        connection.send(number)
        losses[way], seconds = connection.recv()
        fastest[way][number] = min(fastest[way][number], seconds)
    for *_, process in children:
        process.kill()   # one that is profiled would not end by itself
    return [(seconds, first, loss) for seconds, (_, first, _), loss in zip(fastest, children, losses)]


def measure(ways, source):
    """As in_turns, the fastest of several sets of processes: where its memory happens to lie is a process's luck."""
    sets = [in_turns(ways, source) for _ in range(SETS)]
    return [([min(seconds) for seconds in zip(*(seconds for seconds, *_ in found))], found[0][1], found[0][2])
            for found in zip(*sets)]


def main():
    from cli import ArgumentParser, InputError
    from data import fetch
    from results import write_results
    parser = ArgumentParser(description="The same training steps with each change and without it.")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as in train.py")
    parser.add_argument("--without-compile", action="store_true", help="leave the compiled step out")
    arguments = parser.parse_args()
    if not arguments.without_compile and not any(map(shutil.which, ("g++", "clang++"))):
        raise InputError("the last row needs a C++ compiler, g++ or clang++; leave it out: --without-compile")
    ways = MODES[:-1] if arguments.without_compile else MODES
    source = fetch(arguments.data)
    found = measure(ways, source)
    assert max(loss for *_, loss in found) - min(loss for *_,
                                                 loss in found) < 1e-2, f"they disagree: {[f[2] for f in found]}"
    of_chapter_2, of_chapter_3 = (sum(seconds) for seconds, *_ in found[:2])
    rows = []
    for (name, *_), (seconds, first, _) in zip(ways, found):
        rows.append({"way": name, "ms": sum(seconds) / PACKS * 1e3, "chapter_2": of_chapter_2 / sum(seconds),
                     "chapter_3": of_chapter_3 / sum(seconds), "first": first})
        if name.endswith("--compile default") and sum(seconds) < of_chapter_3:
            rows[-1]["pays"] = round(PACKS * (first - rows[1]["first"]) / (of_chapter_3 - sum(seconds)))
        else:
            rows[-1]["pays"] = ""
        print("{way:<46}{ms:>8.2f} ms{chapter_2:>8.3f}x chapter 2{chapter_3:>8.3f}x chapter 3".format(**rows[-1]))
    columns = {"way": "step", "ms": "ms/step", "chapter_2": "times chapter 2", "chapter_3": "times chapter 3",
               "first": f"first {WARM_UP} steps, s", "pays": "pays after steps"}
    command = "python chapter-03-profiling/changes.py" + "".join(f" {argument}" for argument in sys.argv[1:])
    print(write_results("changes", command, columns, rows, data=source))


if __name__ == "__main__":
    from cli import run
    run(main)
