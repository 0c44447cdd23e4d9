"""Chapter 7: what a token sees of a quantized cache depends on its text alone, not on how the text came into the cache.

The model computes in float64 here: a number that lies on the border of two integers would otherwise fall to either side
with the order of a sum, and the scores would differ by what an integer is worth, not by what a float is.
"""
import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chapters import load_chapter, run_here
from test_kv_cache import V, Words, check_interrupted, check_laws, spoil_a_step, text

chapter = load_chapter("chapter-07-quantization")
GREEDY = chapter.sampling.Sampling(temperature=0)
P = 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = chapter.model.ModelConfig(vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                                       num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                                       max_position_embeddings=128)
    model = chapter.model.Transformer(config).double()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def rounded_block(x, bits, dim):
    """Written out once more. x (P, G, K)."""
    low, high = x.min(dim, keepdim=True).values, x.max(dim, keepdim=True).values
    step = (high - low) / (2 ** bits - 1)
    return low + step * torch.round((x - low) / step.clamp(min=1e-300))   # all alike: 0 / 0


def plain_attention(bits, block_size=P):
    """The rule as a mask over all pairs of tokens, with softmax written out; of one text."""
    def attend(q, k, v):
        T = len(q)
        kr, vr = k.clone(), v.clone()
        for start in range(0, T - block_size + 1, block_size):
            block = slice(start, start + block_size)
            kr[block], vr[block] = rounded_block(k[block], bits, 0), rounded_block(v[block], bits, 2)
        k, kr, v, vr = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, kr, v, vr))
        t, s = torch.arange(T)[:, None], torch.arange(T)
        before = s // block_size < t // block_size
        scores = torch.where(before, torch.einsum("thk,shk->hts", q, kr),
                             torch.einsum("thk,shk->hts", q, k)) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(s > t, float("-inf")).softmax(-1)
        return torch.einsum("hts,shk->thk", weights * before, vr) + torch.einsum("hts,shk->thk", weights * ~before, v)
    return attend


def scores_of(model, tokens, attend):
    n = len(tokens)
    with torch.no_grad():
        return model(torch.tensor(tokens), torch.arange(n), torch.tensor([0, n], dtype=torch.int32), n, attend=attend)


