"""Every way to cut a training step, by hand and by torch: time, bytes sent and memory, measured and on paper.

    python benchmark_layouts.py --ranks 2        (in this folder; starts its own processes)

A step is zero_grad, forward and backward of all packs, the sums over the ranks, clipping, AdamW. All ways are given the
same packs and begin with the same weights. Before anything is timed, their losses over a few steps must be those of one
process. Then they take turns, so that a slow minute falls on all, and the median counts. All in float32: else losses
would differ by rounding.

Ranks on one CPU share its cores; each has cores / ranks threads. So do not look for a way that is much faster than one
process with all cores, but for what each way costs. On GPUs every rank brings its own.

Bytes sent are known from three sides: each Group counts what an algorithm as good as a ring sends (parallel/mesh.py),
predict() says it on paper, and the system counts what really goes through the loopback interface, the mean of the
ranks. torch's own ways have no Group. Where the system counts more, gloo has chosen another algorithm: its
reduce-scatter is an all-reduce of which most is thrown away; NCCL has a real one.

Writes results/ways_CONFIG_DEVICE_RANKS.json.
"""
import contextlib
import functools
import gc
import itertools
import os
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from cli import ArgumentParser, InputError, positive, run
from data import IGNORE, fetch, fill, learned_text, load_documents, packed_sequence_collate_fn, tokenize, training_packs
from device import choose_device, keep_memory
from flops import total_flops, weights
from model import CONFIGS, Transformer
from optimizer import adamw
from parallel import context, pipeline, tensor, zero
from parallel.data import BUCKET, MODES, Overlapped, bucketed, naive, share_out
from parallel.mesh import ALONE, clip_gradients, count_copies, label, make_mesh
from results import write_results
from schedules import Stage
from tokenizer import Tokenizer
from train import loss_sum

LR = 1e-3
STEPS = 3      # of a turn, after a first one that opens connections and makes the moments
PACKS = 4      # of a step, of all ranks together; more where there are more ranks
NET = Path("/proc/net/dev")   # Linux


# ------------------------------------------------------------------------------------------------------ steps
#
# Each has backward(), after which every gradient is where its way keeps it, and update(), which returns the loss of all
# packs.

class ByHand:
    """A step as train.py takes it."""

    def __init__(self, model, mesh, packs, targets, replicas=MODES["0"], schedule="1f1b",
                 sequence=True, loss=loss_sum):
        self.model, self.mesh, self.packs, self.targets, self.loss = model, mesh, packs, targets, loss
        label(model, mesh)
        tensor.split(model, mesh, sequence)
        pipeline.keep_stage(model, mesh, schedule)
        self.replicas = replicas(model, mesh)
        self.optimizer = adamw(self.replicas, LR)
        self.copies = count_copies(self.replicas.parameters(), mesh)

    def forward(self, pack):
        out = self.loss(self.model, pack)
        return out / self.targets if out.dim() == 0 else out

    def backward(self):
        self.optimizer.zero_grad()
        self.total = pipeline.run_stage(self.model, self.packs, self.forward,
                                        lambda: self.replicas.before_backward(last=True))

    def update(self):
        self.replicas.finish()
        total = self.mesh.data.all_reduce(self.total)
        tensor.sum_partial(self.replicas.parameters(), self.mesh)
        pipeline.sum_tied(self.replicas.parameters(), self.mesh)
        clip_gradients(self.replicas.parameters(), self.copies, self.mesh, 1.0)
        self.optimizer.step()
        self.replicas.after_step()
        return total.item()


def after_backward(model, sum_gradients):
    """naive or bucketed behind the methods of Overlapped."""
    return SimpleNamespace(parameters=lambda: list(model.parameters()), before_backward=lambda last: None,
                           finish=lambda: sum_gradients(model.parameters()), after_step=lambda: None)


def loss_by_ulysses(model, pack):
    part = context.split(pack, model.mesh.cp)
    return model(part.input_ids, part.position_ids, part.cu_seqlens, part.max_seqlen, part.targets,
                 attend=context.ulysses(pack, model.mesh.cp))


def loss_alone(model, pack):
    return model(pack.input_ids, pack.position_ids, pack.cu_seqlens, pack.max_seqlen, pack.targets)


