"""The public names of the package, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import MyGPT


def test_star_import_and_dir_give_exactly_the_public_names() -> None:
    namespace: dict[str, object] = {}
    exec("from MyGPT import *", namespace)
    assert sorted(namespace.keys() - {"__builtins__"}) == MyGPT.__all__
    assert set(MyGPT.__all__) <= set(dir(MyGPT))


def test_every_public_name_is_an_import_that_type_checkers_re_export() -> None:
    """PEP 484: a stub or a typed package re-exports `import X as X`, but not `import X`."""
    tree = ast.parse(Path(MyGPT.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
    assert all(isinstance(node, ast.ImportFrom) for node in block.body)
    aliases = [[(alias.name, alias.asname) for alias in node.names] for node in block.body]
    assert sorted(aliases) == [[(name, name)] for name in MyGPT.__all__]


@pytest.mark.parametrize("name", MyGPT.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(MyGPT, name)
    assert isinstance(value, dict) or value.__doc__


def test_an_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'GPT5'"):
        _ = MyGPT.GPT5


@pytest.mark.slow
def test_the_package_imports_nothing_and_its_names_import_only_torch_and_numpy() -> None:
    code = """
import sys
import MyGPT
assert not {'torch', 'numpy', 'tqdm', 'tiktoken'} & set(sys.modules)
# torch imports tqdm itself.
light = [name for name in MyGPT.__all__ if name != 'Trainer']
for name in light:
    getattr(MyGPT, name)
heavy = {'tiktoken', 'regex', 'peft', 'transformers', 'requests', 'matplotlib', 'tokenizers', 'safetensors',
         'jsonargparse', 'yaml'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
getattr(MyGPT, 'Trainer')
heavy -= {'yaml'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
