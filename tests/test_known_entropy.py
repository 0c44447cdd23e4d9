"""A source of known entropy: no model may score below it, and a trained one comes near it.

Validation is where a leak hides best: a model that sees the token it predicts looks brilliant, and the curve only looks
smooth. Here the answer is known. The source is a Markov chain whose true score on the validation text can be computed.
"""
import itertools
import math
import random

NEXT = {"": "abcd", "a": "aabc", "b": "cd", "c": "acd", "d": "abbbbbbb"}   # equally likely followers; "" is the start
END = 0.05                                                                # probability that a document ends here


def make_document(rng):
    text = rng.choice(NEXT[""])
    while rng.random() > END:
        text += rng.choice(NEXT[text[-1]])
    return text


def true_nats(document):
    """-ln of the probability that the source gives this document, its end included."""
    nats = -math.log(1 / 4)
    for before, after in zip(document, document[1:]):
        nats -= math.log((1 - END) * NEXT[before].count(after) / len(NEXT[before]))
    return nats - math.log(END)


def test_no_score_below_the_entropy_and_a_trained_model_near_it(chapter):
    train = chapter.train
    rng = random.Random(0)
    train_documents, val_documents = ([make_document(rng) for _ in range(n)] for n in (2000, 500))
    floor = sum(map(true_nats, val_documents)) / math.log(2) / chapter.data.num_bytes(val_documents)

    # The floor holds for tokens of several letters too: a text has one tokenization, and all texts together probability
    # 1.
    tokenizer = chapter.make_tokenizer(train_documents, vocab_size=264)
    model = chapter.make_model(tokenizer, max_position_embeddings=32)
    optimizer = train.adamw(model, 1e-2)
    steps = 180
    batches = chapter.training_batches(train_documents, tokenizer, 32)
    for step, batch in enumerate(itertools.islice(batches, steps)):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * train.schedule(step / steps)
        loss = train.loss_sum(model, batch) / (batch.targets != chapter.data.IGNORE).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _, bits = chapter.evaluate(model, val_documents, tokenizer)
    # Below the floor only by the luck of the draw: the source's own score on 500 documents is uncertain by about 1 %.
    assert floor * 0.999 < bits < floor * 1.03, f"{bits:.4f} bits per byte, the source itself scores {floor:.4f}"