class Plain:
    """A step of one process: nothing but PyTorch. With parallelize_module it stays as it is."""

    def __init__(self, model, mesh, packs, targets):
        self.model, self.mesh, self.packs, self.targets = model, mesh, packs, targets
        if mesh.tp.size > 1:
            tensor.split_with_torch(model, mesh.device_mesh["tp"])
        self.optimizer = adamw(model, LR)

    def backward(self):
        self.optimizer.zero_grad()
        self.total = 0
        for i, pack in enumerate(self.packs):
            with self.alone(last=i == len(self.packs) - 1):
                loss = loss_alone(self.model, pack) / self.targets
                loss.backward()
            self.total += loss.detach()

    def alone(self, last):
        return contextlib.nullcontext()

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return self.total.item()


class WithDDP(Plain):
    """DistributedDataParallel takes the mean over the ranks; times their number it is the sum."""

    def __init__(self, model, mesh, packs, targets):
        super().__init__(model, mesh, packs, targets / mesh.dp.size)
        self.model = DistributedDataParallel(model, process_group=mesh.dp.pg, bucket_cap_mb=bucket(model) / 2 ** 20,
                                             gradient_as_bucket_view=True)   # or it holds every gradient twice

    def alone(self, last):
        return contextlib.nullcontext() if last else self.model.no_sync()

    def update(self):
        super().update()
        return self.mesh.dp.all_reduce(self.total).item() / self.mesh.dp.size


class WithSchedule:
    """1F1B by torch.distributed.pipelining. What it leaves to others, the tied table and clipping, is ours."""

    def __init__(self, model, mesh, packs, targets):
        self.mesh = mesh
        label(model, mesh)
        pipeline.keep_stage(model, mesh)
        self.model, self.optimizer = model, adamw(model, LR)
        self.copies = count_copies(model.parameters(), mesh)

        def loss(logits, right):
            return F.cross_entropy(logits, right[0], ignore_index=IGNORE, reduction="sum") / targets
        stage = PipelineStage(Stage(model), mesh.pp.rank, mesh.pp.size, packs[0].input_ids.device, group=mesh.pp.pg)
        self.schedule = Schedule1F1B(stage, len(packs), loss, scale_grads=False)
        self.ids, self.right, self.positions = (torch.stack([getattr(pack, key) for pack in packs])      # (m, T) each
                                                for key in ("input_ids", "targets", "position_ids"))

    def backward(self):
        self.optimizer.zero_grad()
        self.losses = []
        self.schedule.step(*[self.ids] if self.mesh.pp.rank == 0 else [], position_ids=self.positions,
                           target=self.right,
                           losses=self.losses, return_outputs=False)

    def update(self):
        parameters = list(self.model.parameters())
        pipeline.sum_tied(parameters, self.mesh)
        clip_gradients(parameters, self.copies, self.mesh, 1.0)
        self.optimizer.step()
        return self.mesh.pp.all_reduce(sum(self.losses, torch.zeros((), device=self.ids.device))).item()


