"""Byte-level byte-pair encoding: tokens are frequent byte strings, learned by merging pairs (Sennrich et al., 2016).

Text is first cut into chunks (words with their leading space, numbers, punctuation, white space) by GPT-2's pattern;
merges never cross a chunk. Starting from the 256 bytes nothing is ever unknown. Learning the merges is written here to
be read; applying them is left to tiktoken, which does the same thing in Rust. GPT-2's own merges are in gpt2.py.
"""

from __future__ import annotations

import heapq
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from MyGPT.tokenizers.base import (
    ENDOFTEXT,
    MAX_ID,
    Tokenizer,
    hugging_face_json,
    refuse_surrogates,
    require_text,
    whole_numbers,
)

if TYPE_CHECKING:
    import tiktoken

Pair = tuple[int, int]

GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# The same matches with possessive repeats, on which a backtracking engine never runs out of stack for words.
_TIKTOKEN_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
# Unicode's White_Space, which is what \s means to tiktoken's engine (Python's \s has \x1c-\x1f too).
_WHITE_SPACE_RUN = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{1000,}")


class BPETokenizer(Tokenizer):
    """Byte-level BPE over the tokens of `vocab` (bytes to id), made by `merges` in that order.

    `special_tokens` (text to id) stand outside the merges; where two fit the longer one counts. A vocabulary that the
    merges do not account for exactly is a ValueError; `known` skips the half of that check which takes half a second for
    GPT-2's.
    """

    def __init__(
        self,
        vocab: Mapping[bytes, int],
        merges: Sequence[tuple[bytes, bytes]],
        special_tokens: Mapping[str, int],
        known: bool = False,
    ) -> None:
        _check(vocab, merges, special_tokens)
        if not known:
            _check_that_merges_come_about(vocab, merges)
        self._vocab = dict(vocab)
        self._merges = list(merges)
        self._special_tokens = dict(special_tokens)
        self._encoding = _encoding(self._vocab, self._special_tokens)

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        special_tokens: Collection[str] = (ENDOFTEXT,),
        progress: bool = True,
    ) -> BPETokenizer:
        """Learns merges from a text, or from an iterable of texts that no merge crosses, until there are vocab_size tokens.

        Ids: the 256 bytes, the merges in the order learned, the special tokens. Special tokens written out in the text
        are cut out of it first. There are fewer than vocab_size tokens if the text runs out of pairs.

        The pair merged is always the most frequent; of equally frequent ones the pair of smaller ids, first id first.
        Cost: one pass over the text, then memory and time follow its distinct chunks, not its length: a merge touches
        only the chunks that hold its pair. Natural text of n characters has about n**0.6 distinct chunks, so ten times
        the text takes about four times as long after the first pass. A text without any boundary is one chunk as long
        as itself, which each of its merges walks through.
        """
        if isinstance(special_tokens, str):
            raise TypeError(f"special_tokens must be a list of texts, got the text {special_tokens!r}")
        special_tokens = list(dict.fromkeys(special_tokens))
        smallest = 256 + len(special_tokens)
        if type(vocab_size) is not int or vocab_size < smallest:
            raise ValueError(
                f"vocab_size must be a whole number of at least {smallest} (256 bytes and {len(special_tokens)} special "
                f"tokens), got {vocab_size!r}"
            )
        chunk_counts = count_chunks([text] if isinstance(text, str) else text, special_tokens)
        pairs = learn_merges(chunk_counts, vocab_size - smallest, progress)
        tokens = [bytes([byte]) for byte in range(256)]
        for first, second in pairs:
            tokens.append(tokens[first] + tokens[second])
        return cls(
            {token: id_ for id_, token in enumerate(tokens)},
            [(tokens[first], tokens[second]) for first, second in pairs],
            {token: len(tokens) + i for i, token in enumerate(special_tokens)},
        )

    @property
    def n_vocab(self) -> int:
        return self._encoding.n_vocab

    @property
    def eot_token(self) -> int | None:
        return self._special_tokens.get(ENDOFTEXT)

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merges in the order in which they apply."""
        return list(self._merges)

    @property
    def special_tokens(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return dict(self._special_tokens)

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Collection[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[int]:
        """The ids of `text`.

        The keywords are tiktoken's: a special token that is disallowed ("all": all that are not allowed) is a
        ValueError, one that is allowed becomes its id, one that is neither is ordinary text. By default all are allowed
        (tiktoken: none).
        """
        require_text(text)
        allowed = set(self._special_tokens) if allowed_special == "all" else set(allowed_special)
        if disallowed_special == "all":
            disallowed_special = set(self._special_tokens) - allowed
        for token in disallowed_special:
            if token in text:
                raise ValueError(
                    f"the text holds the special token {token!r}: allow it with allowed_special={{{token!r}}}, or have "
                    f"it read as ordinary text with disallowed_special=()"
                )
        refuse_surrogates(text)
        ids: list[int] = []
        for i, part in enumerate(_special_pattern(allowed & set(self._special_tokens)).split(text)):
            if i % 2:
                ids.append(self._special_tokens[part])
            else:
                for stretch in _cut_long_white_space(part):
                    ids += self._encoding.encode_ordinary(stretch)
        return ids

    def encode_ordinary(self, text: str) -> list[int]:
        """The ids of `text` with special tokens read as ordinary text."""
        return self.encode(text, allowed_special=(), disallowed_special=())

    def encode_batch(self, texts: Iterable[str], **special: Any) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text, **special) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return b"".join(self.decode_tokens_bytes(ids)).decode("utf-8", errors="replace")

    def decode_tokens_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """The bytes of each id, for showing tokens one by one."""
        ids = whole_numbers(ids)
        try:
            return self._encoding.decode_tokens_bytes(ids)
        except (KeyError, OverflowError):
            known = {*self._vocab.values(), *self._special_tokens.values()}
            unknown = next(id_ for id_ in ids if id_ not in known)
            raise ValueError(f"id {unknown} is not in the vocabulary of {self.n_vocab} tokens") from None

    def to_json(self) -> dict[str, Any]:
        visible = {token: "".join(BYTE_TO_CHARACTER[byte] for byte in token) for token in self._vocab}
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {visible[token]: id_ for token, id_ in self._vocab.items()},
            "merges": [[visible[first], visible[second]] for first, second in self._merges],
        }
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return hugging_face_json(model, self._special_tokens, pre_tokenizer=byte_level, decoder=byte_level)


def count_chunks(texts: Iterable[str], special_tokens: Collection[str] = ()) -> Counter[bytes]:
    """How often each chunk of GPT-2's pattern stands in the texts, as UTF-8 bytes, special tokens cut out."""
    import regex

    pattern = regex.compile(GPT2_PATTERN)
    special = _special_pattern(special_tokens)
    counts: Counter[str] = Counter()
    for text in texts:
        require_text(text)
        refuse_surrogates(text)
        for part in special.split(text)[::2]:
            counts.update(match[0] for match in pattern.finditer(part))
    return Counter({chunk.encode(): count for chunk, count in counts.items()})


