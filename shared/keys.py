"""Keys that callers show as bearer tokens: whose they are, what they open, how many calls at once, until when.

A key file has one key a line; lines that start with # are remarks:

    alice: 5f0c...                                    # may generate
    alice: 77ab...  expires=2027-01-31T00:00:00Z      # her old key, until then
    shop:  sha256:9f86...  max_calls=16               # the hash of a key, so that this file gives nothing away
    peers: c41d...  role=service                      # executors and tokenizers, for the loader

A key alone on its line is named after its hash. Keys are kept and compared as SHA-256 hashes, each with all of them.
"""

from __future__ import annotations

import enum
import hashlib
import hmac
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from shared.errors import Reason, ServiceError
from shared.watched import Watched

MAX_KEY_CHARACTERS = 512

_KEY = re.compile(r"[A-Za-z0-9._~+/-]+=*")  # what RFC 6750 allows in a bearer token
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")

# Every key, whatever its role, may ask for health and for the contract.
_COMMON = frozenset({"/grpc.health.v1.Health", "/grpc.reflection.v1alpha.ServerReflection"})


class Role(enum.Enum):
    """What a key opens: services, as "/package.Service", and methods, as "/package.Service/Method"."""

    HEALTH = frozenset[str]()  # health and the contract, like every key, and nothing else
    GENERATE = frozenset({"/mxgpt.v1.ExecutorService", "/mxgpt.v1.TokenizerService"})
    SERVICE = frozenset(  # what executors and tokenizers ask of others; models come and go without them
        {
            "/mxgpt.v1.TokenizerService",
            "/mxgpt.v1.LoaderService/Attach",
            "/mxgpt.v1.LoaderService/GetTokenizerData",
            "/mxgpt.v1.LoaderService/ListModels",
            "/mxgpt.v1.LoaderService/GetModel",
            "/mxgpt.v1.LoaderService/GetStatus",
        }
    )
    ADMIN = frozenset({"/mxgpt.v1.ExecutorService", "/mxgpt.v1.TokenizerService", "/mxgpt.v1.LoaderService"})

    def allows(self, method: str) -> bool:
        """Whether a key of this role may call `method`, as "/package.Service/Method"."""
        return is_common(method) or method in self.value or _service_of(method) in self.value


@dataclass(frozen=True)
class Key:
    """One line of a key file."""

    name: str  # of its owner; an owner may have several keys
    digest: bytes  # SHA-256 of the key
    role: Role = Role.GENERATE
    max_calls: int | None = None  # of the owner, running at once on one server; None: no bound
    expires: datetime | None = None


class KeyRing:
    """The keys of some files, read again when one of them changes.

    Raises:
        OSError: when a file can't be read.
        ValueError: for a line that is no key, naming file and line, or files without one.
    """

    def __init__(self, paths: Sequence[Path], now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._keys = Watched(paths, lambda: _read_keys(paths))
        self._now = now

    def find(self, given: str) -> Key:
        """The key that a caller has given; how long that takes does not depend on how near it is to one.

        Raises:
            ServiceError: UNAUTHENTICATED for none, a strange or an expired one.
        """
        if not given:
            raise ServiceError(Reason.UNAUTHENTICATED, "this server wants a bearer token in the authorization metadata")
        digest = hashlib.sha256(given.encode(errors="replace")).digest()
        matches = [key for key in self._keys.get() if hmac.compare_digest(key.digest, digest)]
        if not matches:
            raise ServiceError(Reason.UNAUTHENTICATED, "the bearer token is none of this server's keys")
        key = matches[0]
        if key.expires is not None and key.expires <= self._now():
            raise ServiceError(Reason.UNAUTHENTICATED, f"this key of {key.name} expired on {key.expires.isoformat()}")
        return key


def is_common(method: str) -> bool:
    """Whether `method` belongs to health or reflection."""
    return _service_of(method) in _COMMON


def parse_keys(text: str, source: str) -> list[Key]:
    """The keys of a key file.

    Raises:
        ValueError: for a line that is no key; the message names `source` and line, and shows nothing of the line.
    """
    return [_parse(words, f"{source}, line {number}") for number, words in _lines(text)]


def read_token(path: Path) -> str:
    """The token that a client shows: the first key of a file, which may be a server's key file.

    Raises:
        OSError: when the file can't be read.
        ValueError: when its first line holds no key, or only the hash of one.
    """
    for number, words in _lines(path.read_text()):
        _, key, _ = _split(words, f"{path}, line {number}")
        if _HASH.fullmatch(key):
            raise ValueError(f"{path}, line {number}: the hash of a key opens nothing; a client needs the key itself")
        return key
    raise ValueError(f"{path} holds no key")


def _read_keys(paths: Sequence[Path]) -> list[Key]:
    keys = [key for path in paths for key in parse_keys(path.read_text(), str(path))]
    names = ", ".join(map(str, paths))
    if not keys:
        raise ValueError(f"{names}: no key in there")
    if len({key.digest for key in keys}) < len(keys):
        raise ValueError(f"{names}: a key stands there twice")
    return keys


def _lines(text: str) -> list[tuple[int, list[str]]]:
    """Numbers and words of the lines that are neither empty nor a remark; a remark may also end a line."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        remark = next((index for index, word in enumerate(words) if word.startswith("#")), len(words))
        if words[:remark]:
            found.append((number, words[:remark]))
    return found


def _parse(words: list[str], where: str) -> Key:
    name, key, settings = _split(words, where)
    digest = bytes.fromhex(key[7:]) if _HASH.fullmatch(key) else hashlib.sha256(key.encode()).digest()
    role, max_calls, expires = Role.GENERATE, None, None
    for setting in settings:
        what, _, value = setting.partition("=")
        try:
            if what == "role":
                role = Role[value.upper()]
            elif what == "max_calls":
                max_calls = _positive(value)
            elif what == "expires":
                expires = _time(value)
            else:
                raise ValueError
        except (KeyError, ValueError):
            roles = "|".join(role.name.lower() for role in Role)
            raise ValueError(
                f"{where}: after the key come role={roles}, max_calls=NUMBER and expires=TIME, "
                "as in 2027-01-31T00:00:00Z"
            ) from None
    return Key(name or digest.hex()[:8], digest, role, max_calls, expires)


def _split(words: list[str], where: str) -> tuple[str, str, list[str]]:
    """Name (empty for none), key and settings of a line's words."""
    name = ""
    if words[0].endswith(":"):
        name, words = words[0][:-1], words[1:]
        if not _NAME.fullmatch(name):
            raise ValueError(f"{where}: a name has up to 64 letters, digits, dots, hyphens, underscores and at signs")
    key = words[0] if words else ""
    if len(key) > MAX_KEY_CHARACTERS or not (_KEY.fullmatch(key) or _HASH.fullmatch(key)):
        raise ValueError(f"{where}: wants NAME: KEY, and in the key only letters, digits and any of ._~+/-=")
    return name, key, words[1:]


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise ValueError
    return number


def _time(value: str) -> datetime:
    moment = datetime.fromisoformat(value)
    if moment.tzinfo is None:
        raise ValueError
    return moment


def _service_of(method: str) -> str:
    return method.rpartition("/")[0]
