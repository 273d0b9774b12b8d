"""Downloads from the Hugging Face hub, with the optional library huggingface_hub.

huggingface_hub resumes, retries and verifies downloads. The environment variable HF_ENDPOINT selects another
server.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, cast

from MyGPT.download import redirect_problem
from MyGPT.tokenizers.directory import is_tokenizer_file
from MyGPT.weights.formats.huggingface import INDEX_SUFFIX, WEIGHTS, find_weights

_OTHER_FILES = ("config.json", "generation_config.json", "template.json")
_UNFINISHED = ".mygpt-unfinished-download"
"""The name of a file that lists the files to download. It is deleted when all of them have arrived."""


def download_from_hub(repo_id: str, directory: str | os.PathLike[str]) -> Path:
    """Download the model in a repository such as openai-community/gpt2 to `directory`, and return `directory`.

    Nothing is downloaded if the directory is already complete.

    Raises:
        OSError: the repository cannot be downloaded or contains no model.
        ValueError: huggingface_hub is not installed, or `repo_id` is not a valid name.
    """
    directory = Path(directory)
    if is_downloaded(directory):
        return directory
    by_hand = f"copy the repository's files to {directory}"
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.errors import HFValidationError
    except ImportError:
        needed = f"downloading {repo_id} needs the library huggingface_hub"
        raise ValueError(f"{needed}: pip install 'mygpt[hub]', or {by_hand}") from None
    try:
        with _only_safe_redirects():
            info = HfApi().model_info(repo_id)
            files = _choose_files([file.rfilename for file in info.siblings or []])
            directory.mkdir(parents=True, exist_ok=True)
            (directory / _UNFINISHED).write_text("\n".join(files), encoding="utf-8")
            snapshot_download(repo_id, revision=info.sha, allow_patterns=files, local_dir=directory)
        if not is_downloaded(directory):  # snapshot_download only warns if the connection fails
            raise OSError("not all files could be downloaded")
    except HFValidationError:
        raise
    except Exception as error:  # raised by huggingface_hub, requests or httpx, depending on the version
        raise OSError(f"cannot download {repo_id} ({error}): try again, or {by_hand}") from error
    (directory / _UNFINISHED).unlink(missing_ok=True)
    return directory


@contextmanager
def _only_safe_redirects() -> Iterator[None]:
    """Make huggingface_hub refuse redirects that leave https (see `redirect_problem`) during the `with` block."""
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    endpoint, http = constants.ENDPOINT, cast(Any, _http)  # its functions differ from version to version

    def check(url: object) -> None:
        problem = redirect_problem(endpoint, str(url))
        if problem is not None:
            raise OSError(problem)

    session: Any = http.get_session()
    if hasattr(session, "event_hooks"):
        hooks = session.event_hooks
        session.event_hooks = {**hooks, "request": [*hooks["request"], lambda request: check(request.url)]}
        try:
            yield
        finally:
            session.event_hooks = hooks
        return

    from requests.adapters import HTTPAdapter  # which huggingface_hub used before version 1.0

    class CheckingAdapter(HTTPAdapter):
        def send(self, request: Any, *arguments: Any, **options: Any) -> Any:
            check(request.url)
            return super().send(request, *arguments, **options)

    def make_session() -> Any:
        session = make_unchecked()
        session.mount("http://", CheckingAdapter())
        return session

    make_unchecked = http._GLOBAL_BACKEND_FACTORY
    http.configure_http_backend(make_session)
    try:
        yield
    finally:
        http.configure_http_backend(make_unchecked)


def is_downloaded(directory: Path) -> bool:
    """Return whether the directory contains every file of a downloaded model.

    An unfinished download has a list of these files. Without the list, config.json and all weights must be there.
    """
    unfinished = directory / _UNFINISHED
    if unfinished.is_file():
        return all((directory / name).is_file() for name in unfinished.read_text(encoding="utf-8").split())
    try:
        return (directory / "config.json").is_file() and find_weights(directory).is_file()
    except FileNotFoundError:
        return False


def _choose_files(names: list[str]) -> list[str]:
    """Return those of a repository's file names that must be downloaded: config, weights in one format, tokenizer."""
    names = [name for name in names if re.fullmatch(r"[\w.-]+", name)]  # not in subdirectories
    other_files = [name for name in names if name in _OTHER_FILES or is_tokenizer_file(name)]
    for weights in WEIGHTS if "config.json" in names else ():
        index, shards = f"{weights}{INDEX_SUFFIX}", "-*-of-*".join(os.path.splitext(weights))
        if weights in names:
            return [weights, *other_files]
        if index in names:
            return [index, *(name for name in names if fnmatch(name, shards)), *other_files]
    raise OSError(f"it does not contain config.json and {' or '.join(WEIGHTS)}")