class Watched:
    """An engine of which every score that chooses a token is compared with those of its text alone."""

    def __init__(self, monkeypatch, model, bits, **settings_):
        self.scores = {}
        monkeypatch.setattr(chapter.engine, "next_token", self.next_token)
        settings_ = {"num_blocks": 64, "block_size": P, "max_tokens": 64, "max_sequences": 8, **settings_}
        self.engine = chapter.engine.Engine(model, Words(), **settings_, cache_bits=bits)
        self.reference = plain_attention(bits, settings_["block_size"])

    def next_token(self, scores, tokens, *rest):
        self.scores.setdefault(tuple(tokens), []).append(scores.clone())
        return chapter.sampling.next_token(scores, tokens, *rest)

    def finish(self):
        ended = {}
        while self.engine.busy():
            ended |= dict.fromkeys(sequence for sequence, _ in self.engine.step())
            check_laws(self.engine)
            self.check_tails()
        return list(ended)

    def check_tails(self):
        """A tail for each block that is not full, and none for two."""
        cache, unfinished = self.engine.cache, {}
        for sequence in self.engine.scheduler.running:
            if sequence.computed % cache.block_size:
                unfinished[sequence.table[sequence.computed // cache.block_size]] = sequence
        tails = [cache.tail_of[block] for block in unfinished]
        assert len(set(tails)) == len(tails) <= cache.num_tails

    def check_scores(self, model):
        longer = ()
        # A text comes before its beginnings, whose scores are among its own.
        for tokens in sorted(self.scores, reverse=True):
            if longer[:len(tokens)] != tokens:
                longer, expected = tokens, scores_of(model, tokens, self.reference).float()
            for scores in self.scores[tokens]:
                torch.testing.assert_close(scores, expected[len(tokens) - 1], atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the rule

@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("chunks", [[19], [1] * 19, [5, 1, 4, 9], [8, 4, 7], [3, 13, 1, 2]], ids=str)
def test_scores_do_not_depend_on_the_chunks(model, bits, chunks):
    tokens = text(19)
    pool = chapter.kv_cache.BlockPool(8, P)
    table = [pool.take() for _ in range(5)][::-1]
    cache = chapter.quantized_cache.QuantizedPagedCache(model.config, pool, bits, 1, dtype=torch.float64)
    expected, done = scores_of(model, tokens, plain_attention(bits)), 0
    for count in chunks:
        placed = cache.place([table[:-(-(done + count) // P)]], [done], [count])
        with torch.no_grad():
            scores = model(torch.tensor(tokens[done:done + count]), *placed, cache=cache)
        done += count
        torch.testing.assert_close(scores[0], expected[done - 1], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("settings_", [
    {}, {"max_tokens": 5}, {"max_tokens": 1}, {"max_sequences": 1}, {"max_sequences": 2, "block_size": 16},
    {"num_blocks": 16}, {"num_blocks": 13, "max_tokens": 7}, {"num_blocks": 13, "prefix_cache": False},
    {"block_size": 1, "num_blocks": 60}],
    ids=str)
def test_every_answer_is_what_its_prompt_alone_gets(model, monkeypatch, bits, settings_):
    """Chunked prefill, ragged batches, few sequences at a time, and so few blocks that sequences are preempted."""
    watched = Watched(monkeypatch, model, bits, **settings_)
    sequences = [watched.engine.add(text(n, seed=n), 8, GREEDY) for n in (3, 25, 1, 12, 30, 8)]
    watched.finish()
    watched.check_scores(model)
    assert all(sequence.answer for sequence in sequences)
    if settings_.get("num_blocks", 64) <= 16:
        assert sum(sequence.preemptions for sequence in sequences) > 0   # or the test shows nothing


def test_shared_beginnings(model, monkeypatch):
    """A shared block is rounded already for the second text. It is not rounded anew, and its tail is not missed."""
    watched, system = Watched(monkeypatch, model, 4), text(20, seed=1)
    for prompt in (system, system, system + [5, 6, 7], system[:9] + [1], [7] + system):
        watched.engine.add(prompt, 5, GREEDY)
        watched.finish()
    for token in (1, 2, 3):
        watched.engine.add(system + [token], 5, GREEDY)
    watched.engine.step()
    assert len({sequence.table[0] for sequence in watched.engine.scheduler.running}) == 1
    watched.finish()
    watched.check_scores(model)


# 3: of four samples one has to wait in each step.
@pytest.mark.parametrize("num_blocks, max_tokens", [(64, 64), (12, 64), (64, 3)])
@pytest.mark.parametrize("length", [18, 20])
def test_forks_copy_what_is_not_rounded_yet(model, monkeypatch, num_blocks, max_tokens, length):
    sampling = chapter.sampling.Sampling(temperature=1.0, seed=3)
    watched = Watched(monkeypatch, model, 4, num_blocks=num_blocks, max_tokens=max_tokens)
    watched.engine.add(text(length, seed=2), 12, sampling, samples=4)
    ended = watched.finish()
    watched.check_scores(model)
    assert len({tuple(sequence.answer) for sequence in ended}) == 4
    assert (sum(sequence.preemptions for sequence in ended) > 0) == (num_blocks < 20)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_schedule(model, data):
    """Requests, forks and cancellations at any time, in caches of any size."""
    with pytest.MonkeyPatch.context() as patch:
        block_size = data.draw(st.sampled_from([1, 2, 4, 8]))
        watched = Watched(patch, model, data.draw(st.sampled_from([8, 4])),
                          num_blocks=-(-data.draw(st.integers(32, 80)) // block_size),
                          block_size=block_size, max_tokens=data.draw(st.sampled_from([1, 3, 8, 40])),
                          max_sequences=data.draw(st.integers(1, 5)), prefix_cache=data.draw(st.booleans()))
        asked = []
        for _ in range(data.draw(st.integers(1, 7))):
            prompt = text(data.draw(st.integers(1, 20)), seed=data.draw(st.integers(0, 1)))   # many begin alike
            asked.append(watched.engine.add(prompt, data.draw(st.integers(1, 10)), GREEDY,
                                            samples=data.draw(st.integers(1, 3))))
            for _ in range(data.draw(st.integers(0, 4))):
                watched.engine.step()
                watched.check_tails()
            if data.draw(st.integers(0, 5)) == 0:
                watched.engine.cancel(data.draw(st.sampled_from(asked)))
        watched.finish()
        watched.check_scores(model)


@pytest.mark.parametrize("bits", [8, 4])
def test_without_a_cache_the_rule_is_the_same(model, bits):
    """Several documents, among them one shorter than a block and one of whole blocks; and no token sees a later one."""
    documents = [text(n, seed=n) for n in (11, 3, 8, 17)]
    lengths = torch.tensor([0, *map(len, documents)], dtype=torch.int32)
    positions = torch.cat([torch.arange(len(document)) for document in documents])

    def packed(documents):
        with torch.no_grad():
            cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
            attend = chapter.quantized_cache.rounded_attention(cu_seqlens, bits, P)
            return model(torch.tensor(sum(documents, [])), positions, cu_seqlens, 17, attend=attend)
    found = packed(documents)
    expected = torch.cat([scores_of(model, document, plain_attention(bits)) for document in documents])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    documents[3] = documents[3][:10] + [9] + documents[3][11:]
    changed = (packed(documents) - found).abs().amax(-1)
    assert changed[:32].max() == 0 and changed[32] > 0


def test_a_nan_ends_one_answer_and_spoils_no_other(model, monkeypatch):
    broken = copy.deepcopy(model)
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight.clone())
    with torch.no_grad():
        broken.model.embed_tokens.weight[50] = float("nan")
    watched = Watched(monkeypatch, broken, 4, num_blocks=8)
    bad, good = (watched.engine.add(prompt, 6, GREEDY) for prompt in ([1, 2, 3, 50, 4], [1, 2, 3, 4, 5]))
    watched.finish()
    assert bad.finished == "nan" and good.finished and good.answer
    watched.scores = {tokens: scores for tokens, scores in watched.scores.items() if 50 not in tokens}
    for n in (3, 9):
        watched.engine.add(text(n, seed=1), 5, GREEDY)
    watched.finish()
    watched.check_scores(broken)


@pytest.mark.parametrize("num_blocks, how", [(64, "cancelled"), (9, "preempted")])
def test_a_nan_in_the_middle_of_a_prompt_stays_in_no_block(model, monkeypatch, num_blocks, how):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.embed_tokens.weight[50] = float("nan")
    broken.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    watched = Watched(monkeypatch, broken, 4, num_blocks=num_blocks, max_tokens=8)
    watched.engine.add(text(6), 14, GREEDY)
    watched.engine.step()
    bad = watched.engine.add([50] + text(24), 3, GREEDY)
    watched.engine.step()
    if how == "cancelled":
        watched.engine.cancel(bad)
    for n in (3, 9, 2):
        watched.engine.add(text(n, seed=1), 5, GREEDY)
    watched.finish()
    assert bad.finished in (how, "nan") and not bad.answer
    watched.check_scores(broken)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_interrupted_step_has_not_been(model, bits):
    check_interrupted(chapter, lambda: chapter.engine.Engine(model, Words(), 14, P, 16, 8, cache_bits=bits),
                      chapter.sampling.Sampling(temperature=1.0, seed=5))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_step_without_memory_leaves_nothing_behind(model, monkeypatch, bits):
    watched = Watched(monkeypatch, copy.deepcopy(model), bits, num_blocks=12)
    sequences = [watched.engine.add(text(n, seed=n), 8, GREEDY) for n in (3, 9, 5)]
    for _ in range(3):
        spoil_a_step(watched.engine, monkeypatch)
        watched.engine.step()
        watched.check_tails()
    watched.finish()
    watched.check_scores(model)
    assert all(sequence.answer for sequence in sequences)


# ------------------------------------------------------------------------------------------------------ what it costs

def test_8_bits_are_nearer_than_4_and_a_channel_is_what_keys_share(model):
    """A few channels of the keys are made large, as trained models have them: a scale for each token then loses the
    others.
    """
    quantized_cache = chapter.quantized_cache
    keys = torch.randn(6, 32, 2, 64, generator=torch.Generator().manual_seed(0))
    keys[..., 5] = 20 + keys[..., 5]

    def error(bits, dim):
        return (quantized_cache.from_integers(*quantized_cache.to_integers(keys, bits, dim)) - keys).abs().max().item()
    # At most half of what an integer is worth, 4 or so over 255 or 15; along a token it would be 20 over that.
    assert error(8, quantized_cache.KEYS) < 0.5 * 9 / 255 and error(4, quantized_cache.KEYS) < 0.5 * 9 / 15
    assert error(4, quantized_cache.KEYS) > 8 * error(8, quantized_cache.KEYS)
    assert error(4, quantized_cache.VALUES) > 2 * error(4, quantized_cache.KEYS)
    tokens = text(60)
    exact, whole = scores_of(model, tokens, None), torch.tensor([0, 60])
    differences = [(scores_of(model, tokens, quantized_cache.rounded_attention(whole, bits, 16)) - exact).abs().mean()
                   / exact.abs().mean()
                   for bits in (8, 4)]
    assert 0 < differences[0] < 0.01 and differences[1] > 5 * differences[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_block_that_is_all_alike_stays_what_it_is(bits, dtype):
    x = torch.full((1, 4, 1, 8), 3.25, dtype=dtype)
    for dim in (chapter.quantized_cache.KEYS, chapter.quantized_cache.VALUES):
        assert torch.equal(chapter.quantized_cache.from_integers(*chapter.quantized_cache.to_integers(x, bits, dim)), x)


@pytest.mark.parametrize("bits, a_token", [(8, 61_824), (4, 33_152)])
def test_what_it_holds_in_bytes(bits, a_token):
    config, tails = chapter.model.CONFIGS["qwen3-0.6b"], 3
    with torch.device("meta"):
        pool = chapter.kv_cache.BlockPool(10, 32)
        cache = chapter.quantized_cache.QuantizedPagedCache(config, pool, bits, tails, "meta", torch.bfloat16)
    heads = config.num_hidden_layers * config.num_key_value_heads
    # Integers, values' scales, keys' scales.
    assert a_token == heads * (2 * 128 * bits // 8 + 2 * 2 + 2 * 2 * 128 // 32)
    assert cache.nbytes() == 10 * 32 * a_token + tails * 32 * 114_688


def test_bits_that_are_not_known(model, text_file):
    for bits in (0, 2, 16):
        with pytest.raises(chapter.cli.InputError, match=f"{bits} bits"):
            chapter.engine.Engine(model, Words(), 8, cache_bits=bits)
    with pytest.raises(chapter.cli.InputError, match="--cache-bits"):
        run_here(chapter.engine, text_file, "--cache-bits", 3)
