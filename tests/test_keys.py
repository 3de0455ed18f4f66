"""Key files: what a line says, what a role opens, and what becomes of a file that changes."""

from __future__ import annotations

import hashlib
import logging
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mxgpt.v1 import executor_pb2, loader_pb2, tokenizer_pb2
from shared.errors import Reason, ServiceError
from shared.keys import KeyRing, Role, parse_keys, read_token

FILE = f"""
# remarks, and empty lines

alice: a-key
alice: an.older~key/+== expires=2030-01-01T00:00:00Z   # hers, too
shop:  sha256:{hashlib.sha256(b"shop-key").hexdigest()} max_calls=16 role=generate
peers: peers-key role=service
ops@example: ops-key role=admin
nameless-key
"""


def reason_of(ring: KeyRing, given: str) -> Reason:
    with pytest.raises(ServiceError) as caught:
        ring.find(given)
    return caught.value.reason


def write(path: Path, text: str) -> Path:
    """Write a file as one should: aside, then renamed over the old one."""
    aside = path.with_suffix(".new")
    aside.write_text(text)
    os.replace(aside, path)
    return path


def test_a_line_says_whose_key_it_is_and_what_it_is_good_for(tmp_path: Path) -> None:
    ring = KeyRing([write(tmp_path / "keys", FILE)], now=lambda: datetime(2029, 12, 31, tzinfo=UTC))
    assert [ring.find(key).name for key in ("a-key", "an.older~key/+==", "peers-key")] == ["alice", "alice", "peers"]
    assert ring.find("a-key").role is Role.GENERATE, "what a key may is the least useful by default"
    shop = ring.find("shop-key")
    assert (shop.name, shop.role, shop.max_calls, shop.expires) == ("shop", Role.GENERATE, 16, None)
    assert ring.find("ops-key").role is Role.ADMIN
    assert ring.find("nameless-key").name == hashlib.sha256(b"nameless-key").hexdigest()[:8]


@pytest.mark.parametrize("given", ["", "a", "a-ke", "a-key ", "A-key", "alice", "sha256:", "\udc80", "é" * 9999])
def test_what_is_no_key_opens_nothing(tmp_path: Path, given: str) -> None:
    ring = KeyRing([write(tmp_path / "keys", FILE)])
    assert reason_of(ring, given) is Reason.UNAUTHENTICATED
    assert reason_of(ring, hashlib.sha256(b"shop-key").hexdigest()) is Reason.UNAUTHENTICATED, "a hash is no key"


def test_a_key_expires(tmp_path: Path) -> None:
    end = datetime(2030, 1, 1, tzinfo=UTC)
    path = write(tmp_path / "keys", FILE)
    assert KeyRing([path], now=lambda: end - timedelta(seconds=1)).find("an.older~key/+==").name == "alice"
    late = KeyRing([path], now=lambda: end)
    assert reason_of(late, "an.older~key/+==") is Reason.UNAUTHENTICATED
    assert late.find("a-key").name == "alice"


@pytest.mark.parametrize(
    "line",
    [
        "alice:key",
        "alice key",
        "al ice: key",
        "alice:",
        ": key",
        "a/b: key",
        "key,key",
        "name: ключ",
        "name: sha256:abc",
        "name: " + "k" * 513,
        "name: key role=root",
        "name: key role=",
        "name: key max_calls=0",
        "name: key max_calls=many",
        "name: key expires=2030-01-01",  # of which clock?
        "name: key expires=soon",
        "name: key colour=red",
    ],
)
def test_a_line_that_is_no_key_is_named_but_not_shown(line: str) -> None:
    with pytest.raises(ValueError, match="keys, line 2: ") as caught:
        parse_keys(f"first: fine\n{line}\n", "keys")
    assert "ключ" not in str(caught.value)


