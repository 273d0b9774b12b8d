"""Exercise 1: byte-pair encoding (BPE). Write `learn_merges` and `apply_merges`.

A tokenizer turns a text into a list of numbers (ids). BPE starts with bytes, whose ids are 0 to 255. It then looks for the
pair of neighbours that occurs most often, gives this pair a new id, and replaces the pair by the new id everywhere. Each
further merge repeats this, so frequent words become single tokens, and every text can still be encoded. GPT-2's tokenizer was
learned in this way, with 50,000 merges.

Example: the text "abab abc" has the ids [97, 98, 97, 98, 32, 97, 98, 99].
    Merge 256 joins (97, 98), which occurs three times. The ids become [256, 256, 32, 256, 99].
    Every pair now occurs once: (256, 256), (256, 32), (32, 256) and (256, 99). The smallest is (32, 256): merge 257 joins it.
    The ids become [256, 256, 257, 99]. Decoded, 257 is " ab".

Check your work with `mygpt check bpe`. A hint is at the end of this file.
"""

from __future__ import annotations


def learn_merges(ids: list[int], n_merges: int) -> list[tuple[int, int]]:
    """Return the merges in the order in which they are learned. Merge number i, counted from 0, creates the id 256 + i.

    Each merge joins the most frequent pair of neighbours. Of equally frequent pairs, the smallest pair is joined: compare the
    first ids, then the second ids. Pairs may overlap when they are counted, so (97, 97) occurs twice in [97, 97, 97]. Fewer
    than n_merges merges are returned if no pair is left. Do not change the list `ids`.

    Args:
        ids: the bytes of a text, each 0 to 255; the list may be empty.
        n_merges: largest number of merges.
    """
    raise NotImplementedError


def apply_merges(ids: list[int], merges: list[tuple[int, int]]) -> list[int]:
    """Return the ids of a new text after all merges, each applied to the whole text in the order of the list.

    Pairs are joined from left to right and do not overlap: [97, 97, 97] becomes [256, 97] if merge 256 joins (97, 97). Do not
    change the list `ids`.

    Args:
        ids: the bytes of a text, each 0 to 255; the list may be empty.
        merges: the result of `learn_merges`.
    """
    raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. First write a function that joins one pair: walk through the list with an index i. If ids[i] and ids[i + 1] are the
# pair, append the new id and add 2 to i; otherwise append ids[i] and add 1. Both functions above use it. To count pairs, use
# collections.Counter(zip(ids, ids[1:])). To choose among equal counts, use max or min with a key that is a tuple.