def bucket(model):
    """Bytes. The 25 MB that are usual would take a small model's gradients whole, and leave nothing to overlap."""
    return min(BUCKET, sum(p.nbytes for p in model.parameters()) // 4)


# ------------------------------------------------------------------------------------------------------- ways

@dataclass
class Way:
    name: str
    by: str              # hand or torch
    axis: str            # of the mesh, along which all ranks are; "": one process, while the others wait
    make: Callable       # make(model, mesh, packs, targets): a step
    rival: str = ""      # how torch's way to do the same is called
    stage: int = 0       # of ZeRO


def by_hand(name, axis, rival="", stage=0, **settings):
    return Way(name, "hand", axis, functools.partial(ByHand, **settings), rival, stage)


DDP, FSDP, TP, PP = "DistributedDataParallel", "fully_shard", "parallelize_module", "Schedule1F1B"
ONE, ALL = "one process, one thread", "one process, all cores"
LAYOUTS = [
    Way(ONE, "", "", Plain), Way(ALL, "", "", Plain),
    by_hand("data parallel, naive", "dp", DDP, replicas=lambda model, mesh: after_backward(model, naive)),
    by_hand("data parallel, bucketed", "dp", DDP, replicas=lambda model, mesh: after_backward(
        model, functools.partial(bucketed, limit=bucket(model)))),
    by_hand("data parallel, overlapped", "dp", DDP, replicas=lambda model, mesh: Overlapped(model, bucket(model))),
    Way(DDP, "torch", "dp", WithDDP),
    by_hand("ZeRO 1", "dp", stage=1, replicas=MODES["1"]),
    by_hand("ZeRO 2", "dp", stage=2, replicas=MODES["2"]),
    by_hand("ZeRO 3", "dp", FSDP, stage=3, replicas=MODES["3"]),
    Way(FSDP, "torch", "dp", functools.partial(ByHand, replicas=zero.FullySharded), stage=3),
    by_hand("tensor parallel, plain", "tp", TP, sequence=False),
    by_hand("tensor parallel, sequence", "tp", TP),
    Way(TP, "torch", "tp", Plain),
    by_hand("pipeline, GPipe", "pp", schedule="gpipe"),
    by_hand("pipeline, 1F1B", "pp", PP),
    Way(PP, "torch", "pp", WithSchedule),
    by_hand("context parallel, ring", "cp"),
    by_hand("context parallel, Ulysses", "cp", loss=loss_by_ulysses),
]


def predict(way, config, n, m, T):
    """(bytes that the busiest of n ranks sends in a step of m packs of T tokens, bytes that the fullest one holds).

    Held are weights, gradients and moments. None: there is no formula here.
    """
    with torch.device("meta"):
        model = Transformer(config)
    whole, blocks, table = (sum(p.nbytes for p in part.parameters())
                            for part in (model, model.model.layers, model.lm_head))
    layers, one = config.num_hidden_layers, 2 * 4 * (n - 1) // n   # one: to sum a single number, the loss or the norm
    if way.axis == "dp":
        sent = zero.step_bytes(way.stage, n, blocks, whole - blocks, packs=m / n) + 2 * one
        return sent, zero.bytes_per_parameter(way.stage, n) * whole / 4
    if way.axis == "tp":   # norms: their gradients, once a step. The loss is known to all
        norms, and_pack = (tensor.bytes_sent(config, tokens, n, sequence="plain" not in way.name) for tokens in (0, T))
        sent = m * (and_pack - norms) + norms + one
        held = 4 * sum(p.nbytes / (n if p.dim() == 2 else 1) for p in model.parameters())
        return None if way.by == "torch" else sent, held
    if way.axis == "pp":
        stream, tied = m * T * config.hidden_size * 4, config.tie_word_embeddings * table
        norm = model.model.norm.weight.nbytes
        costs, sent, held = weights(config), [], []
        cuts = pipeline.stage_layers(layers, n, costs["head"] * layers / costs["linear"])
        for stage, (start, end) in enumerate(cuts):
            is_end = stage in (0, n - 1)
            sent.append(stream * (2 - is_end) + tied * is_end + 2 * one)
            held.append(4 * ((end - start) * blocks / layers + table * is_end + norm * (stage == n - 1)))
        return max(sent), max(held)
    if way.axis == "cp":
        heads = [config.num_key_value_heads, config.head_dim]
        there, back = (context.ring_bytes(T, n, *heads) if "ring" in way.name else
                       context.ulysses_bytes(T, n, config.num_attention_heads, *heads))
        return m * layers * (there + back) + 2 * whole * (n - 1) // n + 2 * one, 4 * whole
    return 0, 4 * whole


# -------------------------------------------------------------------------------------------------- measuring

class Peak(TorchDispatchMode):
    """held.Held where memory comes and goes under the same tensor: ZeRO 3 empties weights.

    So it asks all of them, every time.
    """

    def __init__(self, tensors):
        super().__init__()
        self.living, self.peak = weakref.WeakValueDictionary(), 0
        self.look(tensors)

    def look(self, tensors):
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = local(tensor).untyped_storage()
                self.living[storage._cdata] = storage
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.living.values()))

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        results = operator(*args, **(kwargs or {}))
        self.look(results)
        return results


def local(tensor):
    """Of a DTensor what is here."""
    return getattr(tensor, "_local_tensor", tensor)


def kept(step):
    """Weights, gradients and moments of a step, as this rank has them."""
    of_replicas = step.replicas.parameters() if hasattr(step, "replicas") else []
    parameters = [*step.model.parameters(), *of_replicas]
    moments = [x for state in step.optimizer.state.values() for x in state.values() if x.dim() > 0]
    return [local(x) for x in [*parameters, *(p.grad for p in parameters), *moments] if x is not None]


def storage_bytes(tensors):
    """What several share counts once."""
    return sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}.values())


def on_wire():
    """Bytes that this machine has sent to itself."""
    if not NET.is_file():
        return 0
    return next(int(line.split()[9]) for line in NET.read_text().splitlines() if line.split()[0] == "lo:")


