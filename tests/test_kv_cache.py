"""Chapter 5 on: what the cache remembers never changes an answer, whatever is paged, chunked, shared, forked or
preempted.
"""
import copy
import itertools
import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

import warm
from chapters import TRAINED, expect_error, load_chapter, run_here

CACHED = [name for name in TRAINED if (load_chapter(name).folder / "kv_cache.py").is_file()]
V = 97


@pytest.fixture(scope="module", params=CACHED)
def chapter(request):
    return load_chapter(request.param)


class Words:
    """Stands in for a tokenizer: every id writes itself."""
    vocab_size, end_of_text, end_of_turn = V, V - 1, V - 2
    tokens = [f"{i} ".encode() for i in range(V)]

    def decode(self, ids):
        return b"".join(self.tokens[i] for i in ids).decode()


@pytest.fixture(scope="module")
def model(chapter):
    torch.manual_seed(0)
    config = chapter.model.ModelConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                       num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                       max_position_embeddings=128)
    model = chapter.model.Transformer(config)
    for parameter in model.parameters():   # far from the tiny first values: scores that differ clearly
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def text(n, seed=0):
    return torch.randint(V - 2, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def scores_without_cache(model, tokens):
    n = len(tokens)
    with torch.no_grad():
        return model(torch.tensor(tokens), torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n)


def greedy(model, prompt, n):
    """The reference: all anew for each token. Ends with the tokens that end an answer."""
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(scores_without_cache(model, tokens)[-1, :Words.vocab_size].argmax().item())
        if tokens[-1] in (Words.end_of_text, Words.end_of_turn):
            break
    return tokens[len(prompt):]


def make_engine(chapter, model, **settings):
    return chapter.engine.Engine(model, Words(), **{"num_blocks": 64, "block_size": 4, "max_tokens": 64,
                                                    "max_sequences": 8, **settings})


def greedy_sampling(chapter):
    return chapter.sampling.Sampling(temperature=0)


def finish(engine, limit=3000):
    """All steps to the end, each followed by the laws that always hold; returns the sequences that answered."""
    seen = {}
    for _ in range(limit):
        if not engine.busy():
            return list(seen)
        seen |= dict.fromkeys(sequence for sequence, _ in engine.step())
        check_laws(engine)
    raise AssertionError(f"not finished after {limit} steps: {engine.scheduler.waiting}, {engine.scheduler.running}")


def check_laws(engine):
    """No block leaked, none used twice but by those who share it."""
    pool, running = engine.scheduler.pool, engine.scheduler.running
    used = list(itertools.chain.from_iterable(sequence.table for sequence in running))
    assert [used.count(block) for block in range(pool.num_blocks)] == pool.references
    assert set(pool.free) == {block for block in range(pool.num_blocks) if pool.references[block] == 0}
    assert {hash: block for block, hash in enumerate(pool.hashes) if hash is not None} == pool.known
    for sequence in running:
        assert len(set(sequence.table)) == len(sequence.table)
        assert len(sequence.table) * pool.block_size >= sequence.computed
    for sequence in engine.scheduler.waiting:
        assert not sequence.table and not sequence.computed


# ------------------------------------------------------------------------------------------------------ the cache

@pytest.mark.parametrize("chunks", [[12], [1] * 12, [5, 1, 4, 2], [11, 1]])
def test_contiguous_scores_equal_those_without_a_cache(chapter, model, chunks):
    tokens, cache = text(12), chapter.kv_cache.ContiguousCache(model.config, 3, 16)
    expected, start = scores_without_cache(model, tokens), 0
    for count in chunks:
        placed = cache.place([1], [count])
        scores = model(torch.tensor(tokens[start:start + count]), *placed, cache=cache)
        start += count
        torch.testing.assert_close(scores[0], expected[start - 1], atol=1e-4, rtol=1e-4)
    assert cache.lengths == [0, 12, 0]


@pytest.mark.parametrize("block_size", [1, 4, 5])
def test_paged_scores_equal_those_without_a_cache(chapter, model, block_size):
    """Three sequences in a step, of different lengths, with one and several new tokens, their blocks in any order."""
    texts = [text(n, seed=n) for n in (11, 6, 17)]
    cache = chapter.kv_cache.PagedCache(model.config, 40, block_size)
    blocks = torch.randperm(40, generator=torch.Generator().manual_seed(1)).tolist()
    tables = [[blocks.pop() for _ in range(-(-len(tokens) // block_size))] for tokens in texts]
    done = [0, 0, 0]
    for counts in ([4, 6, 9], [5, 0, 1], [1, 0, 6], [1, 0, 1]):
        chosen = [i for i in range(3) if counts[i]]
        new = [texts[i][done[i]:done[i] + counts[i]] for i in chosen]
        placed = cache.place([tables[i] for i in chosen], [done[i] for i in chosen], [counts[i] for i in chosen])
        scores = model(torch.tensor(sum(new, [])), *placed, cache=cache)
        for i, found in zip(chosen, scores):
            done[i] += counts[i]
            torch.testing.assert_close(found, scores_without_cache(model, texts[i])[done[i] - 1], atol=1e-4, rtol=1e-4)
    assert done == [11, 6, 17]


def test_what_a_cache_holds_in_bytes(chapter):
    config = chapter.model.CONFIGS["qwen3-0.6b"]
    with torch.device("meta"):
        cache = chapter.kv_cache.PagedCache(config, 4, 16, "meta", torch.bfloat16)
    assert cache.nbytes() == 4 * 16 * 114_688


def test_hashes_depend_on_all_tokens_before(chapter):
    pool = chapter.kv_cache.BlockPool(8, 4)
    first = list(pool.block_hashes([1, 2, 3, 4, 5, 6, 7, 8, 9]))
    second = list(pool.block_hashes([0, 2, 3, 4, 5, 6, 7, 8]))
    assert len(first) == 2 and len(second) == 2 and not set(first) & set(second)
    assert first == list(pool.block_hashes([1, 2, 3, 4, 5, 6, 7, 8]))


def test_the_longest_unused_block_goes_first_and_is_forgotten(chapter):
    pool = chapter.kv_cache.BlockPool(3, 2)
    blocks = [pool.take() for _ in range(3)]
    for block, hash in zip(blocks, pool.block_hashes([1, 2, 3, 4, 5, 6])):
        pool.remember(block, hash)
    pool.release(blocks)
    assert pool.longest_prefix([1, 2, 3, 4, 5, 6, 7]) == blocks
    assert pool.longest_prefix([1, 2, 3, 4, 5, 6]) == blocks[:2]   # a token has to be left
    assert pool.take() == blocks[2]                                # the end of a text first
    assert pool.longest_prefix([1, 2, 3, 4, 5, 6, 7]) == blocks[:2]


# ------------------------------------------------------------------------------------------------------ generate.py

@pytest.mark.parametrize("cached", [True, False])
def test_generate_equals_greedy(chapter, model, cached):
    prompts = [text(n, seed=n) for n in (1, 9, 30, 4)]
    sampling = greedy_sampling(chapter)
    answers = [[] for _ in prompts]
    for step in chapter.static_batching.generate_batch(model, Words(), prompts, 20, sampling, cached):
        for row, token in step.items():
            answers[row].append(token)
    for prompt, answer in zip(prompts, answers):
        alone = list(chapter.generate.generate(model, Words(), prompt, 20, cached, temperature=0))
        assert answer == alone
        expected = greedy(model, prompt, 20)   # which ends where a text ends; generate goes on with a new one
        expected = expected[:-1] if expected[-1] == Words.end_of_turn else expected
        assert answer[:len(expected)] == expected


def test_cached_equals_uncached_past_the_end_of_a_text_and_of_the_positions(chapter, model, monkeypatch):
    """Random choices, an empty context after each end of text, and a text longer than the model has positions."""
    a, b = (list(chapter.generate.generate(model, Words(), text(5), 300, cached, temperature=3.0, seed=5))
            for cached in (True, False))
    assert a == b and Words.end_of_text in a   # so hot that the end of a text comes up
    monkeypatch.setattr(model.config, "max_position_embeddings", 16)
    a, b = (list(chapter.generate.generate(model, Words(), text(5), 60, cached, seed=1)) for cached in (True, False))
    assert a == b


def test_equal_to_transformers_generate(chapter, model):
    config = {name: value for name, value in vars(model.config).items() if name not in ("rope_theta", "eos_token_id")}
    rope = {"rope_type": "default", "rope_theta": model.config.rope_theta}
    reference = Qwen3ForCausalLM(Qwen3Config(**config, rope_parameters=rope))
    reference.load_state_dict(model.state_dict())
    prompt = text(10, seed=3)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0,
                                  eos_token_id=[Words.end_of_text, Words.end_of_turn])[0, 10:].tolist()
    engine = make_engine(chapter, model)
    sequence = engine.add(prompt, 40, greedy_sampling(chapter))
    finish(engine)
    assert sequence.answer == expected


# ------------------------------------------------------------------------------------------------------ the engine

@pytest.mark.parametrize("settings_", [
    {}, {"max_tokens": 5}, {"max_tokens": 1}, {"max_sequences": 1}, {"max_sequences": 2, "block_size": 16},
    {"num_blocks": 16}, {"num_blocks": 13, "max_tokens": 7}, {"num_blocks": 13, "prefix_cache": False},
    {"block_size": 1, "num_blocks": 60}],
    ids=str)
def test_every_answer_is_what_its_prompt_alone_gets(chapter, model, settings_):
    """Chunked prefill, ragged batches, few sequences at a time, and so few blocks that sequences are preempted."""
    engine = make_engine(chapter, model, **settings_)
    prompts = [text(n, seed=n) for n in (3, 25, 1, 12, 30, 8)]
    sequences = [engine.add(prompt, 18, greedy_sampling(chapter)) for prompt in prompts]
    finish(engine)
    for prompt, sequence in zip(prompts, sequences):
        assert sequence.answer == greedy(model, prompt, 18)
    if engine.scheduler.pool.num_blocks <= 16:
        assert sum(sequence.preemptions for sequence in sequences) > 0   # or the test shows nothing
    assert len(engine.scheduler.pool.free) == engine.scheduler.pool.num_blocks


def test_a_known_prefix_is_not_computed_again(chapter, model, monkeypatch):
    """Shared in part, shared whole (a prompt of full blocks asked twice), and shared at the same time."""
    engine = make_engine(chapter, model)
    system = text(20, seed=1)
    computed, place = [], engine.cache.place
    monkeypatch.setattr(engine.cache, "place", lambda tables, lengths, counts: computed.append(sum(counts))
                        or place(tables, lengths, counts))
    for prompt, first_step in ((system, 20), (system, 4), (system + [5, 6, 7], 3), (system[:9] + [1], 2),
                               ([7] + system, 21)):
        computed.clear()
        sequence = engine.add(prompt, 5, greedy_sampling(chapter))
        finish(engine)
        assert computed[0] == first_step
        assert sequence.answer == greedy(model, prompt, 5)
    together = [engine.add(system + [token], 5, greedy_sampling(chapter)) for token in (1, 2, 3)]
    computed.clear()
    engine.step()
    assert computed == [3] and len({sequence.table[0] for sequence in together}) == 1
    check_laws(engine)
    finish(engine)
    assert [sequence.answer for sequence in together] == [greedy(model, system + [token], 5) for token in (1, 2, 3)]


def test_a_block_given_to_another_is_no_longer_found(chapter, model):
    """The cache is so small that the second text takes the blocks of the first, which is then asked for again."""
    engine = make_engine(chapter, model, num_blocks=8)
    for seed in (1, 2, 1, 2):
        sequence = engine.add(text(24, seed), 4, greedy_sampling(chapter))
        finish(engine)
        assert sequence.answer == greedy(model, text(24, seed), 4)


@pytest.mark.parametrize("num_blocks", [64, 14])
def test_samples_of_one_prompt_share_its_blocks_and_not_their_fate(chapter, model, num_blocks):
    """The last block is shared while it is not full: who writes first gets a copy. A fork's answer is reproducible."""
    prompt, sampling = text(18, seed=2), chapter.sampling.Sampling(temperature=1.0, seed=3)

    def answers(**settings_):
        engine = make_engine(chapter, model, **settings_)
        engine.add(prompt, 12, sampling, samples=4)
        engine.step()
        tables = [sequence.table for sequence in engine.scheduler.running]
        assert len(tables) == 4 and all(table[:4] == tables[0][:4] for table in tables)
        ended = finish(engine)
        assert len(ended) == 4 and (sum(sequence.preemptions
                                        for sequence in ended) > 0) == (settings_["num_blocks"] < 20)
        return {sequence.number: sequence.answer for sequence in ended}
    few, many = answers(num_blocks=num_blocks), answers(num_blocks=60, max_tokens=32)
    assert few == many and len(set(map(tuple, few.values()))) == 4
    alone = make_engine(chapter, model)
    assert few[0] == alone.add(prompt, 12, sampling).answer or finish(alone)[0].answer == few[0]


def test_greedy_forks_all_give_the_same(chapter, model):
    engine = make_engine(chapter, model)
    engine.add(text(9), 15, greedy_sampling(chapter), samples=3)
    found = finish(engine)
    assert len(found) == 3 and all(sequence.answer == greedy(model, text(9), 15) for sequence in found)


def test_sampling_is_the_same_in_company(chapter, model):
    sampling = chapter.sampling.Sampling(temperature=1.0, top_p=0.9, seed=11)
    alone = list(chapter.generate.generate(model, Words(), text(7), 20, **vars(sampling)))
    engine = make_engine(chapter, model, max_tokens=9)
    sequence = engine.add(text(7), 20, sampling)
    for seed in range(5):
        engine.add(text(10, seed), 20, sampling)
    finish(engine)
    assert sequence.answer[:len(alone)] == alone[:len(sequence.answer)]


def test_cancelled_waiting_or_running_leaves_no_trace(chapter, model):
    engine = make_engine(chapter, model, max_sequences=2)
    first, second, third = (engine.add(text(10, seed), 20, greedy_sampling(chapter)) for seed in range(3))
    engine.step()
    for sequence in (second, third, second):
        engine.cancel(sequence)
        check_laws(engine)
    assert second.finished == third.finished == "cancelled"
    finish(engine)
    assert first.answer == greedy(model, text(10, 0), 20) and len(third.answer) == 0


def test_stop_texts_end_tokens_and_lengths(chapter, model):
    expected = greedy(model, text(10), 30)
    stop = Words().decode(expected[5:7])
    engine = make_engine(chapter, model)
    sequences = [engine.add(text(10), 30, greedy_sampling(chapter), **kwargs)
                 for kwargs in ({"stop": ("no such text", stop)}, {"end_tokens": (expected[3],)}, {})]
    finish(engine)
    assert [sequence.finished for sequence in sequences[:2]] == ["stop", "end"]
    assert sequences[0].answer == expected[:7] and sequences[1].answer == expected[:expected.index(expected[3]) + 1]
    assert sequences[2].answer == expected


class Interrupted:
    """An engine's step() that Ctrl-C ends at every line of the chapter's code, once at each of a line's first three
    times in a step.
    """

    def __init__(self, chapter):
        self.folder, self.points = str(chapter.folder), set()

    def step(self, engine):
        """What step() returns, or None where it was interrupted."""
        times = {}

        def watch(frame, event, _):
            if not frame.f_code.co_filename.startswith(self.folder):
                return None
            if event == "line":
                line = frame.f_code.co_filename, frame.f_lineno
                times[line] = times.get(line, 0) + 1
                if times[line] <= 3 and (*line, times[line]) not in self.points:
                    self.points.add((*line, times[line]))
                    sys.settrace(None)
                    frame.f_trace = None
                    raise KeyboardInterrupt
            return watch
        before = sys.gettrace()
        sys.settrace(watch)
        try:
            return engine.step()
        except KeyboardInterrupt:
            return None
        finally:
            sys.settrace(before)


def check_interrupted(chapter, make_engine, sampling):
    """Requests with samples, a shared beginning, chunks and preemptions, with and without interruptions: the same
    answers.
    """
    def run(engine, step):
        answers, shared = {}, text(9, seed=3)
        for prompt, new, samples in ((text(25, seed=1), 9, 1), (shared, 8, 3), (shared + [5], 6, 1),
                                     (shared + [6, 7], 6, 1), (text(3), 6, 1)):
            engine.add(prompt, new, sampling, samples=samples)
        while engine.busy():
            queue = [*engine.scheduler.running, *engine.scheduler.waiting]
            lengths = [len(sequence.tokens) for sequence in queue]
            answered = step(engine)
            check_laws(engine)
            if answered is None:
                assert [len(sequence.tokens) for sequence in queue] == lengths
                assert not any(sequence.finished for sequence in queue)
                assert [*engine.scheduler.running, *engine.scheduler.waiting] == queue
            for sequence, token in answered or ():
                answers.setdefault((tuple(sequence.tokens[:sequence.prompt_length]), sequence.number), []).append(token)
        return answers
    expected, interrupted = run(make_engine(), lambda engine: engine.step()), Interrupted(chapter)
    assert run(make_engine(), interrupted.step) == expected and len(expected) == 7
    assert len(interrupted.points) > 400


def test_an_interrupted_step_has_not_been(chapter, model):
    check_interrupted(chapter, lambda: make_engine(chapter, model, num_blocks=14, max_tokens=16),
                      chapter.sampling.Sampling(temperature=1.0, seed=5))


def spoil_a_step(engine, monkeypatch):
    """A step that writes nan into the cache and then runs out of memory."""
    table, head = engine.model.model.embed_tokens.weight, engine.model.lm_head
    kept = table.detach().clone()

    def no_memory(*_):
        raise RuntimeError("out of memory")
    with torch.no_grad(), monkeypatch.context() as patch:
        table.fill_(float("nan"))
        patch.setattr(head, "forward", no_memory)
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.step()
        table.copy_(kept)


def test_a_step_without_memory_leaves_nothing_behind(chapter, model, monkeypatch):
    engine, model = make_engine(chapter, copy.deepcopy(model), num_blocks=12), model
    prompts = [text(n, seed=n) for n in (3, 9, 5)]
    sequences = [engine.add(prompt, 8, greedy_sampling(chapter)) for prompt in prompts]
    for _ in range(3):
        spoil_a_step(engine, monkeypatch)
        check_laws(engine)
        engine.step()
    finish(engine)
    assert [sequence.answer for sequence in sequences] == [greedy(model, prompt, 8) for prompt in prompts]


NUMBERS = [np.array, torch.tensor, lambda ids: [np.int64(i) for i in ids], lambda ids: [np.uint8(i) for i in ids],
           lambda ids: [torch.tensor(i) for i in ids], tuple, iter]


@pytest.mark.parametrize("kind", NUMBERS)
def test_prompts_of_any_integers(chapter, model, kind):
    engine, prompt = make_engine(chapter, model), text(6)
    sequences = [engine.add(kind(prompt), np.int64(5), greedy_sampling(chapter), samples=torch.tensor(1),
                            end_tokens=kind([V - 1, V - 2])),
                 engine.add(prompt, 5, greedy_sampling(chapter))]
    finish(engine)
    assert [sequence.answer for sequence in sequences] == 2 * [greedy(model, prompt, 5)]
    assert {type(token) for token in sequences[0].tokens} == {int}
    answer = list(chapter.generate.generate(model, Words(), kind(prompt), np.int64(5), temperature=np.float32(0),
                                            seed=np.int64(3)))
    assert answer[:3] == greedy(model, prompt, 5)[:3]


def test_what_would_trip_a_step_is_refused_where_it_enters(chapter, model):
    """One line, and the engine goes on with the others."""
    refused, engine = chapter.cli.InputError, make_engine(chapter, model)
    good = engine.add(text(6), 5, greedy_sampling(chapter))
    prompts = [[True], [1.0], [None], ["a"], "abc", None, 5, [], [V], [-1], [[1]], [2 ** 70], np.array([1.5]),
               np.array([[1]]), np.array(5),
               torch.tensor([True]), torch.tensor([[1], [2]]), torch.tensor(5), torch.tensor([]), np.array([]),
               [torch.tensor([1])],
               [np.bool_(True)], [float("nan")]]
    for prompt in prompts:
        with pytest.raises(refused):
            engine.add(prompt, 3)
        with pytest.raises(refused):
            list(chapter.generate.generate(model, Words(), prompt, 3))
    for number in (0, -1, 1.5, 2.0, True, None, "3", float("nan"), 2 ** 64, np.float64(3), torch.tensor([3, 4])):
        with pytest.raises(refused):
            engine.add([1], number)
        with pytest.raises(refused):
            engine.add([1], 3, samples=number)
        with pytest.raises(refused):
            list(chapter.generate.generate(model, Words(), [1], number))
        for name in ("num_blocks", "block_size", "max_tokens", "max_sequences"):
            with pytest.raises(refused, match=name):
                make_engine(chapter, model, **{name: number})
    for others in ({"stop": ("",)}, {"stop": (5,)}, {"stop": ""}, {"end_tokens": 5}, {"end_tokens": [[1]]},
                   {"end_tokens": ["a"]}):
        with pytest.raises(refused):
            engine.add([1], 3, **others)
    finish(engine)
    assert good.answer == greedy(model, text(6), 5)


def test_a_stop_text_may_stand_alone(chapter, model):
    engine, expected = make_engine(chapter, model), greedy(model, text(10), 8)
    sequence = engine.add(text(10), 8, greedy_sampling(chapter), stop=Words().decode(expected[4:6]))
    finish(engine)
    assert sequence.answer == expected[:6]


def test_what_can_never_fit_is_refused(chapter, model):
    engine = make_engine(chapter, model, num_blocks=4)
    for prompt, new, others in (([], 3, {}), (text(10), 7, {}), (text(100), 100, {}), (text(5), 0, {}),
                                ([5, V], 3, {}), ([-1], 3, {}),
                                (text(5), 3, {"stop": ("",)}), (text(5), 3, {"samples": 0})):
        with pytest.raises(chapter.cli.InputError):
            engine.add(prompt, new, **others)
    assert not engine.busy() and engine.step() == []
    for wrong in ({"temperature": -1}, {"top_p": 0}, {"min_p": 1e-40}, {"repetition_penalty": 0}):
        with pytest.raises(chapter.cli.InputError):
            chapter.sampling.Sampling(**wrong)
    engine.add(text(10), 6)
    finish(engine)


def test_scores_that_are_no_numbers_end_one_answer_and_spoil_no_other(chapter, model):
    """Not even of who gets its blocks later: a nan under a mask is a nan still."""
    broken = chapter.model.Transformer(replace(model.config, tie_word_embeddings=False))
    broken.load_state_dict(model.state_dict())
    with torch.no_grad():
        broken.model.embed_tokens.weight = torch.nn.Parameter(broken.model.embed_tokens.weight.clone())
        broken.model.embed_tokens.weight[50] = float("nan")
    engine = make_engine(chapter, broken, num_blocks=8)
    bad, good = (engine.add(prompt, 6, greedy_sampling(chapter)) for prompt in ([1, 2, 3, 50, 4], [1, 2, 3, 4, 5]))
    finish(engine)
    assert bad.finished == "nan" and bad.answer == [] and good.answer == greedy(broken, [1, 2, 3, 4, 5], 6)
    later = [engine.add(text(n, seed=1), 5, greedy_sampling(chapter)) for n in (3, 9)]
    finish(engine)
    assert [sequence.answer for sequence in later] == [greedy(broken, text(n, seed=1), 5) for n in (3, 9)]
    # Nor of a text that runs on and shares its first blocks, nor of shorter ones beside it, while its prompt is
    # computed in chunks.
    engine, beginning = make_engine(chapter, broken, num_blocks=40, max_tokens=8), text(9, seed=2)
    good = [engine.add(prompt, 12, greedy_sampling(chapter)) for prompt in (beginning, [1, 2, 3])]
    for _ in range(4):
        engine.step()
    bad = [engine.add([*beginning[:8], *prompt], 6, greedy_sampling(chapter)) for prompt in ([50, 4], [50] + text(30))]
    finish(engine)
    assert [sequence.finished for sequence in bad] == ["nan", "nan"]
    assert [sequence.answer for sequence in good] == [greedy(broken, beginning, 12), greedy(broken, [1, 2, 3], 12)]


@pytest.mark.parametrize("how", ["cancelled", "preempted"])
def test_a_nan_in_the_middle_of_a_prompt_stays_in_no_block(chapter, model, how):
    """Its prompt is computed in chunks; before the last one it is cancelled, or an older request needs its blocks."""
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[50] = float("nan")
        broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    engine = make_engine(chapter, broken, num_blocks=9, max_tokens=8)
    old = engine.add(text(6), 14, greedy_sampling(chapter))
    engine.step()
    bad = engine.add([50] + text(24), 3, greedy_sampling(chapter), samples=2)
    engine.step()
    if how == "cancelled":
        engine.cancel(bad)
    finish(engine)
    assert bad.finished in (how, "nan") and not bad.answer and old.answer == greedy(broken, text(6), 14)
    later = [engine.add(text(n, seed=1), 5, greedy_sampling(chapter)) for n in (3, 9)]
    finish(engine)
    assert [sequence.answer for sequence in later] == [greedy(broken, text(n, seed=1), 5) for n in (3, 9)]


def test_nobody_stops_for_the_prompt_of_another(chapter, model):
    """The samples of a prompt go on while a long prompt, which came later, is computed in chunks."""
    engine = make_engine(chapter, model, max_tokens=16)
    engine.add(text(8), 12, greedy_sampling(chapter), samples=4)
    long = engine.add(text(60, 1), 5, greedy_sampling(chapter))
    engine.step()
    while long.pending > 1 and not long.answer:
        answered = [sequence for sequence, _ in engine.step()]
        assert sum(sequence is not long for sequence in answered) == 4


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_schedule(chapter, model, data):
    """Requests, forks and cancellations at any time, in caches of any size: nothing leaks, everyone gets his own
    answer.
    """
    block_size = data.draw(st.sampled_from([1, 2, 4, 8]))
    tokens = data.draw(st.integers(32, 80))
    engine = make_engine(chapter, model, num_blocks=-(-tokens // block_size), block_size=block_size,
                         max_tokens=data.draw(st.sampled_from([1, 3, 8, 40])),
                         max_sequences=data.draw(st.integers(1, 5)),
                         prefix_cache=data.draw(st.booleans()))
    asked, step, seen = [], engine.step, {}

    def watched():
        answered = step()
        seen.update(dict.fromkeys(sequence for sequence, _ in answered))
        return answered
    engine.step = watched
    for _ in range(data.draw(st.integers(1, 7))):
        prompt = text(data.draw(st.integers(1, 20)), seed=data.draw(st.integers(0, 1)))   # many begin alike
        samples = data.draw(st.integers(1, 3))
        asked.append((prompt, engine.add(prompt, data.draw(st.integers(1, 10)), greedy_sampling(chapter),
                                         samples=samples), samples))
        for _ in range(data.draw(st.integers(0, 4))):
            if engine.busy():
                engine.step()
                check_laws(engine)
        if data.draw(st.integers(0, 5)) == 0:
            engine.cancel(data.draw(st.sampled_from(asked))[1])
            check_laws(engine)
    finish(engine)
    assert len(engine.scheduler.pool.free) == engine.scheduler.pool.num_blocks
    for prompt, sequence, samples in asked:
        assert sequence.finished == "cancelled" or sum(other.tokens[:len(prompt)] == prompt
                                                       for other in seen) >= samples
    for sequence in {**seen, **dict.fromkeys(sequence for _, sequence, _ in asked)}:   # the forks too
        expected = greedy(model, sequence.tokens[:sequence.prompt_length], sequence.max_new_tokens)
        assert sequence.finished
        assert sequence.answer == (expected[:len(sequence.answer)] if sequence.finished == "cancelled" else expected)


# ------------------------------------------------------------------------------------------------------ commands

def test_commands(chapter, trained_cached, call, tmp_path):
    flags = ("--checkpoint", trained_cached, "--max-new-tokens", 20, "--temperature", 2)
    cached, uncached = (call(chapter.generate, "ROMEO:", *flags, *extra) for extra in ((), ("--no-cache",)))
    assert cached == uncached and cached[0] == 0
    status, out, err = call(chapter.generate, "ROMEO:", *flags, "--timing")
    assert out == cached[1] and "prefill" in err and "decode" in err
    stop = out[len("ROMEO:") + 3:][:4]
    assert call(chapter.generate, "ROMEO:", *flags, "--stop", stop)[1] == out[:out.index(stop, len("ROMEO:"))] + "\n"
    (tmp_path / "prompts.txt").write_text("ROMEO:\n\nJULIET: the\n")
    together = call(chapter.generate, "--prompts", tmp_path / "prompts.txt", *flags)[1]
    assert together == out + call(chapter.generate, "JULIET: the", *flags)[1]
    printed = run_here(chapter.engine, tmp_path / "prompts.txt", *flags)
    assert printed.count("ROMEO:") >= 1 and printed.count("JULIET: the") >= 1
    (tmp_path / "empty.txt").write_text("\n")
    expect_error(call(chapter.generate, "--prompts", tmp_path / "empty.txt", *flags), "empty.txt", "no prompt")
    expect_error(call(chapter.generate, "--prompts", tmp_path / "none.txt", *flags), "none.txt")
    expect_error(call(chapter.engine, tmp_path / "prompts.txt", *flags, "--cache-tokens", 16), "16 tokens of the cache")
    for wrong in (("--min-p", 2), ("--stop", ""), ("--repetition-penalty", 0)):
        expect_error(call(chapter.generate, "ROMEO:", *flags, *wrong), wrong[0])


@pytest.fixture(scope="module")
def trained_cached(chapter, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("cached")
    run_here(chapter.train, "--data", text_file, *chapter.quick, "--steps", 3, "--out", out)
    return out


def test_min_p_and_repetition_penalty(chapter):
    logits = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]).log()
    rng = torch.Generator().manual_seed(0)
    drawn = {chapter.sampling.sample(logits.clone(), 1.0, None, None, rng, min_p=0.5) for _ in range(500)}
    assert drawn == {1, 3}
    scores = torch.tensor([2.0, -2.0, 1.0])
    chapter.sampling.penalize(scores, [0, 1, 1], 2.0)
    assert scores.tolist() == [1.0, -4.0, 1.0]


# ------------------------------------------------------------------------------------------------------ fast decode

has_compiler = pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler")


@has_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_batches_compute_what_linear_does(chapter, dtype):
    """All ways, for numbers of rows on both sides of every threshold."""
    small_batch_matmul, generator = chapter.small_batch_matmul, torch.Generator().manual_seed(0)
    weight = torch.randn(36, 192, generator=generator).to(dtype)
    for rows in (*range(1, 12), 40):
        x = torch.randn(rows, 192, generator=generator).to(dtype)
        expected = x.double() @ weight.double().T
        for way in (small_batch_matmul.linear, small_batch_matmul.weights_first, small_batch_matmul.in_float32,
                    small_batch_matmul.kernel()):
            found = way(x, weight)
            assert found.dtype == dtype and found.shape == (rows, 36) and found.is_contiguous()
            error = ((found.double() - expected).abs() / (expected.abs() + 1)).max().item()
            assert error < (1e-5 if dtype == torch.float32 else 1e-2), (way, rows, error)


COMPILED = """
import torch
from sampling import Sampling
from static_batching import generate_batch
from model import ModelConfig, Transformer
from small_batch_matmul import FewRowsByKernel, for_small_batches

class Words:
    vocab_size, end_of_text, end_of_turn = 97, 96, 95

def answers(model, forward=None):
    prompts = [list(range(5)), list(range(9, 18))]   # of different lengths
    steps = generate_batch(model, Words, prompts, 20, Sampling(temperature=0), True, forward)
    return [list(step.items()) for step in steps]

torch.manual_seed(0)
model = Transformer(ModelConfig(vocab_size=100, hidden_size=64, intermediate_size=128))
plain = answers(model)
for_small_batches(model, use_kernel=True)
assert type(model.lm_head) is FewRowsByKernel
assert answers(model) == plain
forward = torch.compile(model, fullgraph=True)
assert answers(model, forward) == plain and answers(model, forward) == plain
assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1   # all steps have the same shapes
"""


@has_compiler
def test_compiled_decode_gives_the_same_tokens(chapter, compiled_kernels):
    """In a process of its own: the compiler looks modules up by their names."""
    done = warm.run("-c", COMPILED, cwd=chapter.folder, env=os.environ
                    | {"TORCHINDUCTOR_CACHE_DIR": str(compiled_kernels)})
    assert done.returncode == 0, done.stderr


def test_a_layer_that_does_not_fit_the_kernel_keeps_to_torch(chapter, monkeypatch):
    monkeypatch.setattr(chapter.small_batch_matmul, "kernel", lambda: "the operator")
    layers = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False), torch.nn.Linear(60, 8, bias=False),
                                 torch.nn.Linear(64, 6, bias=False))
    chapter.small_batch_matmul.for_small_batches(layers, use_kernel=True)
    assert [hasattr(layer, "product") for layer in layers] == [True, False, False]


@pytest.mark.parametrize("chapter", ["chapter-05-kv-cache"], indirect=True)   # the next one measures something else
def test_benchmark_counts_what_it_says(chapter, monkeypatch, tmp_path, call):
    """Small and quick: every part runs and writes its table; the workloads are those that the docstrings describe."""
    benchmark = chapter.benchmark_serving
    monkeypatch.setattr(chapter.results, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "FIGURES", tmp_path)
    config = chapter.model.CONFIGS["small"]
    trace = benchmark.nano_vllm(config, 50, 0.5)
    assert all(50 <= len(prompt) <= 512 and 50 <= new <= 512 for _, prompt, new in trace)
    trace = benchmark.arrivals(config, 200, 0.5)
    assert [start for start, _, _ in trace] == sorted(start for start, _, _ in trace)
    lengths = sorted(new for _, _, new in trace)
    assert lengths[-1] > 4 * lengths[100]   # a few are very long
    for what, flags in (("cache", ("--length", 128, "--rounds", 1)), ("prefix", ("--length", 64, "--rounds", 2)),
                        ("serving", ("--requests", 6, "--scale", 0.05, "--sequences", 2))):
        status, out, err = call(benchmark, what, *flags)
        assert status == 0, err
        rows = json.loads((tmp_path / f"{what}_small_cpu.json").read_text())["rows"]
        assert rows and all(len(row) > 2 for row in rows)
    ways = {row["way"]: row for row in rows if row["workload"] == "chat"}
    assert len(ways) == 3 and len({row["tokens"] for row in ways.values()}) == 1
