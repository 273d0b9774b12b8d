"""Byte-level byte-pair encoding (Sennrich et al., 2016): tokens are frequent byte strings, learned by merging pairs.

GPT-2's pattern first splits text into chunks: words with their leading space, numbers, punctuation, white space. Merges
never cross the border of a chunk. The 256 single bytes are tokens, so every text can be encoded. learning.py learns
merges in readable Python; codec.py applies them with fast libraries. gpt2.py reads the merges of GPT-2.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, Literal

import numpy as np

from MyGPT.tokenizers.added import MAX_ID, AddedToken, AddedTokenSplitter
from MyGPT.tokenizers.base import (
    ENDOFTEXT,
    Tokenizer,
    hugging_face_json,
    refuse_surrogates,
    require_text,
    valid_ids,
    zip_ends,
)
from MyGPT.tokenizers.codec import BYTE_TO_CHARACTER as BYTE_TO_CHARACTER  # "import X as X" marks X as public.
from MyGPT.tokenizers.codec import Codec, TokenArray, id_dtype
from MyGPT.tokenizers.learning import GPT2_PATTERN as GPT2_PATTERN
from MyGPT.tokenizers.learning import count_chunks, learn_merges

Merge = tuple[bytes, bytes]
"""The bytes of two adjacent tokens that a merge joins to one token."""


def check_vocab_size(vocab_size: int, n_special_tokens: int = 1) -> None:
    """Raise ValueError unless a byte-level BPE with this number of special tokens can have `vocab_size` tokens."""
    smallest = 256 + n_special_tokens
    if type(vocab_size) is not int or vocab_size < smallest:
        allowed = f"a whole number of at least {smallest} (256 bytes and {n_special_tokens} special tokens)"
        raise ValueError(f"vocab_size (--tokenizer_size) must be {allowed}, got {vocab_size!r}")


class BPETokenizer(Tokenizer):
    """A tokenizer with byte-level byte-pair encoding (BPE), the method of GPT-2.

    Args:
        vocab: maps each token (bytes) to its id. The tokens are the 256 single bytes and the results of `merges`.
        merges: pairs of tokens to join, in the order in which they are joined
        special_tokens: maps each special token (str) to its id. Where two special tokens match, the longer one wins. A
            special token may repeat a token of `vocab` with the same text and id.
        known: True means that `merges` are known to be correct, and skips a check of them that takes half a second for
            the 50,000 merges of GPT-2
        unmerged: maps tokens that no merge creates to their ids. They are decoded, but no text is encoded to them. The
            tokens are written in visible characters, as in GPT-2's files.
        added_tokens: further tokens that are found in a text as a whole, such as ordinary words that were added to the
            vocabulary
    """

    def __init__(
        self,
        vocab: Mapping[bytes, int],
        merges: Sequence[Merge],
        special_tokens: Mapping[str, int],
        known: bool = False,
        unmerged: Mapping[str, int] | None = None,
        *,
        added_tokens: Iterable[AddedToken] = (),
    ) -> None:
        self.added_tokens = (*(AddedToken(token, id_) for token, id_ in special_tokens.items()), *added_tokens)
        unmerged = unmerged or {}
        _check(vocab, merges, self.added_tokens, unmerged)
        self._vocab, self._unmerged = dict(vocab), dict(unmerged)
        self.merges = list(merges)
        """The pairs of tokens that are joined, in the order in which they are joined."""
        self.special_tokens = {token.content: token.id for token in self.added_tokens if token.special}
        """Maps each special token to its id."""
        self._bytes_of = {token.id: token.content.encode() for token in self.added_tokens}
        self._bytes_of |= {id_: _visible_to_bytes(token) for token, id_ in unmerged.items()}
        self._bytes_of |= {id_: token for token, id_ in vocab.items()}
        self._n_vocab = max(self._bytes_of) + 1
        self._splitter = AddedTokenSplitter(self.added_tokens)
        self._codec = Codec(self._vocab, self.merges)
        if not known:
            _check_merge_order(self._codec.ranks, merges)

    @classmethod
    def train(
        cls,
        text: str | Iterable[str],
        vocab_size: int,
        special_tokens: Collection[str] = (ENDOFTEXT,),
        progress: bool = True,
    ) -> BPETokenizer:
        """Train a tokenizer: merge the most frequent pair of adjacent tokens until there are `vocab_size` tokens.

        Ids are given to the 256 bytes, then to the merged tokens in the order in which they are learned, then to the
        special tokens. Of equally frequent pairs, the pair with the smallest ids is merged first. If no pair is left,
        the tokenizer has fewer than `vocab_size` tokens.

        GPT-2's pattern first splits the text into chunks, mainly words. After one pass over the text, time and memory
        depend on the number of distinct chunks. Natural text of n characters has about n**0.6 distinct chunks. An
        iterable of texts is read once and is not stored.

        Args:
            text: a text, or an iterable of texts; merges never cross from one text to the next
            vocab_size: number of tokens, at least 256 plus the number of special tokens
            special_tokens: special tokens of the tokenizer, which are removed from the text before training
            progress: show a progress bar
        """
        if isinstance(special_tokens, str):
            raise TypeError(f"special_tokens must be a list of strings, got the string {special_tokens!r}")
        special_tokens = list(dict.fromkeys(special_tokens))
        check_vocab_size(vocab_size, len(special_tokens))
        chunk_counts = count_chunks([text] if isinstance(text, str) else text, special_tokens)
        pairs = learn_merges(chunk_counts, vocab_size - 256 - len(special_tokens), progress)
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
        return self._n_vocab

    def id_of(self, token: str) -> int | None:
        known = self._unmerged | {added.content: added.id for added in self.added_tokens}
        return known[token] if token in known else self._vocab.get(_visible_to_bytes(token))

    def token_of(self, id_: int) -> str | None:
        names = [*((added.content, added.id) for added in self.added_tokens), *self._unmerged.items()]
        name = next((name for name, other in names if other == id_), None)
        if name is not None or id_ not in self._bytes_of:
            return name
        return "".join(BYTE_TO_CHARACTER[byte] for byte in self._bytes_of[id_])

    def without_added(self, contents: Collection[str]) -> BPETokenizer:
        """Return a copy without these added tokens, which are then encoded as ordinary text."""
        kept = [token for token in self.added_tokens if token.content not in contents]
        changed = BPETokenizer(self._vocab, self.merges, {}, True, self._unmerged, added_tokens=kept)
        changed.settings, changed.source = self.settings, self.source
        changed._end_of_model = self._end_of_model
        return changed

    def encode(
        self,
        text: str,
        *,
        allowed_special: Literal["all"] | Collection[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[int]:
        """Return the token ids of a text.

        The two options have the same meaning as in tiktoken, but in tiktoken no special token is allowed by default. A
        special token that is in neither of the two sets is encoded as ordinary text. Added words always become one id.

        Args:
            allowed_special: special tokens that each become a single id; "all" for all special tokens
            disallowed_special: special tokens that raise ValueError; "all" for all that are not in `allowed_special`
        """
        ids: list[int] = []
        for part in self._parts(text, allowed_special, disallowed_special):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                ids += self._codec.encode(part)
        return ids

    def _parts(
        self,
        text: str,
        allowed_special: Literal["all"] | Collection[str] = "all",
        disallowed_special: Literal["all"] | Collection[str] = "all",
    ) -> list[str | AddedToken]:
        """Return the added tokens in a text, and the texts between them. The options are those of `encode`."""
        require_text(text)
        allowed = set(self.special_tokens) if allowed_special == "all" else set(allowed_special)
        if disallowed_special == "all":
            disallowed_special = set(self.special_tokens) - allowed
        for token in disallowed_special:
            if token in text:
                allow = f"allow it with allowed_special={{{token!r}}}"
                encode = "encode it as ordinary text with disallowed_special=()"
                raise ValueError(f"the text contains the special token {token!r}: {allow}, or {encode}")
        refuse_surrogates(text)
        splitter = self._splitter
        if allowed_special != "all":
            splitter = AddedTokenSplitter(it for it in self.added_tokens if not it.special or it.content in allowed)
        return splitter.split(text)

    def encode_ordinary(self, text: str) -> list[int]:
        """Return the token ids of a text, with special tokens encoded as ordinary text."""
        return self.encode(text, allowed_special=(), disallowed_special=())

    def encode_batch(self, texts: Iterable[str], **special: Any) -> list[list[int]]:
        """Return one list of token ids per text. `special` are the keyword options of `encode`.

        If gigatoken is installed, it encodes large batches, many times as fast as `encode` encodes short texts.
        """
        pieces: list[str] = []
        following: list[int] = []
        for text in texts:
            _add_parts(self._parts(text, **special), self._n_vocab, pieces, following)  # No token has the id n_vocab.
        ids = self._codec.encode_joined(pieces, following)
        ends = np.flatnonzero(ids == self._n_vocab).tolist()
        return [ids[start:end].tolist() for start, end in zip([0, *(end + 1 for end in ends)], ends, strict=False)]

    def encode_to_array(self, texts: Iterable[str | bytes], ends_document: Iterable[bool] | None = None) -> TokenArray:
        end = self.eot_token
        if end is not None and self._vocab.get(self._bytes_of[end]) == end:  # Merges can make the token as well.
            return super().encode_to_array(texts, ends_document)
        content = next((token.content for token in self.added_tokens if token.id == end), None)
        pieces: list[str] = []
        following: list[int] = []
        for text, ends in zip_ends(texts, ends_document):
            refuse_surrogates(text)
            if not ends or end is None:
                _add_parts(self._splitter.split(text), -1, pieces, following)
                continue
            parts = None
            if content is not None and (stripped := text.rstrip()).endswith(content):
                parts = self._splitter.split(stripped)
                if isinstance(parts[-1], AddedToken) and parts[-1].id == end:
                    del parts[-1]
                else:
                    parts = None
            _add_parts(self._splitter.split(text) if parts is None else parts, end, pieces, following)
        return self._codec.encode_joined(pieces, following).astype(id_dtype(self._n_vocab), copy=False)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """Return the text of token ids, without special tokens if `skip_special_tokens` is True.

        Bytes that are not valid UTF-8, such as half of a character, become U+FFFD. An id without a token is skipped, as in
        transformers. An id that no vocabulary can have raises ValueError.
        """
        tokens = (self._bytes_of.get(id_, b"") for id_ in self._shown(ids, skip_special_tokens))
        return b"".join(tokens).decode("utf-8", errors="replace")

    def first_token_bytes(self, text: str, ids: Sequence[int]) -> int:
        return len(self.decode_tokens_bytes(ids[:1])[0])  # The token may be a part of a character.

    def decode_tokens_bytes(self, ids: Iterable[int]) -> list[bytes]:
        """Return the bytes of the token of each id, for example to show tokens one by one.

        The bytes of an id without a token are b"".
        """
        return [self._bytes_of.get(id_, b"") for id_ in valid_ids(ids)]

    def ids(self) -> Collection[int]:
        return self._bytes_of.keys()

    def to_json(self) -> dict[str, Any]:
        visible = {token: "".join(BYTE_TO_CHARACTER[byte] for byte in token) for token in self._vocab}
        empty = {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": ""}
        flags = {"fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
        vocab = {visible[token]: id_ for token, id_ in self._vocab.items()} | self._unmerged
        added = {token.content: token.id for token in self.added_tokens}
        own = sorted(id_ for token, id_ in added.items() if token not in vocab)
        if own != list(range(len(vocab), len(vocab) + len(own))):  # other readers would give added tokens these ids
            vocab |= added
        merges = [[visible[first], visible[second]] for first, second in self.merges]
        model = {"type": "BPE", **empty, **flags, "vocab": vocab, "merges": merges}
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        return hugging_face_json(model, self.added_tokens, pre_tokenizer=byte_level, decoder=byte_level)


def _add_parts(parts: Iterable[str | AddedToken], last: int, pieces: list[str], following: list[int]) -> None:
    """Append the texts in `parts` to `pieces`, and the id after each of them to `following`.

    The id is that of the next added token. After the last text, it is `last`; -1 stands for no id.
    """
    piece = ""
    for part in parts:
        if isinstance(part, AddedToken):
            pieces.append(piece)
            following.append(part.id)
            piece = ""
        else:
            piece = part
    pieces.append(piece)
    following.append(last)


CHARACTER_TO_BYTE = {character: byte for byte, character in BYTE_TO_CHARACTER.items()}


def from_visible(
    vocab: Mapping[str, int], merges: Iterable[Sequence[str]], added: Iterable[AddedToken], known: bool = False
) -> BPETokenizer:
    """Return a BPETokenizer for tokens that are written with the characters of BYTE_TO_CHARACTER, as in GPT-2's files.

    `vocab` may include the added tokens, such as special tokens. If `known` is True, the merges are not checked.
    """
    added = list(added)
    contents = {token.content for token in added}

    @cache  # Nearly every token occurs three times.
    def to_bytes(token: str) -> bytes:
        try:
            return bytes(map(CHARACTER_TO_BYTE.__getitem__, token))
        except KeyError as error:
            raise ValueError(f"token {token!r} contains {error.args[0]!r}, which does not represent a byte") from None

    merges = [(first, second) for first, second in merges]
    merged = {*CHARACTER_TO_BYTE, *(first + second for first, second in merges)}
    return BPETokenizer(
        {to_bytes(token): id_ for token, id_ in vocab.items() if token in merged},
        [(to_bytes(first), to_bytes(second)) for first, second in merges],
        {},
        known,
        {token: id_ for token, id_ in vocab.items() if token not in merged and token not in contents},
        added_tokens=added,
    )


def _visible_to_bytes(token: str) -> bytes:
    """Return the bytes of a token written in visible characters, or its UTF-8 bytes if not all characters are bytes."""
    if all(character in CHARACTER_TO_BYTE for character in token):
        return bytes(map(CHARACTER_TO_BYTE.__getitem__, token))
    return token.encode()


def _check(
    vocab: Mapping[bytes, int],
    merges: Sequence[Merge],
    added_tokens: Sequence[AddedToken],
    unmerged: Mapping[str, int],
) -> None:
    """Raise ValueError unless `vocab` has exactly the 256 bytes and the results of `merges`, all with valid ids.

    All ids, including those of the added tokens, must be distinct whole numbers from 0 to MAX_ID. Only an added token
    that repeats a token of `vocab` has the same id as this token.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in vocab]
    if missing:
        raise ValueError(f"the vocabulary lacks {len(missing)} of the 256 bytes, the first is 0x{missing[0]:02x}")
    ids = [token.id for token in added_tokens if vocab.get(_visible_to_bytes(token.content)) != token.id]
    ids += [*vocab.values(), *unmerged.values()]
    if any(type(id_) is not int or not 0 <= id_ <= MAX_ID for id_ in ids) or len(set(ids)) != len(ids):
        raise ValueError(f"the ids of the vocabulary must be distinct whole numbers from 0 to {MAX_ID}")
    for first, second in merges:
        if first + second not in vocab or first not in vocab or second not in vocab:
            raise ValueError(f"the merge of {first!r} and {second!r} needs tokens that the vocabulary lacks")
    needed = 256 + len(merges)
    if len(vocab) != needed:
        raise ValueError(f"the vocabulary has {len(vocab)} tokens, 256 bytes and {len(merges)} merges need {needed}")


