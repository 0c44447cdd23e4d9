"""Are the validation documents a test? Not if they are trained on as well, and not if they are of another kind."""
import json

import numpy as np

SAMPLE = 500   # documents that are looked at
DRAWS = 1000   # tenths drawn by lot that the last one is compared with


def check_split(train_documents, val_documents):
    """Print a line about each reason why the loss on the validation documents would tell little."""
    train, validation = ([json.dumps(document) for document in part] for part in (train_documents, val_documents))
    known = set(train)
    share = sum(document in known for document in validation) / len(validation)
    if share >= 0.01:
        print(f"split   {share:.0%} of the validation documents are trained on too, word for word, and their loss shows"
              " what was learned by heart; remove what is there twice")
    documents = train + validation
    profiles = np.stack([profile(document) for document in documents[::-(-len(documents) // SAMPLE)]])   # (N, 320)
    N, rng = len(profiles), np.random.default_rng(0)
    # Row 0: the last.
    tenths = np.stack([np.arange(N)[::-1], *(rng.permutation(N) for _ in range(DRAWS))]) < max(1, N // 10)
    distances = np.abs(tenths @ profiles / tenths.sum(1, keepdims=True) - profiles.mean(0)).sum(1)   # (1 + DRAWS,)
    if distances[0] > distances[1:].max():
        print(f"split   the last tenth of the documents is less like the rest than any of {DRAWS} tenths drawn by lot:"
              " the data are sorted, or not mixed, and it is a test of one kind only; shuffle the documents")


def profile(document):
    """What kind of text it is, (320,): the share of each byte, and the length to a factor of two."""
    content = np.frombuffer(document[:10_000].encode(), np.uint8)
    return np.concatenate([np.bincount(content, minlength=256) / len(content),
                           np.arange(64) == len(document).bit_length()])