def test_files_without_a_key_or_with_one_twice_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no key in there"):
        KeyRing([write(tmp_path / "keys", "# none\n")])
    with pytest.raises(ValueError, match="twice"):
        KeyRing([write(tmp_path / "keys", "a: key\nb: key role=admin\n")])
    with pytest.raises(FileNotFoundError):
        KeyRing([tmp_path / "nowhere"])


def test_a_changed_file_counts_from_the_next_call_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, other = write(tmp_path / "keys", "a: first\n"), write(tmp_path / "others", "b: second\n")
    ring = KeyRing([path, other])
    assert ring.find("second").name == "b"
    write(path, "a: first\na: third\n")
    assert (ring.find("first").name, ring.find("third").name) == ("a", "a"), "the old key and the new one, for a while"
    write(path, "a: third\n")
    assert reason_of(ring, "first") is Reason.UNAUTHENTICATED
    path.write_text("a: fourth-of-another-length\n")  # in place
    assert ring.find("fourth-of-another-length").name == "a"
    with caplog.at_level(logging.DEBUG, "shared"):
        write(path, "a: fifth role=king\n")
        assert ring.find("fourth-of-another-length").name == "a", "a bad file changes nothing"
        assert reason_of(ring, "fifth") is Reason.UNAUTHENTICATED
        told = [record for record in caplog.records if record.name.startswith("shared.")]
        assert len(told) == 1, "and is told once"
        path.unlink()
        assert ring.find("fourth-of-another-length").name == "a"
        write(path, "a: sixth\n")
        assert ring.find("sixth").name == "a"
    assert "fifth" not in caplog.text


def test_a_link_turned_to_another_file_is_a_change(tmp_path: Path) -> None:
    """As secrets are mounted in containers."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "keys", f"a: {name}\n")
    (tmp_path / "now").symlink_to("one")
    ring = KeyRing([tmp_path / "now" / "keys"])
    assert ring.find("one").name == "a"
    (tmp_path / "next").symlink_to("two")
    os.replace(tmp_path / "next", tmp_path / "now")
    assert ring.find("two").name == "a"
    assert reason_of(ring, "one") is Reason.UNAUTHENTICATED


def methods_of(role: Role) -> set[str]:
    """The methods of the contract that a role opens."""
    services = [
        service
        for module in (executor_pb2, tokenizer_pb2, loader_pb2)
        for service in module.DESCRIPTOR.services_by_name.values()
    ]
    return {
        f"{service.name}/{method.name}"
        for service in services
        for method in service.methods
        if role.allows(f"/{service.full_name}/{method.name}")
    }


def test_each_role_opens_what_it_is_for() -> None:
    generate, service, admin = (methods_of(role) for role in (Role.GENERATE, Role.SERVICE, Role.ADMIN))
    assert methods_of(Role.HEALTH) == set()
    assert {method.partition("/")[0] for method in generate} == {"ExecutorService", "TokenizerService"}
    assert {method.partition("/")[0] for method in service} == {"LoaderService", "TokenizerService"}
    assert admin - service - generate == {
        "LoaderService/LoadModel",
        "LoaderService/UnloadModel",
        "LoaderService/EstimateMemory",
    }
    assert len(admin) == 17
    for role in Role:
        assert role.allows("/grpc.health.v1.Health/Watch")
        assert role.allows("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert not role.allows("/grpc.channelz.v1.Channelz/GetServers")
        assert not role.allows("")


def test_a_client_shows_the_first_key_of_a_file(tmp_path: Path) -> None:
    assert read_token(write(tmp_path / "keys", FILE)) == "a-key"
    assert read_token(write(tmp_path / "keys", "just-a-key\n")) == "just-a-key"
    with pytest.raises(ValueError, match="the hash of a key opens nothing"):
        read_token(write(tmp_path / "keys", f"a: sha256:{'0' * 64}\n"))
    with pytest.raises(ValueError, match="holds no key"):
        read_token(write(tmp_path / "keys", "\n"))
