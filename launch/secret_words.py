"""Telling from a text whether it holds a secret: a password, a token, a key that should not have been written there.

For texts that are printed and stored. It knows the ways in which people write such things into profiles and
configurations, and can err on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from launch.runs import LaunchError

if TYPE_CHECKING:
    from dgt.config import Config

NAME = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|TOKENS?(?![A-Z])|(API|ACCESS|PRIVATE|SIGNING|NGC|WANDB)_?KEY"
    r"|_(PASS|PWD|PAT)$",
    re.I,
)
"""Finds names of what holds secrets, such as HF_TOKEN; TOKENIZERS_PARALLELISM and NCCL_IB_PKEY are none."""
NAME_OF_PLACE = re.compile(r"_(FILE|PATH|DIR|URL|HELPER)$|^NO_", re.I)
"""Finds names of what only says where a secret is, or that there is none."""
NO_SECRET = re.compile(r"|\$.*|/[\w.@-]+(/[\w.@-]+)+/?|[01]|true|false|yes|no|on|off|none|null", re.I)
"""Fits values that are none, whatever their name: nothing, a variable or a command, an absolute path, a switch."""

TOKEN = re.compile(
    r"\b(gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{16,}|nvapi-[\w-]{16,}|sk-[\w-]{20,}"
    r"|xox[abprs]-[\w-]{10,}|A(KIA|SIA)[A-Z0-9]{16})"
)
"""Finds what GitHub, GitLab, Hugging Face, NVIDIA, OpenAI, Slack and AWS give out, with beginnings that say so."""
TOKEN_BEGINS = re.compile(r"gh[pousr]_|github_pat_|glpat-|hf_|nvapi-|xox[abprs]-|A(KIA|SIA)")

ASSIGNMENT = re.compile(r"(?<![\w$])([\w-]*\w)=[\"']?(?=([^\s\"',`]*))")
"""Finds NAME=VALUE in a line of shell, also where that is a value itself."""
OPTION = re.compile(r"(?<!\S)--?([\w-]+)\s+[\"']?([^\s\"'`-][^\s\"'`]*)")
"""Finds --name value in a line of shell."""
AUTHORIZATION = re.compile(r"authorization:\s*(bearer|basic|token)\s+[^\s$`\"']", re.I)
"""Finds a header of HTTP with what it takes, rather than a variable."""


def is_secret(name: str, value: str) -> bool:
    """Whether a value is one by its name and its kind."""
    if not NAME.search(name) or NAME_OF_PLACE.search(name):
        return False
    is_count = value.isdecimal() and "TOKEN" in name.upper()  # such as that of MAX_TOKENS
    return not (NO_SECRET.fullmatch(value) or is_count)


def token_in(text: str) -> bool:
    """Whether something in this text looks like a token by itself."""
    return TOKEN.search(text) is not None


def secret_in_line(text: str) -> str | None:
    """What in a line of shell looks like a secret, without its value; None where nothing does."""
    for name, value in [*ASSIGNMENT.findall(text), *OPTION.findall(text)]:
        if is_secret(name.replace("-", "_"), value):
            return name
    if AUTHORIZATION.search(text):
        return "what follows Authorization"
    return "a token" if token_in(text) else None


def secret_in_url(text: str) -> bool:
    """Whether a URL in this text carries a password, a token, or a query with what looks like a secret or signature."""
    if re.search(r"://[^/\s@]*:(?!\$)[^/\s]+@(?!sha\d+:)", text):  # which would be the digest of an image
        return True
    if any(is_token(user) for user in re.findall(r"://([^/\s@:]+)@(?!sha\d+:)", text)):
        return True
    queries = re.findall(r"://[^\s?]*\?(\S*)", text)
    pairs = [pair.partition("=")[::2] for query in queries for pair in re.split(r"[&;?]", query)]
    return any(is_secret(name, value) or re.fullmatch(r"(x-\w+-)?sig(nature)?", name, re.I) for name, value in pairs)


def is_token(user: str) -> bool:
    """Whether the name before a URL's @ is one, as `git clone https://TOKEN@host` takes it."""
    random = len(user) >= 20 and re.search(r"\d", user) and re.search(r"[A-Za-z]", user) and "$" not in user
    return bool(TOKEN_BEGINS.match(user) or random)


def no_secrets(config: Config) -> None:
    """Raises LaunchError where a URL in the configuration carries a password, a token or a signature."""
    from data_pipeline.shards.storage import without_secrets
    from dgt.training.run_folder import plain

    for key, value in texts(plain(config)):
        if secret_in_url(value):
            raise LaunchError(
                f"{key}: {without_secrets(value)} is given with a password, a token or a signature, and the "
                "configuration is printed and stored in the run's folder; keep credentials in the environment, "
                "~/.netrc or ~/.aws/credentials"
            )


def texts(values: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every text in nested plain values."""
    if isinstance(values, Mapping):
        for key, below in values.items():
            yield from texts(below, f"{path}.{key}" if path else str(key))
    elif isinstance(values, list):
        for below in values:
            yield from texts(below, path)
    elif isinstance(values, str):
        yield path, values