class Bench:
    """The packs, a mesh for each axis with all ranks along it, and what is measured with them."""

    def __init__(self, config, packs, T, device):
        gc.freeze()   # all that is imported stays, and need not be looked through before each turn
        self.config, self.device, self.ranks = config, device, dist.get_world_size()
        self.meshes = {axis: make_mesh(device, **{axis: self.ranks}) for axis in ("dp", "cp", "pp", "tp")}
        self.meshes[""], self.world = ALONE, self.meshes["dp"]   # any of them has all ranks in mesh.world
        self.packs = [fill(packed_sequence_collate_fn(pack), T).to(device) for pack in packs]
        self.costs = [total_flops(config, pack.cu_seqlens.cpu()) for pack in self.packs]
        self.targets = sum((pack.targets != IGNORE).sum().item() for pack in self.packs)

    def begin(self, way):
        """A new model and what makes a way's steps; None on ranks that wait."""
        gc.collect()   # the way before: its hooks and tensors are rings of references
        torch.set_num_threads({ONE: 1, ALL: os.cpu_count()}.get(way.name, max(os.cpu_count() // self.ranks, 1)))
        if not way.axis and not self.world.is_main:
            return None
        torch.manual_seed(0)   # the same weights for all ways and ranks
        mesh = self.meshes[way.axis]
        mine = share_out(self.packs, self.costs, mesh.dp.size)[mesh.dp.rank]
        return way.make(Transformer(self.config).to(self.device), mesh, mine, self.targets)

    def check(self, way):
        """[loss of each step], and of the rank that has most: bytes sent, held after backward, and held at the peak of
        a step.
        """
        step, mesh = self.begin(way), self.meshes[way.axis]
        losses, sent, held, peak = [], 0, 0, 0
        if step:
            for _ in range(STEPS):
                before = mesh.sent
                step.backward()
                held = storage_bytes(kept(step))
                losses.append(step.update())
                sent = mesh.sent - before
            with Peak(kept(step)) as count:
                step.backward()
                losses.append(step.update())
            peak = count.peak
        losses = [self.world.largest(x) for x in losses or [0.0] * (STEPS + 1)]
        return losses, *map(self.world.largest, (sent, held, peak))

    def turn(self, way):
        """[(seconds, bytes on the wire)] of some steps."""
        step, found = self.begin(way), []
        for _ in range(1 + STEPS):
            dist.barrier()
            before = on_wire()
            dist.barrier()   # nobody begins before it has been read
            start = time.perf_counter()
            if step:
                step.backward()
                step.update()
            seconds = self.world.largest(time.perf_counter() - start)
            dist.barrier()
            found.append((seconds, on_wire() - before))
        return found[1:]


def measure(config, packs, T, rounds, device):
    """In every rank: the rows of the table. packs: of documents, as training_packs makes them; filled up to T tokens.
    """
    bench, rows, m, n = Bench(config, packs, T, device), {}, len(packs), dist.get_world_size()
    ways = [way for way in LAYOUTS if way.name != ALL or device == "cpu"]
    print(f"losses of {STEPS + 1} steps:")
    for way in ways:
        losses, sent, held, peak = bench.check(way)
        print(f"    {way.name:<28}" + "".join(f"{loss:>11.6f}" for loss in losses), flush=True)
        expected = losses if way.name == ONE else expected
        assert all(abs(a - b) < 1e-4 * b for a, b in zip(losses, expected)), f"{way.name}: {losses}, not {expected}"
        on_paper, will_hold = predict(way, config, n, m, T)
        row = rows[way.name] = {"way": way.name, "by": way.by, "held": held / 2 ** 20, "predicted": will_hold / 2 ** 20,
                                "peak": peak / 2 ** 20}
        if way.by != "torch":
            row["counted"] = sent / 1e6
        if on_paper is not None:
            row["formula"] = on_paper / 1e6
    seconds, wire = ({way.name: [] for way in ways} for _ in range(2))
    for _, way in itertools.product(range(rounds), ways):
        for taken, moved in bench.turn(way):
            seconds[way.name].append(taken)
            wire[way.name].append(moved)
    times = {name: median(all_of_it) for name, all_of_it in seconds.items()}
    for way in ways:
        rows[way.name] |= {"ms": times[way.name] * 1e3, "tokens_per_second": m * T / times[way.name],
                           "speed": times[ONE] / times[way.name],
                           "rival": times[way.rival] / times[way.name] if way.rival else ""}
        if NET.is_file() and device == "cpu":
            rows[way.name]["wire"] = min(wire[way.name]) / n / 1e6   # others may have used it too
    return list(rows.values())


# -------------------------------------------------------------------------------------------------------- main

COLUMNS = {"way": "way", "by": "by", "ms": "ms a step", "tokens_per_second": "tokens/s",
           "speed": "times one process, one thread",
           "rival": "times torch's own", "counted": "MB sent, counted", "formula": "MB by formula",
           "wire": "MB on the wire",
           "held": "MiB of weights, gradients, moments", "predicted": "MiB predicted", "peak": "MiB at the step's peak"}


def first_packs(config, source, T, number):
    """The first packs of a training run; the small BPE tokens serve all configurations."""
    documents, _ = load_documents(source)
    tokenizer = Tokenizer.train(list(map(learned_text, documents)), CONFIGS["small"].vocab_size)
    windows, _ = tokenize(documents, tokenizer, min(T, config.max_position_embeddings))
    return list(itertools.islice(training_packs(windows, T, seed=0), number))


def show(rows):
    keys = [key for key in COLUMNS if key not in ("way", "by", "tokens_per_second")]
    print("\n" + " " * 28 + "".join(f"{key:>11}" for key in keys))
    for row in rows:
        cells = (f"{row[key]:,.2f}" if isinstance(row.get(key), float) else "-" for key in keys)
        print(f"{row['way']:<28}" + "".join(f"{cell:>11}" for cell in cells))


def work(rank, arguments, folder, packs, source, command):
    """One of the processes."""
    device, ranks, name = arguments.device, arguments.ranks, arguments.config
    keep_memory()
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo", init_method=f"file://{folder}/store", rank=rank,
                            world_size=ranks)
    if rank > 0:
        sys.stdout = open(os.devnull, "w")
    rows = measure(CONFIGS[name], packs, arguments.batch_tokens, arguments.rounds, device)
    show(rows)
    if rank == 0:
        print(write_results(f"ways_{name}_{device}_{ranks}", command, COLUMNS, rows, device, source))
    dist.destroy_process_group()


def work_and_leave(*arguments):
    work(*arguments)
    sys.stdout.flush()
    os._exit(0)   # why not as Python ends: start_ranks in parallel/mesh.py


def main():
    parser = ArgumentParser(description="Compare the ways to cut a training step: time, bytes sent, memory.")
    parser.add_argument("--ranks", type=positive(int), default=2, metavar="N", help="processes; on GPUs as many GPUs")
    parser.add_argument("--rounds", type=positive(int), default=5, metavar="N",
                        help=f"turns of each way, {STEPS} steps each")
    parser.add_argument("--config", choices=[name for name, config in CONFIGS.items() if not config.num_experts],
                        default="small",
                        help="model size, see model.py")
    parser.add_argument("--data", default="tinyshakespeare", metavar="NAME|PATH", help="as train.py takes it")
    parser.add_argument("--batch-tokens", type=positive(int), default=1024, metavar="T", help="tokens of a pack")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where to run")
    arguments = parser.parse_args()
    arguments.device, ranks, config = choose_device(arguments.device), arguments.ranks, CONFIGS[arguments.config]
    if arguments.device == "mps":   # of which gloo knows nothing
        arguments.device = "cpu"
    if ranks < 2:
        raise InputError("--ranks 1 has nothing to compare; take 2 or more")
    if arguments.device == "cuda" and torch.cuda.device_count() < ranks:
        raise InputError(f"--ranks {ranks} needs as many GPUs, for NCCL gives each rank its own; here there are"
                         f" {torch.cuda.device_count()}; --device cpu takes any number")
    if arguments.batch_tokens % (2 * ranks):
        raise InputError(f"--batch-tokens {arguments.batch_tokens} cannot be cut into two equal pieces for each of"
                         f" {ranks} ranks; take a multiple of {2 * ranks}")
    tensor.check(config, ranks)
    pipeline.stage_layers(config.num_hidden_layers, ranks)
    source = fetch(arguments.data)
    packs = first_packs(config, source, arguments.batch_tokens, -(-PACKS // ranks) * ranks)
    command = " ".join([f"python {Path(__file__).resolve().parent.name}/benchmark_layouts.py", *sys.argv[1:]])
    os.environ["OMP_NUM_THREADS"] = str(max(os.cpu_count() // ranks, 1))
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work_and_leave, (arguments, folder, packs, source, command), nprocs=ranks)


if __name__ == "__main__":
    run(main)
