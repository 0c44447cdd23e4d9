"""Chapter 5's serving_pictures.py: what it records is what the engine did, and its counts are those made by hand."""
from collections import Counter

import pytest
import torch

from chapters import load_chapter, run_here

chapter5 = load_chapter("chapter-05-kv-cache")
pictures = chapter5.serving_pictures
Running, Moment, Request, P = pictures.Running, pictures.Moment, pictures.Request, pictures.BLOCK_SIZE


@pytest.fixture(scope="module")
def moments():
    return pictures.watch(pictures.REQUESTS)


def steps(cells):
    return 1 + max(step for _, step in cells)


def kinds(cells):
    """{name of a request: how many cells of each kind}."""
    return {request.name: Counter(kind for name, kind in cells.values() if name == request.name)
            for request in pictures.REQUESTS}


def test_the_script_runs_and_draws(tmp_path, monkeypatch, moments):
    monkeypatch.setattr(pictures, "FIGURES", tmp_path)   # leave the repository's figures as they are
    monkeypatch.setattr(pictures, "watch", lambda requests: moments)
    printed = run_here(pictures)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["block_map", "timeline"]
    for path in tmp_path.iterdir():
        assert 5_000 < path.stat().st_size < 200_000, path
    assert len(printed.splitlines()) == 5 and f"{len(moments)} steps" in printed


def test_the_trace_shows_what_the_pictures_are_to_show(moments):
    """Requests that wait, a prompt in chunks, shared and remembered blocks, and one preemption."""
    assert len(pictures.REQUESTS) == 12
    present = {request.name: [step for step, moment in enumerate(moments) if request.name in moment.running]
               for request in pictures.REQUESTS}
    gaps = [name for name, where in present.items() if where[-1] - where[0] >= len(where)]
    assert len(gaps) == 1
    assert any(request.arrival < present[request.name][0] for request in pictures.REQUESTS)
    assert max(sum(name in moment.running and moment.running[name].prefilling for moment in moments)
               for name in present.keys() - gaps) >= 3
    assert any(moment.remembered for moment in moments)
    assert all(moment.running for moment in moments)


def test_what_is_said_does_not_matter(moments, monkeypatch):
    """Other weights and other prompts of the same lengths: the same pictures."""
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: manual_seed(seed + 1))
    assert pictures.watch(pictures.REQUESTS) == moments


def test_a_block_has_several_owners_only_if_they_begin_alike(moments):
    begins = {request.name: request.prefix // P for request in pictures.REQUESTS}   # blocks that others may have, too
    several = 0
    for moment in moments:
        owners = {}
        for name, one in moment.running.items():
            assert len(set(one.table)) == len(one.table) == -(-one.held // P)
            for i, block in enumerate(one.table):
                owners.setdefault(block, []).append((name, i))
        assert len(owners) + len(moment.remembered) <= pictures.NUM_BLOCKS and not owners.keys() & moment.remembered
        for places in owners.values():
            assert len(places) == 1 or all(i < begins[name] for name, i in places) and len({i for _, i in places}) == 1
            several += len(places) > 1
    assert several > 0


def test_empty_slots_by_hand():
    """Blocks of 4: a and b share block 7; a holds 9 tokens, b 6, c 4."""
    running = {"a": Running([7, 2, 5], 9, False), "b": Running([7, 0], 6, False), "c": Running([3], 4, True)}
    assert pictures.empty_slots(running, 4) == (3 + 2, 5 * 4)
    rows = {name: one._replace(table=[name]) for name, one in running.items()}
    assert pictures.empty_slots(rows, 10) == (1 + 4 + 6, 3 * 10)
    assert pictures.empty_slots({}, 4) == (0, 0)


def test_in_blocks_only_the_last_of_each_sequence_has_empty_slots(moments):
    for running, _ in moments:
        empty, slots = pictures.empty_slots(running, P)
        assert 0 <= empty == sum(-one.held % P for one in running.values()) <= len(running) * (P - 1)
        assert slots == P * len({block for one in running.values() for block in one.table})


def test_static_batching_by_hand(monkeypatch):
    """Two places. c has not come when the first batch has ended, and nobody else has: a step without anybody."""
    monkeypatch.setattr(pictures, "S", 2)
    cells = pictures.static_places([Request("a", 0, 9, 1, 0), Request("b", 0, 5, 3, 0), Request("c", 4, 1, 2, 0),
                                    Request("d", 5, 1, 1, 0)])
    assert cells == {(0, 0): ("a", "prefill"), (0, 1): ("a", "ended"), (0, 2): ("a", "ended"),
                     (1, 0): ("b", "prefill"), (1, 1): ("b", "decode"), (1, 2): ("b", "decode"),
                     (0, 4): ("c", "prefill"), (0, 5): ("c", "decode"), (0, 6): ("d", "prefill")}


def test_continuous_places_by_hand(monkeypatch):
    """b leaves and c takes its place; a, preempted, comes back to another."""
    monkeypatch.setattr(pictures, "S", 2)
    prompt, answer = Running([0], 1, True), Running([0], 1, False)
    record = [{"a": prompt, "b": prompt}, {"a": answer, "c": prompt}, {"c": answer}, {"c": answer, "d": prompt},
              {"d": answer, "a": prompt}]
    assert pictures.continuous_places([Moment(running, set()) for running in record]) == {
        (0, 0): ("a", "prefill"), (0, 1): ("a", "decode"), (0, 3): ("d", "prefill"), (0, 4): ("d", "decode"),
        (1, 0): ("b", "prefill"), (1, 1): ("c", "prefill"), (1, 2): ("c", "decode"), (1, 3): ("c", "decode"),
        (1, 4): ("a", "prefill")}


def test_continuous_batching_takes_fewer_steps(moments):
    continuous, static = pictures.continuous_places(moments), pictures.static_places(pictures.REQUESTS)
    assert steps(continuous) == len(moments) < steps(static)
    for request in pictures.REQUESTS:   # both give every answer whole
        assert kinds(static)[request.name]["prefill"] + kinds(static)[request.name]["decode"] == request.answer
        # The last step of a prompt gives a token; only chunks and a second beginning take steps that give none.
        assert request.answer <= kinds(continuous)[request.name].total() <= request.answer + 2
    assert len(continuous) <= pictures.S * len(moments)


def test_runs_are_the_stretches_that_are_not_empty():
    assert list(pictures.runs(["", "a", "a", None, "b", "c", "c"])) == [(1, 2, "a"), (4, 1, "b"), (5, 2, "c")]