def learn_merges(chunk_counts: Mapping[bytes, int], n_merges: int, progress: bool = False) -> list[Pair]:
    """The first n_merges merges, as pairs of ids (bytes are 0 to 255, the i-th merge makes id 256 + i).

    The textbook counts every pair anew for every merge. Here the counts are kept: `chunks_with` tells which chunks a merge
    changes, and a heap tells the next best pair. A pair's count only ever falls after the merge that made it possible,
    so an entry of the heap is at worst too high: it is put back with its true count when it surfaces.
    """
    from tqdm import tqdm

    chunks = [list(chunk) for chunk in chunk_counts]
    counts = list(chunk_counts.values())
    pair_counts: dict[Pair, int] = defaultdict(int)
    chunks_with: dict[Pair, set[int]] = defaultdict(set)
    for i, (ids, count) in enumerate(zip(chunks, counts, strict=True)):
        for pair in pairwise(ids):
            pair_counts[pair] += count
            chunks_with[pair].add(i)
    heap = [(-count, pair) for pair, count in pair_counts.items()]  # smallest first: largest count, then smallest pair
    heapq.heapify(heap)

    merges: list[Pair] = []
    with tqdm(total=n_merges, desc="learning merges", unit="merge", disable=not progress, leave=False) as bar:
        while heap and len(merges) < n_merges:
            negative_count, pair = heapq.heappop(heap)
            if -negative_count != pair_counts[pair]:
                if pair_counts[pair]:
                    heapq.heappush(heap, (-pair_counts[pair], pair))
                continue
            new_id = 256 + len(merges)
            merges.append(pair)
            new_pairs = set()
            for i in chunks_with.pop(pair):
                merged = merge(chunks[i], pair, new_id)
                for old in pairwise(chunks[i]):
                    pair_counts[old] -= counts[i]
                for new in pairwise(merged):
                    pair_counts[new] += counts[i]
                    if new_id in new:
                        chunks_with[new].add(i)
                        new_pairs.add(new)
                chunks[i] = merged
            for new in new_pairs:
                heapq.heappush(heap, (-pair_counts[new], new))
            bar.update()
    return merges


def merge(ids: Sequence[int], pair: Pair, new_id: int) -> list[int]:
    """`ids` with every occurrence of `pair`, from the left, replaced by `new_id`."""
    merged: list[int] = []
    i = 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            merged.append(new_id)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


