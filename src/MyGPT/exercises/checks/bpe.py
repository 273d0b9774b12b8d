"""The check of bpe.py: merges are compared with this library's, and their application with tiktoken's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise

import tiktoken

from MyGPT.exercises.checking import Check
from MyGPT.exercises.comparing import Mistakes, expect_list
from MyGPT.exercises.student import Student
from MyGPT.tokenizers.learning import learn_merges

Pair = tuple[int, int]
Counts = dict[Pair, int]

EXAMPLE = "abab abc"
TEXT = "he path aaaah hear the hath other path haaa then banana aha"
NEW_TEXT = "hear bathed aha the hath haaa this"
REPEATED = "aaaaaaa baaa"
UNICODE = "naïve 北京 naïve 北京"


def join(ids: list[int], pair: Pair, new_id: int, overlapping: bool = False, once: bool = False) -> list[int]:
    """Return the ids with a pair joined from left to right.

    With overlapping=True, a joined token does not use up its second part. With once=True, only the first pair is joined.
    """
    joined: list[int] = []
    i = 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair and not (once and new_id in joined):
            joined.append(new_id)
            i += 1 if overlapping and tuple(ids[i + 1 : i + 3]) == pair else 2
        else:
            joined.append(ids[i])
            i += 1
    return joined


def smallest(counts: Counts) -> Pair:
    """Return the most frequent pair, and of equally frequent pairs the smallest."""
    return min(counts, key=lambda pair: (-counts[pair], pair))


def count_apart(ids: list[int]) -> Counts:
    """Return how often each pair occurs if a pair of equal ids is counted without overlaps."""
    counts: Counter[Pair] = Counter()
    last: dict[Pair, int] = {}
    for i, pair in enumerate(pairwise(ids)):
        if last.get(pair) != i - 1 or pair[0] != pair[1]:
            counts[pair] += 1
            last[pair] = i
    return counts


def learn(
    ids: list[int],
    n_merges: int,
    choose: Callable[[Counts], Pair] = smallest,
    first_id: int = 256,
    count: Callable[[list[int]], Counts] = lambda ids: Counter(pairwise(ids)),
    overlapping: bool = False,
) -> list[Pair]:
    """Return the merges of a text. The arguments with a default make programs with a mistake."""
    merges: list[Pair] = []
    while len(merges) < n_merges and (counts := count(ids)):
        merges.append(choose(counts))
        ids = join(ids, merges[-1], first_id + len(merges) - 1, overlapping)
    return merges


def learning_mistakes(ids: list[int], n_merges: int) -> Mistakes:
    """Return the merges of programs with a common mistake."""
    pairs = Counter(pairwise(ids))
    right = learn(ids, n_merges)
    ties = "of equally frequent pairs it takes"
    return [
        (
            f"{ties} the one that occurs first in the text, not the smallest",
            learn(ids, n_merges, lambda c: max(c, key=c.__getitem__)),
        ),
        (
            f"{ties} the largest, not the smallest",
            learn(ids, n_merges, lambda c: max(c, key=lambda pair: (c[pair], pair))),
        ),
        (
            f"{ties} the one that occurs last in the text",
            learn(ids, n_merges, lambda c: max(reversed(c), key=c.__getitem__)),
        ),
        ("it takes the least frequent pair", learn(ids, n_merges, lambda c: min(c, key=lambda pair: (c[pair], pair)))),
        (
            "the pairs are counted only once, before the first merge; after each merge the text must be rewritten",
            sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:n_merges],
        ),
        ("the first new id is 255, but 256 is expected", learn(ids, n_merges, first_id=255)),
        ("the first new id is 257, but 256 is expected", learn(ids, n_merges, first_id=257)),
        ("the first new id is 0, but 256 is expected", learn(ids, n_merges, first_id=0)),
        ("the first new id is 1, but 256 is expected", learn(ids, n_merges, first_id=1)),
        (
            "overlapping pairs are counted once, but (97, 97) occurs twice in [97, 97, 97]",
            learn(ids, n_merges, count=count_apart),
        ),
        (
            "overlapping pairs are joined twice: after a merge, continue after its second id",
            learn(ids, n_merges, overlapping=True),
        ),
        ("it stops when the best pair occurs only once", learn_while_frequent(ids, n_merges)),
        ("it stops one merge too early", right[:-1]),
        ("the text is not rewritten after a merge, so the same pair is found again", right[:1] * n_merges),
    ]


def learn_while_frequent(ids: list[int], n_merges: int) -> list[Pair]:
    """Return the merges of a program that stops before it merges a pair that occurs once."""
    merges: list[Pair] = []
    while len(merges) < n_merges and (counts := Counter(pairwise(ids))):
        pair = smallest(counts)
        if counts[pair] == 1:
            break
        merges.append(pair)
        ids = join(ids, pair, 255 + len(merges))
    return merges


def apply_with_tiktoken(ids: list[int], merges: list[Pair]) -> list[int]:
    """Return the ids of a text after all merges, computed by tiktoken."""
    tokens = [bytes([byte]) for byte in range(256)]
    for first, second in merges:
        tokens.append(tokens[first] + tokens[second])
    encoding = tiktoken.Encoding(
        "exercise", pat_str=r"(?s:.+)", mergeable_ranks={token: i for i, token in enumerate(tokens)}, special_tokens={}
    )
    return encoding.encode_ordinary(bytes(ids).decode("utf-8"))


def applying_mistakes(ids: list[int], merges: list[Pair]) -> Mistakes:
    """Return the ids of programs with a common mistake."""
    in_text_order = list(ids)
    i = 0
    while i < len(in_text_order) - 1:
        pair = (in_text_order[i], in_text_order[i + 1])
        if pair in merges:
            in_text_order[i : i + 2] = [256 + merges.index(pair)]
            i = max(i - 1, 0)
        else:
            i += 1
    from_left = list(ids)  # as above, but never looks back
    i = 0
    while i < len(from_left) - 1:
        pair = (from_left[i], from_left[i + 1])
        if pair in merges:
            from_left[i : i + 2] = [256 + merges.index(pair)]
        else:
            i += 1
    numbered = list(enumerate(merges, 256))
    order = "merges are applied in the order of the text; apply merge 256 to the whole text, then 257, and so on"
    backwards = [(second, first) for first, second in merges]  # the mirror image of a text is merged from right to left
    mirrored = _apply(ids[::-1], list(enumerate(backwards, 256)))[::-1]
    right = _apply(ids, numbered)
    return [
        (order, in_text_order),
        (order, from_left),
        ("merges are applied in the reverse order", _apply(ids, numbered[::-1])),
        (
            "overlapping pairs are joined twice: after a merge, continue after its second id",
            _apply(ids, numbered, overlapping=True),
        ),
        ("pairs are joined from right to left, not from left to right", mirrored),
        ("only the first occurrence of each pair is joined", _apply(ids, numbered, once=True)),
        ("only the first merge is applied", _apply(ids, numbered[:1])),
        ("the last merge is not applied", _apply(ids, numbered[:-1])),
        ("the last id is lost: the loop over pairs ends before it", right[:-1]),
        ("the new ids start at 255, but 256 is expected", _apply(ids, list(enumerate(merges, 255)))),
        ("the new ids start at 257, but 256 is expected", _apply(ids, list(enumerate(merges, 257)))),
        ("the text is returned without any merge", list(ids)),
    ]


def _apply(
    ids: list[int], numbered: Sequence[tuple[int, Pair]], overlapping: bool = False, once: bool = False
) -> list[int]:
    for new_id, pair in numbered:
        ids = join(ids, pair, new_id, overlapping, once)
    return list(ids)


def _learning(text: str, n_merges: int) -> Callable[[Student], None]:
    def step(student: Student) -> None:
        ids = list(text.encode())
        call = f"learn_merges(list({text!r}.encode()), {n_merges})"
        got = student.call(call, student.function("learn_merges"), ids, n_merges)
        expect_list(call, got, learn_merges({bytes(ids): 1}, n_merges), learning_mistakes(ids, n_merges))

    return step


def _applying(text: str, learned_from: str, n_merges: int) -> Callable[[Student], None]:
    def step(student: Student) -> None:
        ids = list(text.encode())
        merges = learn_merges({learned_from.encode(): 1}, n_merges)
        call = f"apply_merges(list({text!r}.encode()), the {len(merges)} merges of {learned_from!r})"
        got = student.call(call, student.function("apply_merges"), ids, merges)
        expect_list(call, got, apply_with_tiktoken(ids, merges) if ids else [], applying_mistakes(ids, merges))

    return step


CHECK = Check(
    [
        ("learns the merges of a text", _learning(TEXT, 12)),
        ("learns the merges of the example", _learning(EXAMPLE, 2)),
        ("learns merges from repeated letters", _learning(REPEATED, 4)),
        ("learns merges from text that is not ASCII", _learning(UNICODE, 8)),
        ("stops when no pair is left", _learning("abc", 10)),
        ("learns nothing from an empty text", _learning("", 3)),
        ("applies merges to a new text as tiktoken does", _applying(NEW_TEXT, TEXT, 12)),
        ("applies the merges of the example", _applying(EXAMPLE, EXAMPLE, 2)),
        ("applies merges to repeated letters", _applying("aaaaa aaa", REPEATED, 4)),
        ("applies merges to text that is not ASCII", _applying("北京 naïve 京", UNICODE, 8)),
        ("leaves one letter as it is", _applying("x", TEXT, 5)),
        ("leaves an empty text as it is", _applying("", TEXT, 5)),
    ],
    library="tokenizers/learning.py (learn_merges) and tokenizers/codec.py",
)
"""The check of the task bpe."""
