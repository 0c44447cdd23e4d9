"""Several ranks for tests: processes that stay, because starting one costs seconds.

    def work(chapter, number):            # at the top level of a test module; runs in every rank
        mesh = chapter.parallel.mesh.make_mesh(dp=4)
        return mesh.world.all_reduce(torch.tensor(number)).item()

    def test_sum(ranks):
        assert ranks(4, work, 1.0) == [4.0] * 4      # what each rank returned

The ranks talk over gloo, each with one thread, as torchrun would start them. What a rank raises is raised in the test,
and then all of them are ended: the others would wait for it.
"""
import datetime
import gc
import os
import queue
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

import warm

CHAPTER = "chapter-06-parallelism"
TIMEOUT = 100   # seconds that a rank waits for another, and a test for the ranks


def loop(rank, size, file, tasks, answers):
    """A rank: takes functions and answers what they return, until it is given None."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    from chapters import load_chapter
    gc.freeze()   # what is here now stays: there is no need to look through it each time
    number = 0
    while task := tasks.get():
        name, work, arguments = task
        # A mesh brings groups, and each group threads that would stay until the end: so every task begins a world of
        # its own.
        number += 1
        dist.init_process_group("gloo", init_method=f"file://{file}{number}", rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=TIMEOUT))
        torch.manual_seed(0)
        try:
            answer = rank, work(load_chapter(name), *arguments), None
        except BaseException:
            answers.put((rank, None, traceback.format_exc()))
            continue   # this process will be ended
        dist.destroy_process_group()
        gc.collect()
        answers.put(answer)


def assemble(pieces, tolerance=1e-6):
    """Whole tensors from the pieces that the ranks hold: [[(name, shape, offset, tensor), ...] for each rank] -> {name:
    tensor}.

    shape and offset: of the whole tensor, and where in it this piece begins (parameter.piece of parallel.py). Where
    several ranks hold the same numbers these must agree, within tolerance of the largest; what no rank holds is an
    error.
    """
    whole = {}
    for rank, held in enumerate(pieces):
        for name, shape, offset, tensor in held:
            whole.setdefault(name, torch.full(tuple(shape), torch.nan, dtype=tensor.dtype))
            assert whole[name].shape == tuple(shape), (f"{name}: {tuple(shape)} on rank {rank}, "
                                                       f"before {tuple(whole[name].shape)}")
            place = whole[name][tuple(slice(start, start + length) for start, length in zip(offset, tensor.shape))]
            known = ~place.isnan()
            if known.any():
                worst = (place - tensor)[known].abs().max()
                assert worst <= tolerance * tensor.abs().max(), (
                    f"{name}: rank {rank} differs from one before it by {worst}")
            place.copy_(tensor)
    for name, tensor in whole.items():
        assert not tensor.isnan().any(), (f"{name}: {tensor.isnan().sum()} of {tensor.numel()} numbers are with no "
                                          "rank, or nan")
    return whole


class Ranks:
    """Call it: ranks(size, work, *arguments) -> [what work(chapter, *arguments) returned in each rank]."""

    def __init__(self):
        self.pools = {}

    def start(self, size):
        context = warm.context()
        folder = tempfile.mkdtemp()
        answers, tasks = context.Queue(), [context.Queue() for _ in range(size)]
        processes = [context.Process(target=loop, args=(rank, size, os.path.join(folder, "store"), tasks[rank],
                                                        answers), daemon=True)
                     for rank in range(size)]
        for process in processes:
            process.start()
        self.pools[size] = processes, tasks, answers

    def stop(self, size):
        processes, tasks, _ = self.pools.pop(size)
        for process in processes:
            process.kill()
            process.join()

    def close(self):
        for size in list(self.pools):
            self.stop(size)

    def __call__(self, size, work, *arguments, chapter=CHAPTER):
        if size not in self.pools:
            self.start(size)
        _, tasks, answers = self.pools[size]
        for task in tasks:
            task.put((chapter, work, arguments))
        found = {}
        while len(found) < size:
            try:
                rank, value, error = answers.get(timeout=TIMEOUT + 20)
            except queue.Empty:
                error, rank = f"no answer from ranks {set(range(size)) - found.keys()}", None
            if error:
                self.stop(size)   # the others wait for this one, for ever
                raise AssertionError(f"rank {rank}:\n{error}")
            found[rank] = value
        return [found[rank] for rank in range(size)]
