"""Runs docker-compose.yml for real: build, start, load, kill, scale; checks that no stream is lost or changed.

python -m deploy.rehearse [--base-image IMAGE] [--network host]

Streams run all the while through the gateway, greedy, and every one must end as in a quiet run, ids and text. The
processes of containers are killed from the host, as a crash would, so that their restart policy brings them back.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from mxgpt import AsyncClient
from mxgpt.results import Result

ROOT = Path(__file__).parents[1]
TARGETS = ("loader", "tokenizer", "executor", "gateway")
PROJECT = "mxgpt-rehearsal"
PROMPTS = ["Write a haiku about the sea.", "What is 17 + 25?", "Count from 1 to 20.", "Say hello in Japanese."]
MAX_TOKENS = 600
SPANS = "/tmp/spans.jsonl"  # in each container
NUM_STREAMS = 8  # at once


@dataclass
class Load:
    """Streams that follow one another without a pause, each compared with the quiet run of its prompt."""

    client: AsyncClient
    expected: list[Result] = field(default_factory=list)
    num_done: int = 0
    num_flowing: int = 0  # streams that have had a piece and have not ended
    num_resumed: int = 0
    longest_wait: float = 0.0  # seconds between two pieces
    served_by: set[str] = field(default_factory=set)
    stopping: bool = False

    async def learn(self) -> None:
        """The quiet run."""
        for prompt in PROMPTS:
            result, _ = await self._ask(prompt)
            self.expected.append(result)

    async def run(self) -> None:
        """Until `stopping`.

        Raises:
            AssertionError: if a stream ends in other tokens than those of the quiet run.
        """
        await asyncio.gather(*(self._stream(number) for number in range(NUM_STREAMS)))

    async def _stream(self, number: int) -> None:
        while not self.stopping:
            number = (number + 1) % len(PROMPTS)
            result, wait = await self._ask(PROMPTS[number])
            found, expected = result.outputs[0], self.expected[number].outputs[0]
            assert found.token_ids == expected.token_ids, f"{PROMPTS[number]!r}: other tokens than in the quiet run"
            assert found.text == expected.text, f"{PROMPTS[number]!r}: another text than in the quiet run"
            self.num_done += 1
            self.num_resumed += result.num_resumes > 0
            self.longest_wait = max(self.longest_wait, wait)
            self.served_by.add(result.executor_id)

    async def _ask(self, prompt: str) -> tuple[Result, float]:
        messages = [{"role": "user", "content": prompt}]
        options = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
        async with self.client.generate(messages, **options) as generation:  # type: ignore[arg-type]
            last, longest = time.monotonic(), 0.0
            num_pieces = 0
            async for _ in generation:
                self.num_flowing += num_pieces == 0
                num_pieces += 1
                now = time.monotonic()
                last, longest = now, max(longest, now - last)
            self.num_flowing -= num_pieces > 0
            return generation.result, longest


class Deployment:
    """The compose project, by its command line."""

    def __init__(self, base_image: str, port: int) -> None:
        self._command = ["docker", "compose"] if _has_plugin() else ["docker-compose"]
        settings = {"MXGPT_BASE_IMAGE": base_image, "MXGPT_PORT": str(port), "MXGPT_TRACES": f"file:{SPANS}"}
        self._environment = {**os.environ, **settings}
        self.address = f"127.0.0.1:{port}"

    def up(self, **replicas: int) -> None:
        """Start, or change the numbers of replicas of the services named."""
        scales = [part for name, number in replicas.items() for part in ("--scale", f"{name}={number}")]
        self._compose("up", "--detach", "--no-build", "--no-recreate", *scales)

    def down(self) -> None:
        self._compose("down", "--volumes", "--timeout", "40")

    def containers(self, service: str) -> list[str]:
        """Ids of a service's containers."""
        return self._compose("ps", "--quiet", service).split()

    def crash(self, service: str) -> str:
        """Kill the main process of the first container of a service; returns the container."""
        container = self.containers(service)[0]
        os.kill(int(_docker("inspect", "--format", "{{.State.Pid}}", container)), signal.SIGKILL)
        return container

    def until_healthy(self, seconds: float = 90.0) -> None:
        """Wait until every container that has a health check passes it.

        Raises:
            AssertionError: when that takes too long.
        """
        deadline = time.monotonic() + seconds
        while True:
            services = ("loader", "tokenizer", "executor")
            containers = [container for service in services for container in self.containers(service)]
            states = [_docker("inspect", "--format", "{{.State.Health.Status}}", each) for each in containers]
            if set(states) == {"healthy"}:
                return
            assert time.monotonic() < deadline, f"not healthy after {seconds} s: {states}"
            time.sleep(0.5)

    def check_confined(self) -> None:
        """See in every container that its user is not root, and that nothing but /tmp and volumes can be written.

        Raises:
            AssertionError: where that is not so.
        """
        attempt = "id -u; for each in / /etc /opt /var; do touch $each/mxgpt 2>/dev/null && echo $each; done; true"
        for service in TARGETS:
            for container in self.containers(service):
                assert _docker("inspect", "--format", "{{.HostConfig.ReadonlyRootfs}}", container) == "true", service
                user, *written = _docker("exec", container, "sh", "-c", attempt).split()
                assert user != "0", f"{service} runs as root"
                assert not written, f"{service} can write to {written}"

    def check_traced(self) -> int:
        """Requests whose spans of executors and tokenizers are in one trace.

        Raises:
            AssertionError: if there are none.
        """
        of_executors, of_tokenizers = (self._trace_ids(service) for service in ("executor", "tokenizer"))
        joined = of_executors & of_tokenizers
        assert joined, f"{len(of_executors)} traces of executors, {len(of_tokenizers)} of tokenizers, none in common"
        return len(joined)

    def _trace_ids(self, service: str) -> set[str]:
        lines = [line for each in self.containers(service) for line in _docker("exec", each, "cat", SPANS).split("\n")]
        return {json.loads(line)["context"]["trace_id"] for line in lines}

    def _compose(self, *arguments: str) -> str:
        command = [*self._command, "--project-name", PROJECT, *arguments]
        result = subprocess.run(command, cwd=ROOT, env=self._environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{' '.join(command)}: {result.stderr}"
        return result.stdout


async def rehearse(deployment: Deployment) -> None:
    """Everything in order; prints what is measured.

    Raises:
        AssertionError: at the first thing that is not as it should be.
    """
    start = time.monotonic()
    deployment.up(loader=2, tokenizer=2, executor=3)
    deployment.until_healthy()
    print(f"loader x 2, tokenizer x 2, executor x 3: healthy after {time.monotonic() - start:.1f} s", flush=True)
    deployment.check_confined()
    print("no container runs as root or can write to its root file system", flush=True)
    async with AsyncClient(deployment.address) as client:
        load = Load(client)
        await load.learn()
        async with _running(load):
            for service in ("executor", "tokenizer", "loader"):
                await _during(load, f"{service} killed", _crash_and_return, deployment, service)
            await _during(load, "scaled to 1 executor", _scale, deployment, 1)
            known = set(load.served_by)
            await _during(load, "scaled to 3 executors", _scale, deployment, 3)
            print(f"{len(load.served_by - known)} of the 2 new executors have served")
            assert len(load.served_by - known) == 2, "the gateway does not find new replicas"
            print(f"{deployment.check_traced()} requests have a trace that joins an executor's spans and a tokenizer's")
    assert load.num_resumed > 0, "no kill fell into a stream"


def _crash_and_return(deployment: Deployment, service: str) -> None:
    deployment.crash(service)
    time.sleep(1.0)
    deployment.until_healthy()


def _scale(deployment: Deployment, num_executors: int) -> None:
    deployment.up(executor=num_executors)
    deployment.until_healthy()
    assert len(deployment.containers("executor")) == num_executors


async def _during(load: Load, what: str, event: Callable[..., None], *arguments: object) -> None:
    """Let something happen, in a thread, while every stream flows, and some streams end after it."""
    while load.num_flowing < NUM_STREAMS:
        await asyncio.sleep(0.02)
    done, resumed, start = load.num_done, load.num_resumed, time.monotonic()
    load.longest_wait = 0.0
    await asyncio.to_thread(event, *arguments)
    target = load.num_done + 2 * NUM_STREAMS
    deadline = time.monotonic() + 90
    while load.num_done < target:
        assert time.monotonic() < deadline, f"{what}: streams do not end any more"
        await asyncio.sleep(0.1)
    print(
        f"{what}: {load.num_done - done} streams ended as in the quiet run, {load.num_resumed - resumed} of them "
        f"resumed, longest wait {load.longest_wait:.2f} s, {time.monotonic() - start:.1f} s in all",
        flush=True,
    )


@contextlib.asynccontextmanager
async def _running(load: Load) -> AsyncIterator[None]:
    """The load beside what happens; a stream that goes wrong ends both."""
    async with asyncio.TaskGroup() as group:
        group.create_task(load.run())
        yield
        load.stopping = True


def build(base_image: str, network: str | None) -> None:
    """Build the four images."""
    for target in TARGETS:
        start = time.monotonic()
        command = ["build", "--quiet", "--build-arg", f"BASE_IMAGE={base_image}", "--target", target]
        command += ["--network", network] if network else []
        _docker(*command, "--tag", f"mxgpt-{target}", str(ROOT))
        size = int(_docker("image", "inspect", "--format", "{{.Size}}", f"mxgpt-{target}"))
        print(f"mxgpt-{target}: built in {time.monotonic() - start:.1f} s, {size / 1e6:.0f} MB", flush=True)


def engine_missing() -> str:
    """Why there is no Docker engine to use; empty if there is one."""
    if shutil.which("docker") is None:
        return "docker is not installed"
    if not _has_plugin() and shutil.which("docker-compose") is None:
        return "neither docker compose nor docker-compose is installed"
    result = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    return "" if result.returncode == 0 else f"no Docker engine answers: {result.stderr.strip():.200}"


def _has_plugin() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0


def _docker(*arguments: str) -> str:
    environment = {**os.environ, "DOCKER_BUILDKIT": os.environ.get("DOCKER_BUILDKIT", "0")}
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, f"docker {' '.join(arguments)}: {result.stderr[-2000:]}"
    return result.stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> int:
    """Returns 0 if all went well, 77 if there is no engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-image", default="python:3.11-slim-bookworm", help="Debian-like, with Python and venv")
    parser.add_argument("--network", help="of the builds, such as host")
    parser.add_argument("--no-build", action="store_true", help="take the images that there are")
    arguments = parser.parse_args()
    why = engine_missing()
    if why:
        print(f"skipped: {why}")
        return 77
    if not arguments.no_build:
        build(arguments.base_image, arguments.network)
    deployment = Deployment(arguments.base_image, _free_port())
    try:
        asyncio.run(rehearse(deployment))
    finally:
        deployment.down()
    print("no stream was lost or changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
