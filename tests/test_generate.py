"""Sampling: what is kept, what is drawn, what reaches standard output."""
import io

import pytest
import torch

from chapters import chapter1

generate = chapter1.generate


def draws(logits, n=4000, **settings):
    dice = torch.Generator().manual_seed(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | settings
    return torch.tensor([generate.sample(logits.clone(), dice=dice, **settings) for _ in range(n)])


PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])


@pytest.mark.parametrize("settings, kept", [
    ({}, [0, 1, 2, 3, 4]), ({"temperature": 0.5}, [0, 1, 2, 3, 4]), ({"top_k": 2}, [1, 3]), ({"top_k": 99}, [0, 1, 2, 3, 4]),
    ({"top_p": 0.4}, [1]), ({"top_p": 0.41}, [1, 3]), ({"top_p": 0.8}, [1, 3, 4]), ({"top_p": 1e-6}, [1]),
    ({"top_k": 3, "top_p": 0.5}, [1, 3]), ({"temperature": 1e-30}, [1]), ({"temperature": 0}, [1])])
def test_samples_follow_the_distribution(settings, kept):
    """Chi-square: the counts are those of the distribution, restricted to what is kept and renormalized."""
    counts = draws(PROBABILITIES.log(), **settings).bincount(minlength=5)
    weights = torch.zeros(5)
    weights[kept] = PROBABILITIES[kept] ** (1 / (settings.get("temperature") or 1))
    expected = weights / weights.sum() * counts.sum()
    assert counts[expected == 0].sum() == 0, (counts, expected)
    kept_counts, kept_expected = counts[expected > 0], expected[expected > 0]
    chi_square = ((kept_counts - kept_expected) ** 2 / kept_expected).sum().item()
    assert chi_square < 20, (chi_square, counts, expected)   # 4 degrees of freedom: 1 in 2,000 by chance


@pytest.fixture(scope="module")
def checkpoint(text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    chapter1.run("train.py", "--data", text_file, "--tokenizer", "char", "--steps", 3, "--out", out)
    return out


def test_same_seed_same_text_and_only_text_on_stdout(checkpoint, call):
    first, again, other = (call(generate, "ROMEO:", 30, "--checkpoint", checkpoint, "--seed", seed) for seed in (1, 1, 2))
    assert first == again and first[1] != other[1]
    assert first[0] == 0 and first[1].startswith("ROMEO:") and first[2] == ""


def test_flags_and_positions_mean_the_same(checkpoint, call):
    a = call(generate, "JULIET:", 12, "--checkpoint", checkpoint)
    b = call(generate, "--prompt", "JULIET:", "--max-new-tokens", 12, "--checkpoint", checkpoint)
    assert a == b


def test_longer_than_the_context(checkpoint):
    model, tokenizer = chapter1.checkpoint.load_model(checkpoint)
    n = model.config.max_position_embeddings + 5
    assert len(list(generate.generate(model, tokenizer, tokenizer.encode("the "), n, temperature=0))) == n


def test_padding_is_never_sampled(checkpoint):
    model, tokenizer = chapter1.checkpoint.load_model(checkpoint)
    with torch.no_grad():   # make padding the favourite: its row of the tied table points where every answer points
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 0)
    tokens = list(generate.generate(model, tokenizer, [], 300, temperature=1.0))
    assert tokenizer.padding not in tokens and len(set(tokens)) > 10


def test_an_end_of_text_begins_a_new_document_with_an_empty_context(checkpoint):
    """Training never shows a token of another document, so neither may generation."""
    model, tokenizer = chapter1.checkpoint.load_model(checkpoint)
    seen = []
    forward = model.forward

    def ending(ids):
        seen.append(ids.tolist()[0])
        logits = forward(ids)
        logits[..., tokenizer.end_of_text] += 100 * (len(seen) == 3)
        return logits
    model.forward = ending
    list(generate.generate(model, tokenizer, tokenizer.encode("the"), 5, temperature=0))
    end = tokenizer.end_of_text
    assert [len(ids) for ids in seen] == [4, 5, 6, 1, 2] and all(ids[0] == end for ids in seen)


def test_interactive_answers_every_line_and_survives_a_bad_one(checkpoint, call, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ROMEO:\nQUEEN €\nJULIET:\n"))
    status, out, err = call(generate, "--interactive", "--max-new-tokens", 5, "--checkpoint", checkpoint)
    assert status == 0 and out.startswith("ROMEO:") and "\nJULIET:" in out and "€" in err and "€" not in out


def test_a_character_split_over_two_tokens_is_printed_whole(capsys):
    class Bytes:
        tokens = [b"\xc3", b"\xa9", b"!"]
    generate.stream([0, 1, 2, 0], Bytes)
    assert capsys.readouterr().out == "é!\ufffd\n"
