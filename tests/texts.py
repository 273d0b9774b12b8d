"""Texts for the tests of tokenizers, and OpenAI's two vocabulary files."""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import strategies as st

from MyGPT.tokenizers.gpt2 import gpt2_vocabulary
from places import ROOT

# What tiktoken's loader asks of the two files.
OPENAI_SHA256 = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def _openai_files() -> Path:
    """Return a directory with OpenAI's vocab.bpe and the encoder.json that follows from it, byte for byte."""
    directory = TemporaryDirectory()
    atexit.register(directory.cleanup)
    path = Path(directory.name)
    shutil.copy(ROOT / "src" / "MyGPT" / "assets" / "gpt2" / "vocab.bpe", path)
    merges = [line.split(" ") for line in (path / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]]
    (path / "encoder.json").write_text(json.dumps(gpt2_vocabulary(merges)), encoding="utf-8")
    for name, expected in OPENAI_SHA256.items():
        assert hashlib.sha256((path / name).read_bytes()).hexdigest() == expected
    return path


OPENAI_FILES = _openai_files()
# Characters beside the surrogates and at the ends of planes, joiners, combining marks, controls, runs of spaces, and
# special tokens.
AWKWARD = st.sampled_from(
    [
        *"\ud7ff \ue000 \ufffd \uffff \U00010000 \U0001ffff \U0002a6d6 \U000e0001 \U0010ffff".split(),
        *"e\u0301 \u0301 \u200d \U0001f469\u200d\U0001f680 \U0001f1e9\U0001f1ea \ufb01 \u4e2d\u6587 \u0e14\u0e49".split(),
        *"'s 'LL don't we'Ve 123 \u0663 \u00bd -- ?! <|endoftext|> <|unk|> <|endoftext <| |>".split(),
        *"\0|\x1c|\x7f|\x85|\r|\r\n|\n\n|\t| |  |       |\xa0|\u2028|\u3000|\ufeff".split("|"),
    ]
)
TEXTS = st.lists(st.one_of(AWKWARD, st.text(max_size=8), st.text("ab c'1.", max_size=8)), max_size=12).map("".join)
