"""Sampling: what is kept, what is drawn, what reaches standard output."""
import io

import numpy as np
import pytest
import torch

from chapters import chapter1, run_here


def draws(chapter, logits, n=2000, **settings):
    rng = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    return torch.tensor([chapter.sampling.sample(logits.clone(), rng=rng, **settings) for _ in range(n)])


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.reaches("sampling.sample")
@pytest.mark.parametrize("settings, kept", [
    ({}, [0, 1, 2, 3, 4]), ({"temperature": 0.5}, [0, 1, 2, 3, 4]), ({"top_k": 2}, [1, 3]),
    ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.4}, [1]), ({"top_p": 0.41}, [1, 3]), ({"top_p": 0.8}, [1, 3, 4]), ({"top_p": 1e-6}, [1]),
    ({"top_k": 3, "top_p": 0.5}, [1, 3]), ({"temperature": 1e-30}, [1]), ({"temperature": 0}, [1])])
def test_samples_follow_the_distribution(chapter, settings, kept):
    """Chi-square: the counts are those of the distribution, restricted to what is kept and renormalized."""
    counts = draws(chapter, PROBABILITIES.log(), **settings).bincount(minlength=5)
    weights = torch.zeros(5)
    weights[kept] = PROBABILITIES[kept] ** (1 / (settings.get("temperature") or 1))
    expected = weights / weights.sum() * counts.sum()
    assert counts[expected == 0].sum() == 0, (counts, expected)
    kept_counts, kept_expected = counts[expected > 0], expected[expected > 0]
    chi_square = ((kept_counts - kept_expected) ** 2 / kept_expected).sum().item()
    assert chi_square < 20, (chi_square, counts, expected)   # 4 degrees of freedom: 1 in 2,000 by chance


def test_settings_that_make_no_sense(chapter, text_file):
    """The command line refuses them, and so does generate(), for whoever calls it; numbers of numpy and torch are
    numbers.
    """
    tokenizer = chapter.make_tokenizer(chapter.data.read_text(text_file))
    model, prompt = chapter.make_model(tokenizer), chapter.prompt_ids(tokenizer, "the king")

    def generate(prompt=prompt, tokens=5, **settings):
        return list(chapter.generate.generate(model, tokenizer, prompt, tokens, **settings))
    expected = generate(temperature=0.5, top_k=4, top_p=0.5, seed=3)
    for one, array in ((np.float64, np.array), (np.float64, torch.tensor)):
        assert generate(array(prompt), array(5), temperature=one(0.5), top_k=array(4), top_p=one(0.5),
                        seed=array(3)) == expected
    numbers = [float("nan"), float("inf"), -1, "1", True, [1], np.array([1, 1])]
    for name, values in {"temperature": [*numbers, None], "top_k": [*numbers, 0, 1.5, 2.0], "top_p": [*numbers, 0, 2],
                         "seed": [*numbers, None, 1.5, 2 ** 63, 2 ** 64], "tokens": [*numbers, None, 0, 1.5]}.items():
        for value in values:
            with pytest.raises(chapter.cli.InputError, match="number from"):
                generate(**{name: value})
    for prompt in ([True], [1.5], ["a"], [tokenizer.vocab_size], [-1], [[1]], 5, None, "king", np.array([1.5]),
                   torch.tensor([[1]])):
        with pytest.raises(chapter.cli.InputError, match="token id"):
            generate(prompt)


def test_same_seed_same_text_and_only_text_on_stdout(chapter, trained, call):
    # hot, because a model that is hardly trained may do no more than repeat the last token
    flags = ("ROMEO:", 30, "--checkpoint", trained, "--temperature", 5)
    first, again, other = (call(chapter.generate, *flags, "--seed", seed) for seed in (1, 1, 2))
    assert first == again and first[1] != other[1]
    assert first[0] == 0 and first[1].startswith("ROMEO:") and first[2] == ""