def _byte_alphabet() -> dict[int, str]:
    """The visible character by which GPT-2's files write each byte: itself where it is visible, else one from U+0100 on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {**{byte: chr(byte) for byte in visible}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


BYTE_TO_CHARACTER = _byte_alphabet()
CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def from_visible(
    vocab: Mapping[str, int], merges: Iterable[Sequence[str]], special: Mapping[str, int], known: bool = False
) -> BPETokenizer:
    """A tokenizer from tokens written in GPT-2's visible characters, as `tokenizer.json` and `vocab.bpe` have them."""

    @cache  # nearly every token is in three places
    def to_bytes(token: str) -> bytes:
        try:
            return bytes(map(CHARACTER_TO_BYTE.__getitem__, token))
        except KeyError as error:
            raise ValueError(f"token {token!r} holds {error.args[0]!r}, which stands for no byte") from None

    return BPETokenizer(
        {to_bytes(token): id_ for token, id_ in vocab.items() if token not in special},
        [(to_bytes(first), to_bytes(second)) for first, second in merges],
        special,
        known,
    )


def _encoding(vocab: dict[bytes, int], special_tokens: dict[str, int]) -> tiktoken.Encoding:
    import tiktoken

    return tiktoken.Encoding("mygpt", pat_str=_TIKTOKEN_PATTERN, mergeable_ranks=vocab, special_tokens=special_tokens)


def _check(
    vocab: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]], special_tokens: Mapping[str, int]
) -> None:
    """A ValueError unless ids and merges belong together."""
    missing = [byte for byte in range(256) if bytes([byte]) not in vocab]
    if missing:
        raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes, 0x{missing[0]:02x} the first")
    for token in special_tokens:
        if not isinstance(token, str) or not token:
            raise ValueError(f"a special token must be a text of at least one character, got {token!r}")
    ids = [*vocab.values(), *special_tokens.values()]
    if any(type(id_) is not int or not 0 <= id_ <= MAX_ID for id_ in ids) or len(set(ids)) != len(ids):
        raise ValueError(f"the ids of the vocabulary must be distinct whole numbers from 0 to {MAX_ID}")
    last = -1
    for first, second in merges:
        made = vocab.get(first + second)
        if made is None or first not in vocab or second not in vocab:
            raise ValueError(f"the merge of {first!r} and {second!r} needs tokens that the vocabulary lacks")
        if made <= last:
            raise ValueError(f"the merge of {first!r} and {second!r} makes id {made} after id {last}: ids must rise")
        last = made
    if len(vocab) != 256 + len(merges):
        raise ValueError(
            f"the vocabulary has {len(vocab)} tokens, 256 bytes and {len(merges)} merges make another number"
        )


def _check_that_merges_come_about(vocab: Mapping[bytes, int], merges: Sequence[tuple[bytes, bytes]]) -> None:
    """A ValueError unless tiktoken, which knows ids but no merges, will merge exactly as `merges` says.

    It joins any two neighbours that make a token. That is the merge of that token alone if, of its bytes and by the
    earlier merges, the two parts of the merge are all that is left.
    """
    for first, second in merges:
        parts = _last_parts(first + second, vocab)
        if parts != [first, second]:
            raise ValueError(
                f"the merge of {first!r} and {second!r} never comes about: the merges before it make {parts} of its bytes"
            )


def _last_parts(token: bytes, vocab: Mapping[bytes, int]) -> list[bytes]:
    """What tiktoken has of the bytes of `token` when all tokens of smaller ids are made: two parts, if all is well.

    The smallest id first, of equal ones the leftmost, from a heap: a file may have tokens of a megabyte.
    """
    part_at = {i: token[i : i + 1] for i in range(len(token))}  # the parts that are left, by where they begin
    before = {i: i - 1 for i in part_at}
    heap: list[tuple[int, int, int]] = []

    def offer(start: int) -> None:
        after = start + len(part_at.get(start, b""))
        if start in part_at and after in part_at:
            made = token[start : after + len(part_at[after])]
            if vocab.get(made, vocab[token]) < vocab[token]:
                heapq.heappush(heap, (vocab[made], start, len(made)))

    for i in range(len(token)):
        offer(i)
    while heap:
        _, start, n_bytes = heapq.heappop(heap)
        after = start + len(part_at.get(start, b""))
        if start not in part_at or after not in part_at or after + len(part_at[after]) != start + n_bytes:
            continue  # one of the two has become part of another since
        del part_at[after]
        part_at[start] = token[start : start + n_bytes]
        before[start + n_bytes] = start
        offer(start)
        offer(before[start])
    return [part_at[i] for i in sorted(part_at)]


def _special_pattern(tokens: Iterable[str]) -> re.Pattern[str]:
    """Splits a text into ordinary parts (at even places) and the special tokens between them, the longest that fit."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"((?!))")


def _cut_long_white_space(text: str) -> Iterable[str]:
    """The text in parts that encode as the whole does, cut at very long runs of white space.

    The pattern takes a run before a word all but its last character, and tiktoken's engine finds that by backtracking,
    which ends in an error at about a million characters. Cut there ourselves.
    """
    start = 0
    for run in _WHITE_SPACE_RUN.finditer(text):
        if run.end() == len(text):
            break
        yield text[start : run.start()]
        yield text[run.start() : run.end() - 1]
        start = run.end() - 1
    yield text[start:]