def _check_merge_order(vocab: Mapping[bytes, int], merges: Sequence[Merge]) -> None:
    """Raise ValueError if tiktoken would encode a text to other tokens than this list of merges does.

    tiktoken gets no list of merges, only the ids: it joins any two adjacent parts whose joined bytes are a token. The
    result is the same if, for each merge, the earlier merges reduce the bytes of the merged token to exactly its two
    parts.
    """
    for first, second in merges:
        parts = _parts_before_last_merge(first + second, vocab)
        if parts != [first, second]:
            reason = f"the merges before it turn its bytes into {parts}"
            raise ValueError(f"the merge of {first!r} and {second!r} never happens: {reason}")


def _parts_before_last_merge(token: bytes, vocab: Mapping[bytes, int]) -> list[bytes]:
    """Return the parts to which tiktoken joins the bytes of `token` if it may only use tokens with smaller ids.

    A correct list of merges gives two parts. tiktoken first joins the pair whose joined token has the smallest id, and
    the leftmost of equal pairs. A heap finds this pair quickly, because a hostile file can contain tokens of a
    megabyte.
    """
    part_at = {i: token[i : i + 1] for i in range(len(token))}  # each part, by its start in `token`
    before = {i: i - 1 for i in part_at}
    heap: list[tuple[int, int, int]] = []

    def push(start: int) -> None:
        """Push the part at byte `start` and the next part to the heap, as one pair.

        The pair is skipped unless it joins to a token with a smaller id than `token`.
        """
        after = start + len(part_at.get(start, b""))
        if start in part_at and after in part_at:
            joined = token[start : after + len(part_at[after])]
            if vocab.get(joined, vocab[token]) < vocab[token]:
                heapq.heappush(heap, (vocab[joined], start, len(joined)))

    for i in range(len(token)):
        push(i)
    while heap:
        _, start, n_bytes = heapq.heappop(heap)
        after = start + len(part_at.get(start, b""))
        if start not in part_at or after not in part_at or after + len(part_at[after]) != start + n_bytes:
            continue  # One of the two parts has been joined to another part since.
        del part_at[after]
        part_at[start] = token[start : start + n_bytes]
        before[start + n_bytes] = start
        push(start)
        push(before[start])
    return [part_at[i] for i in sorted(part_at)]