def test_flags_and_positions_mean_the_same(chapter, trained, call):
    a = call(chapter.generate, "JULIET:", 12, "--checkpoint", trained)
    b = call(chapter.generate, "--prompt", "JULIET:", "--max-new-tokens", 12, "--checkpoint", trained)
    assert a == b and a[0] == 0 and len(a[1]) > len("JULIET:\n")


def test_longer_than_the_context(chapter, text_file, monkeypatch):
    """The oldest tokens drop out: the scores follow from the last ones alone."""
    tokenizer = chapter.make_tokenizer(chapter.data.read_text(text_file))
    model = chapter.make_model(tokenizer, max_position_embeddings=16)
    seen, words = [], tokenizer.encode("the king and queen of night speak softly to a fool") * 5

    def next_word(logits, *_):
        seen.append(logits)
        return words[len(seen) - 1]
    monkeypatch.setattr(chapter.sampling, "sample", next_word)
    tokens = list(chapter.generate.generate(model, tokenizer, chapter.prompt_ids(tokenizer, ""), 40))
    assert tokens == words[:40]
    for i in (10, 20, 39):   # all ids below end_of_text are ordinary tokens
        expected = chapter.logits(model, [tokenizer.end_of_text, *tokens[:i]][-16:])[-1]
        torch.testing.assert_close(seen[i][:tokenizer.end_of_text], expected[:tokenizer.end_of_text])


def test_padding_is_never_sampled():
    data, model_of = chapter1.data, chapter1.make_model
    tokenizer = data.CharTokenizer.train(["the king"])
    model = model_of(tokenizer)
    with torch.no_grad():   # every score is 0, so that padding is as likely as any other
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0)
    tokens = list(chapter1.generate.generate(model, tokenizer, [], 300, temperature=1.0))
    assert tokenizer.padding not in tokens and len(set(tokens)) > 5


def test_an_end_of_text_begins_a_new_document_with_an_empty_context(chapter, text_file, monkeypatch):
    """Training never shows a token of another document, so neither may generation."""
    tokenizer = chapter.make_tokenizer(chapter.data.read_text(text_file))
    model = chapter.make_model(tokenizer)
    seen, the = [], tokenizer.encode("the")[0]

    def ending(logits, *_):
        seen.append(logits)
        return tokenizer.end_of_text if len(seen) == 3 else the
    monkeypatch.setattr(chapter.sampling, "sample", ending)
    tokens = list(chapter.generate.generate(model, tokenizer, chapter.prompt_ids(tokenizer, "king"), 5))
    assert tokens == [the, the, tokenizer.end_of_text, the, the]
    for logits, context in zip(seen[3:], ([], [the])):
        n = tokenizer.end_of_text   # all before it are ordinary tokens
        torch.testing.assert_close(logits[:n], chapter.logits(model, [tokenizer.end_of_text, *context])[-1, :n])


def test_interactive_answers_every_line(chapter, trained, call, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO:\nJULIET:\n"))
    status, out, err = call(chapter.generate, "--interactive", "--max-new-tokens", 5, "--checkpoint", trained)
    assert status == 0 and out.startswith("ROMEO:") and "\nJULIET:" in out and "error" not in err


def test_interactive_survives_a_character_that_the_tokenizer_does_not_know(tmp_path, text_file, call, monkeypatch):
    run_here(chapter1.train, "--data", text_file, "--tokenizer", "char", "--steps", 1, "--out", tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO:\nQUEEN €\nJULIET:\n"))
    status, out, err = call(chapter1.generate, "--interactive", "--max-new-tokens", 5, "--checkpoint", tmp_path)
    assert status == 0 and out.startswith("ROMEO:") and "\nJULIET:" in out and "€" in err and "€" not in out


@pytest.mark.reaches("generate.stream")
def test_a_character_split_over_two_tokens_is_printed_whole(chapter, capsys):
    class Bytes:
        tokens = [b"\xc3", b"\xa9", b"!"]
    chapter.generate.stream([0, 1, 2, 0], Bytes)
    assert capsys.readouterr().out == "é!\ufffd\n"
