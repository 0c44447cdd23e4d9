"""Byte pair encoding: learn the tokens of a language model from text, then cut any text into them.

A model reads numbers. Single characters make sequences long, and every position costs computation; whole words make
the vocabulary endless, and a name or a typo has no number at all. BPE starts from the 256 bytes, so that nothing is
ever unknown, and merges the two neighbours that occur together most often into a new token, again and again (Sennrich
et al. 2016; on bytes: GPT-2, Radford et al. 2019). A thousand merges, and a token holds more than two bytes.

Three words: the text is first split into *pieces* (about: words), inside which all merging happens; a *token* is bytes
that the vocabulary knows; its *rank* is its number and at the same time its age, 0-255 the bytes, then merge by merge.
"""
import heapq
import math
from collections import Counter, defaultdict

import regex   # not re, which has no \p{L}; tiktoken depends on it, so it is here

# Qwen's rule for where a token may not reach across. Beside GPT-2's: capital 'S too, any one sign before a word, digits
# one by one, so that a number is written in one way only, and line ends stay with the signs before them.
SPLIT_PATTERN = (r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
                 r"""|\s*[\r\n]+|\s+(?!\S)|\s+""")
PIECES = regex.compile(SPLIT_PATTERN)


def valid_unicode(text):
    """Make a str encodable as UTF-8, in the way of tiktoken. Text that already is comes back unchanged.

    A Python str may hold surrogates, halves of a character that UTF-16 writes in two; JSON with \\ud83d in it is the
    usual source. Two halves that fit become the character they mean; a lone one becomes U+FFFD, the replacement mark.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---------------------------------------------------------------------------------------------------- train

def train_bpe(documents, num_merges):
    """Learn num_merges tokens from a list of str. Returns ranks, a dict from the bytes of a token to its number.

    The 256 single bytes come first, then the merges in their order. Of several equally frequent candidates the one
    whose bytes sort first is taken, so the result depends on nothing but the text. There are fewer merges than asked
    for if no two neighbours occur together twice any more.

    The plain algorithm recounts the text for each merge. Here nothing is counted twice. Equal pieces are merged alike,
    so each distinct one is kept once, with its frequency. A merge changes counts only beside the places where it
    happens, and where[...] remembers the words to look into. A heap has the most frequent candidate ready.
    """
    pieces = Counter(piece for document in documents for piece in PIECES.findall(valid_unicode(document)))
    words = [[bytes([byte]) for byte in piece.encode()] for piece in pieces]
    frequencies = list(pieces.values())

    # A candidate is the bytes that two neighbours would become, not the pair of them. tiktoken looks bytes up, so a+bc
    # and ab+c, if both were there, would have to be one token. (They never both are: each merge runs from left to right
    # through every word, so the same bytes between two token ends are cut the same way everywhere. The assert below
    # watches over it; a merge that misses one place would end it.)
    counts = Counter()         # candidate -> how often it occurs in the text; in aaa, aa occurs twice
    where = defaultdict(set)   # candidate -> numbers of the words in which it occurs, or has occurred
    for number, word in enumerate(words):
        for left, right in zip(word, word[1:]):
            counts[left + right] += frequencies[number]
            where[left + right].add(number)
    heap = [(-count, candidate) for candidate, count in counts.items()]   # heapq pops the smallest
    heapq.heapify(heap)

    ranks = {bytes([byte]): byte for byte in range(256)}
    while heap and len(ranks) < 256 + num_merges:
        count, token = heapq.heappop(heap)
        if -count != counts[token]:   # an old entry: a count that changes pushes a new one and leaves this in place
            continue
        if counts[token] < 2:
            break
        assert token not in ranks, f"{token} would be merged twice, as ranks {ranks[token]} and {len(ranks)}"
        ranks[token] = len(ranks)
        changes = Counter()
        for number in where.pop(token):
            for candidate, change in merge_in_place(words[number], token):
                changes[candidate] += change * frequencies[number]
                if change > 0:
                    where[candidate].add(number)
        changes[token] = -counts[token]   # all of them are gone, the overlapping ones too
        for candidate, change in changes.items():
            counts[candidate] += change
            heapq.heappush(heap, (-counts[candidate], candidate))
    return ranks


def merge_in_place(word, token):
    """Merge, from left to right, the neighbours in word (a list of bytes) that make token.

    Yields (candidate, +1 or -1) for each candidate that thereby comes or goes beside them.
    """
    # word[:done] is what word[:i] becomes: a deletion each time would move the rest of the word each time.
    i = done = 0
    while i < len(word):
        merges = i + 1 < len(word) and word[i] + word[i + 1] == token
        if merges:
            if done > 0:
                yield word[done - 1] + word[i], -1
                yield word[done - 1] + token, +1
            if i + 2 < len(word):
                yield word[i + 1] + word[i + 2], -1
                yield token + word[i + 2], +1
        word[done] = token if merges else word[i]
        i, done = i + 1 + merges, done + 1
    del word[done:]


# ----------------------------------------------------------------------------------------- encode and decode

def encode(text, ranks):
    """Text to token ids, the same as those of tiktoken.Encoding with these ranks and SPLIT_PATTERN.

    The one exception: a character younger than the Unicode tables in one of the two regex engines is a letter here and
    a symbol there. Merges are the same then, but a piece may end elsewhere.
    """
    return encode_bytes(valid_unicode(text).encode(), ranks)


def encode_bytes(data, ranks):
    """Any bytes to token ids, UTF-8 or not: decode gives exactly these bytes back.

    SPLIT_PATTERN works on characters. surrogateescape turns a byte that is not UTF-8 into a character that stands for
    nothing else, and after splitting back into the byte.
    """
    pieces = PIECES.findall(data.decode(errors="surrogateescape"))
    return [rank for piece in pieces for rank in encode_piece(piece.encode(errors="surrogateescape"), ranks)]


def encode_piece(piece, ranks):
    """Repeat the training on one piece (bytes): always the oldest merge that is possible, and of equals the leftmost.

    Not the longest token that fits: the merges must come in the order in which they were learned, or the model meets
    cuts that it never saw in training. Quadratic in the length of the piece, which is harmless for words.
    """
    if piece in ranks:   # tiktoken's short cut; trained ranks lead to the same token, ranks made otherwise may not
        return [ranks[piece]]
    tokens = [piece[i:i + 1] for i in range(len(piece))]
    while len(tokens) > 1:
        merged = [left + right for left, right in zip(tokens, tokens[1:])]
        oldest = min(merged, key=lambda token: ranks.get(token, math.inf))   # min takes the first of equals
        if oldest not in ranks:
            break
        i = merged.index(oldest)
        tokens[i:i + 2] = [oldest]
    return [ranks[token] for token in tokens]


def decode(ids, ranks):
    """Token ids to bytes. Only the whole is UTF-8: a token may end inside a character, so join first, then decode."""
    tokens = {rank: token for token, rank in ranks.items()}
    return b"".join(tokens[i] for i in ids)
