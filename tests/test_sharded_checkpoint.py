"""Chapter 6: a checkpoint that one layout of ranks wrote is read by any other."""
import functools
import json
import os
import resource
import struct
import subprocess
import sys
import zlib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from chapters import load_chapter
from test_train import killed_at_every_instant

CHAPTER = "chapter-06-parallelism"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
# Ways to cut a model. In "late" and "thin" some ranks have no rows; in "late" the first one begins where the second
# does.
LAYOUTS = ("replicas", "rows", "late", "thin", "columns", "both", "stages")


@pytest.fixture(scope="module")
def chapter():
    return load_chapter(CHAPTER)


@functools.cache
def tokenizer_of(chapter):
    return chapter.make_tokenizer(["a word and another", "and a word"], vocab_size=262)


def config(chapter, **changes):
    return chapter.model.ModelConfig(**{
        "vocab_size": 37, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 6, "max_position_embeddings": 32, **changes})


def value(kind, name, shape):
    """What the whole tensor of this name is, on any rank."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{kind} {name}".encode())))


def rows(length, ranks, rank):
    """Start and length of a rank's share: ceil(length / ranks), the last ones less or nothing."""
    share = -(-length // ranks)
    start = min(rank * share, length)
    return start, min(share, length - start)


def cut(chapter, parameter, layout, size, rank):
    """The part of a labelled parameter that a rank has in a layout, or None."""
    def along(dim, ranks, place):
        return lambda p: chapter.parallel.mesh.cut(p, dim, *rows(p.shape[dim], ranks, place))

    name, cuts = parameter.piece.name, []
    if layout == "rows":
        cuts = [along(0, size, rank)]
    elif layout == "late":
        cuts = [along(0, size - 1, rank - 1) if rank else lambda p: chapter.parallel.mesh.cut(p, 0, 0, 0)]
    elif layout == "thin":   # five parts for fewer ranks than that: the first has two of them
        start, length = rows(parameter.shape[0], 5, rank + 1)
        cuts = [lambda p: chapter.parallel.mesh.cut(p, 0, start, length) if rank
                else chapter.parallel.mesh.cut(p, 0, 0, start + length)]
        if rank == size - 1:
            cuts = [lambda p: chapter.parallel.mesh.cut(p, 0, start, p.shape[0] - start)]
    elif layout == "columns" and parameter.dim() == 2:
        cuts = [along(1, size, rank)]
    elif layout == "both":
        cuts = [along(0, 2, rank // 2 if size > 2 else rank)]
        if parameter.dim() == 2 and size > 2:
            cuts.append(along(1, 2, rank % 2))
    # The tied table is on the first and on the last; each stage is there twice with four ranks.
    elif layout == "stages":
        last = rank >= size / 2
        if not ("embed_tokens" in name or (("layers.2" in name or name == "model.norm.weight") if last
                                           else "model.layers" in name
                                           and "layers.2" not in name)):
            return None
    for step in cuts:
        parameter = step(parameter)
    return parameter


MESHES = {}


def make_mesh(chapter, size):
    """One for each world: each mesh opens connections of its own."""
    if size == 1:
        return chapter.parallel.mesh.ALONE
    world = torch.distributed.group.WORLD
    if world not in MESHES:
        MESHES.clear()
        MESHES[world] = chapter.parallel.mesh.make_mesh(dp=size)
    return MESHES[world]


def adamw(parts):
    return torch.optim.AdamW(parts, lr=1e-3, weight_decay=0.1, fused=True)


def build(chapter, layout, size, rank, filled, step=3, **changes):
    """What a rank has of a model and its optimizer in a layout: all numbers as value() says if filled, else nan."""
    model = chapter.model.Transformer(config(chapter, **changes))
    mesh = make_mesh(chapter, size)
    chapter.parallel.mesh.label(model, mesh)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(value("weight", parameter.piece.name, parameter.shape) if filled
                            else torch.tensor(float("nan")))
    whole = list(model.parameters())
    parts = torch.nn.ParameterList([part for part in (cut(chapter, p, layout, size, rank) for p in whole)
                                    if part is not None])
    optimizer = adamw(parts)
    if filled:
        for part in parts:
            optimizer.state[part] = {"step": torch.tensor(float(step))} | {
                key: value(key, part.piece.name, part.piece.shape)[where(part)].contiguous()
                for key in ("exp_avg", "exp_avg_sq")}
    return mesh, parts, optimizer


def where(part):
    return tuple(slice(start, start + length) for start, length in zip(part.piece.offset, part.shape))


def wrong(chapter, parts, optimizer):
    """Names of what is not bit-equal to the same rectangle of the whole."""
    found = []
    for part in parts:
        if part.numel():
            state = optimizer.state[part]
            tensors = {"weight": part.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
            found += [f"{key} {part.piece.name}" for key, tensor in tensors.items()
                      if not torch.equal(tensor, value(key, part.piece.name, part.piece.shape)[where(part)])]
            if state["step"] != 3:
                found.append(f"step {part.piece.name} {state['step']}")
    return found


def write(chapter, folder, parts, optimizer, mesh, step=3, **changes):
    chapter.parallel.checkpoint.save_sharded(folder, config(chapter, **changes), parts, optimizer,
                                            {"step": step, "settings": {"seed": 1}}, tokenizer_of(chapter), mesh)


def save(chapter, folder, layout, size, rank, step=3, **changes):
    mesh, parts, optimizer = build(chapter, layout, size, rank, filled=True, step=step, **changes)
    write(chapter, folder, parts, optimizer, mesh, step, **changes)


def load(chapter, folder, layout, size, rank):
    mesh, parts, optimizer = build(chapter, layout, size, rank, filled=False)
    state = chapter.parallel.checkpoint.load_sharded(folder, parts, optimizer, mesh)
    return [] if state == {"step": 3, "settings": {"seed": 1}} else [str(state)], wrong(chapter, parts, optimizer)


def many_pairs(chapter, folder):
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    answers = {}
    for i, layout in enumerate(LAYOUTS):
        save(chapter, folder / layout, layout, size, rank)
        for other in (layout, LAYOUTS[i - 1], LAYOUTS[i - 3]):
            answers[layout, other] = load(chapter, folder / layout, other, size, rank)
    return answers


def test_any_layout_reads_what_any_other_wrote(ranks, chapter, tmp_path):
    """4 ranks, each layout read by three and then in one process, without torch.distributed."""
    for answer in ranks(4, many_pairs, tmp_path):
        assert len(answer) == len(LAYOUTS) * 3
        assert {pair: found for pair, found in answer.items() if found != ([], [])} == {}
    for layout in LAYOUTS:
        assert load(chapter, tmp_path / layout, "replicas", 1, 0) == ([], [])


def chain(chapter, folder, source, layout):
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh, parts, optimizer = build(chapter, layout, size, rank, filled=source is None)
    if source:
        chapter.parallel.checkpoint.load_sharded(folder / source, parts, optimizer, mesh)
    write(chapter, folder / layout, parts, optimizer, mesh)
    return wrong(chapter, parts, optimizer)


def test_from_4_ranks_to_2_to_1_to_4(ranks, chapter, tmp_path):
    assert ranks(4, chain, tmp_path, None, "both") == [[]] * 4
    assert ranks(2, chain, tmp_path, "both", "columns") == [[]] * 2
    mesh, parts, optimizer = build(chapter, "replicas", 1, 0, filled=False)
    chapter.parallel.checkpoint.load_sharded(tmp_path / "columns", parts, optimizer, mesh)
    assert wrong(chapter, parts, optimizer) == []
    write(chapter, tmp_path / "one", parts, optimizer, mesh)
    assert ranks(4, chain, tmp_path, "one", "stages") == [[]] * 4
    # What several ranks hold is written once: the bytes of the whole, three times, and little else.
    whole = sum(p.numel() for p in chapter.model.Transformer(config(chapter)).parameters()) * 4 * 3
    for folder in ("both", "columns", "one", "stages"):
        shards = [load_file(path) for path in (tmp_path / folder).glob("*.safetensors")]
        stored = [tensor for shard in shards for name, tensor in shard.items()
                  if not name.startswith(("step.", "random"))]
        assert sum(tensor.nbytes for tensor in stored) == whole, folder


def noise(chapter, folder):
    """Random numbers after a save; after a resume; and after a resume of what one process wrote."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    torch.manual_seed(100 + rank)
    mesh, parts, optimizer = build(chapter, "rows", size, rank, filled=True)
    write(chapter, folder / "four", parts, optimizer, mesh)
    drawn = [torch.rand(3)]
    for source in ("four", "one"):
        torch.manual_seed(rank)
        mesh, parts, optimizer = build(chapter, "rows", size, rank, filled=False)
        chapter.parallel.checkpoint.load_sharded(folder / source, parts, optimizer, mesh)
        drawn.append(torch.rand(3))
    return drawn


def test_random_state(ranks, chapter, tmp_path):
    save(chapter, tmp_path / "one", "replicas", 1, 0)
    answers = ranks(4, noise, tmp_path)
    for before, after, other in answers:
        assert torch.equal(before, after)
        assert torch.equal(other, answers[0][2])   # replicas go on alike
    assert len({tuple(before.tolist()) for before, _, _ in answers}) == 4


def test_the_next_steps_are_those_of_a_run_that_went_on(ranks, chapter, tmp_path):
    """Two steps of AdamW after the resume, on one process instead of four."""
    ranks(4, save_in, tmp_path / "checkpoint", "both")
    _, whole, optimizer = build(chapter, "replicas", 1, 0, filled=True)
    mesh, resumed, other = build(chapter, "replicas", 1, 0, filled=False)
    chapter.parallel.checkpoint.load_sharded(tmp_path / "checkpoint", resumed, other, mesh)
    for parts, adam in ((whole, optimizer), (resumed, other)):
        for _ in range(2):
            for part in parts:
                part.grad = value("gradient", part.piece.name, part.shape)
            adam.step()
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def save_in(chapter, folder, layout):
    save(chapter, folder, layout, torch.distributed.get_world_size(), torch.distributed.get_rank())


def test_before_the_first_step_and_without_gradients(chapter, tmp_path):
    """fp16's first steps may all be left out, and an expert that got no token has taken fewer steps than the others."""
    mesh, parts, optimizer = build(chapter, "replicas", 1, 0, filled=True)
    optimizer = adamw(parts)
    parts[0].grad = torch.ones_like(parts[0])
    optimizer.step()
    write(chapter, tmp_path / "checkpoint", parts, optimizer, mesh)
    mesh, others, resumed = build(chapter, "replicas", 1, 0, filled=False)
    chapter.parallel.checkpoint.load_sharded(tmp_path / "checkpoint", others, resumed, mesh)
    for adam, some in ((optimizer, parts), (resumed, others)):
        for part in some:
            part.grad = torch.ones_like(part)
        adam.step()
        assert [adam.state[part]["step"].item() for part in some[:2]] == [2, 1]
    assert all(torch.equal(a, b) for a, b in zip(parts, others, strict=True))


def test_only_safetensors_and_json(ranks, tmp_path):
    ranks(4, save_in, tmp_path / "checkpoint", "both")
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".json"}
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]   # nothing temporary stays
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_large_parts_are_written_in_several_files(chapter, tmp_path, monkeypatch):
    """DCP holds two copies of what it writes into a file."""
    monkeypatch.setattr(chapter.parallel.checkpoint, "FILE_BYTES", 5000)
    save(chapter, tmp_path / "checkpoint", "replicas", 1, 0)
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoint").glob("*.safetensors")]
    assert len(sizes) > 8 and max(sizes) < 15000
    assert load(chapter, tmp_path / "checkpoint", "replicas", 1, 0) == ([], [])


# ------------------------------------------------------------------------------------------------- kills and failures

def test_a_complete_checkpoint_exists_at_every_instant(chapter, tmp_path, monkeypatch):
    """Kill before each operation on the disk in turn; what a resume then finds is whole, and the old or the new."""
    sharded, checkpoint = chapter.parallel.checkpoint, chapter.checkpoint

    def save_in(out, step):
        save(chapter, out / "checkpoint", "replicas", 1, 0, step)

    def found(out):
        mesh, parts, optimizer = build(chapter, "replicas", 1, 0, filled=False)
        state = sharded.load_sharded(checkpoint.complete_checkpoint(out), parts, optimizer, mesh)
        assert {optimizer.state[part]["step"].item() for part in parts} == {state["step"]}
        return state["step"]

    operations = [(os, "fsync"), (os, "replace"), (Path, "rename"), (Path, "write_text"), (Path, "mkdir"),
                  (Path, "open"),
                  (checkpoint.shutil, "rmtree")]
    killed_at_every_instant(monkeypatch, operations, tmp_path, save_in, found)
    assert all([path.name for path in out.iterdir()] == ["checkpoint"] for out in tmp_path.iterdir())


def refused(chapter, work, *arguments):
    """The InputError's words, or None."""
    try:
        work(*arguments)
    except chapter.cli.InputError as error:
        return str(error)


def full_disk(chapter, folder):
    """Rank 2 may write no more; rank 1 is sent elsewhere; a weight of rank 3 is not finite; rank 0 cannot begin."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    save(chapter, folder, "rows", size, rank)
    answers = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000 if rank == 2 else limits[0], limits[1]))
    answers.append(refused(chapter, save, chapter, folder, "rows", size, rank))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    elsewhere = folder.parent / "elsewhere"
    (elsewhere / ".checkpoint.unfinished").mkdir(parents=True, exist_ok=True)
    answers.append(refused(chapter, save, chapter, elsewhere / "checkpoint" if rank == 1 else folder,
                           "rows", size, rank))
    mesh, parts, optimizer = build(chapter, "rows", size, rank, filled=rank != 3)
    answers.append(refused(chapter, write, chapter, folder, parts, optimizer, mesh))
    answers.append(refused(chapter, save, chapter, Path("/proc/nowhere/checkpoint"), "rows", size, rank))
    return answers, load(chapter, folder, "both", size, rank)


def test_one_rank_that_cannot_write_stops_all(ranks, tmp_path):
    for (full, elsewhere, diverged, start), found in ranks(4, full_disk, tmp_path / "checkpoint"):
        assert "File too large" in full and str(tmp_path) in full and "is complete" in full
        assert "the same disk" in elsewhere and "shard-00002" in elsewhere
        assert "diverged" in diverged and "learning-rate" in diverged
        assert "cannot write" in start and "/proc/nowhere" in start
        assert found == ([], [])   # the one before


def damages(chapter, folder, name):
    """Load with all ranks after rank 0 has damaged the checkpoint; the error of each."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    save(chapter, folder, "rows", size, rank)
    torch.distributed.barrier()
    if rank == 0:
        DAMAGES[name](folder)
    torch.distributed.barrier()
    return refused(chapter, load, chapter, folder, "both", size, rank)


def shorten(folder):
    path = sorted(folder.glob("*.safetensors"))[2]
    os.truncate(path, path.stat().st_size - 100)


def of_another(folder):
    """A file of another run in the place of a shard: its rectangles do not fit to the others'."""
    files = sorted(folder.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())


def spoil(folder):
    """One number, the first after the header of a file: floats come before bytes there."""
    path = sorted(folder.glob("*.safetensors"))[1]
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    path.write_bytes(data[:start] + struct.pack("f", float("nan")) + data[start + 4:])


DAMAGES = {
    "shorten": shorten,
    "lose": lambda folder: sorted(folder.glob("*.safetensors"))[2].unlink(),
    "confuse": of_another,
    "state": lambda folder: (folder / "state.json").write_text("{"),
    "spoil": spoil,
    "plain": lambda folder: (folder / "state.json").write_text('{"step": 3}'),
}
EXPECTED = {"shorten": "shard-00003-", "lose": "shard-00003-", "confuse": "numbers of", "state": "state.json",
            "spoil": "nan or inf",
            "plain": "sharded"}


def test_a_damaged_checkpoint_is_refused_by_all(ranks, tmp_path):
    for name in DAMAGES:
        for error in ranks(4, damages, tmp_path / name, name):
            assert error and EXPECTED[name] in error and str(tmp_path / name) in error, (name, error)


def test_another_model_is_refused(chapter, tmp_path):
    save(chapter, tmp_path, "replicas", 1, 0)
    differences = {"num_hidden_layers": (4, "model.layers.3.", "missing"),
                   "intermediate_size": (24, "down_proj.weight is (12, 20)", "(12, 24)"),
                   "tie_word_embeddings": (False, "lm_head.weight", "missing")}
    for name, (setting, *words) in differences.items():
        mesh, parts, optimizer = build(chapter, "replicas", 1, 0, filled=False, **{name: setting})
        error = refused(chapter, chapter.parallel.checkpoint.load_sharded, tmp_path, parts, optimizer, mesh)
        assert error and all(word in error for word in [*words, str(tmp_path)]), error
    mesh, parts, optimizer = build(chapter, "replicas", 1, 0, filled=False, num_hidden_layers=2)
    error = refused(chapter, chapter.parallel.checkpoint.load_sharded, tmp_path, parts, optimizer, mesh)
    assert error and "11 tensors are not in this model, the first is model.layers.2." in error
    mesh, parts, optimizer = build(chapter, "replicas", 1, 0, filled=False)
    parts.bfloat16()
    for part, labelled in zip(parts, build(chapter, "replicas", 1, 0, filled=False)[1]):
        part.piece = labelled.piece
    error = refused(chapter, chapter.parallel.checkpoint.load_sharded, tmp_path, parts, adamw(parts), mesh)
    assert error and "torch.float32" in error and "torch.bfloat16" in error, error


# ------------------------------------------------------------------------------------------------------ one model again

@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": False, "num_experts": 3}], ids=["dense", "moe"])
def test_export_opens_in_transformers(ranks, chapter, tmp_path, changes):
    from transformers import AutoModelForCausalLM
    tokenizer = tokenizer_of(chapter)
    changes = changes | {"vocab_size": tokenizer.vocab_size}
    ranks(4, save_changed, tmp_path / "checkpoint", "both", changes)
    (tmp_path / ".model.unfinished").mkdir()   # what an export that was killed has left
    before = torch.get_rng_state()
    chapter.parallel.checkpoint.export(tmp_path)
    assert torch.equal(before, torch.get_rng_state())   # or an export would change the training
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", *chapter.checkpoint.MODEL_FILES}
    assert chapter.checkpoint.read_metadata(tmp_path / "model.safetensors").keys() == {"format", "tokenizer"}
    model, _ = chapter.checkpoint.load_model(tmp_path)
    assert model.config == config(chapter, **changes, eos_token_id=[tokenizer.end_of_text, tokenizer.end_of_turn])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, value("weight", name, parameter.shape)), name
    ids = tokenizer.encode("a word and another word")
    peer = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(peer, chapter.logits(model, ids), rtol=1e-4, atol=1e-3)


def save_changed(chapter, folder, layout, changes):
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    save(chapter, folder, layout, size, rank, **changes)
    if rank == 0:   # within the group, while the others do something else
        model, _ = chapter.parallel.checkpoint.gather_model(folder)
        assert torch.equal(model.model.norm.weight, value("weight", "model.norm.weight", (12,)))


def test_save_checkpoint_writes_both(chapter, tmp_path):
    """As train.py calls it: the folder to resume from, and the model for everyone else."""
    tokenizer = tokenizer_of(chapter)
    changes = {"vocab_size": tokenizer.vocab_size}
    mesh, parts, optimizer = build(chapter, "replicas", 1, 0, filled=True, **changes)
    state = {"step": 3, "settings": {"seed": 1}}
    of_train = SimpleNamespace(parameters=parts, inner=optimizer, scaler=chapter.precision.GradScaler("fp32"))
    chapter.training_state.save_checkpoint(tmp_path, SimpleNamespace(config=config(chapter, **changes), mesh=mesh),
                                           tokenizer, of_train, state)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", *chapter.checkpoint.MODEL_FILES}
    model, tokenizer = chapter.parallel.checkpoint.read_model(chapter.checkpoint.complete_checkpoint(tmp_path), "cpu")
    chapter.parallel.mesh.label(model, mesh)
    chapter.parallel.checkpoint.load_sharded(tmp_path / "checkpoint", model.parameters(),
                                             adamw(model.parameters()), mesh)
    exported, _ = chapter.checkpoint.load_model(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), exported.parameters(), strict=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight and tokenizer.vocab_size == 262


def open_files():
    return len(os.listdir("/proc/self/fd"))


def many(chapter, folder):
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh, parts, optimizer = build(chapter, "both", size, rank, filled=True, intermediate_size=30000)   # 3 MB
    counts = []
    for step in range(23):
        write(chapter, folder, parts, optimizer, mesh, step, intermediate_size=30000)
        if step % 5 == 0:
            chapter.parallel.checkpoint.load_sharded(folder, parts, optimizer, mesh)
        memory = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        counts.append((open_files(), memory))
    return counts[2], counts[-1], sum(p.nbytes for p in parts)


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="only Linux shows these")
def test_twenty_saves_leave_nothing_behind(ranks, tmp_path):
    for first, last, written in ranks(4, many, tmp_path / "checkpoint"):
        assert last[0] <= first[0], "open files"
        # With moments, twenty would be 60.
        assert written > 3e6 and last[1] - first[1] < 15 * written, (first, last, written)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert len(list((tmp_path / "checkpoint").iterdir())) == 4 + 3
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 22


def test_nothing_is_said(chapter, tmp_path):
    """Neither DCP's warning in a process that runs alone nor the tracebacks that it logs before our one line."""
    script = ("import parallel.checkpoint as s, parallel.mesh as p, model, torch\n"
              "class Words:\n    save = lambda self, folder: None\n"
              f"m = model.Transformer(model.ModelConfig(**{asdict(config(chapter))!r}))\n"
              "mesh = p.ALONE; p.label(m, mesh); o = torch.optim.AdamW(m.parameters())\n"
              f"f = {str(tmp_path / 'checkpoint')!r}\n"
              "s.save_sharded(f, m.config, m.parameters(), o, {'step': 1, 'settings': {'seed': 1}}, Words(), mesh)\n"
              "s.load_sharded(f, m.parameters(), o, mesh)\n"
              "m.model.norm.weight.piece.name = 'other'\n"
              "try: s.load_sharded(f, m.parameters(), o, mesh)\n"
              "except s.InputError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", script], cwd=chapter.folder, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout.count("\n") == 1 and "other is missing" in done.stdout, done
