"""Metrics of real services: after known requests every count is exact, and nothing is left running."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mxgpt.cli.main import run
from mxgpt.v1 import executor_pb2, executor_pb2_grpc, loader_pb2, loader_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from services.loader.leases import Leases
from services.loader.loading import LoadOptions, Source
from services.loader.loads import Loads
from services.loader.metrics import loader_metrics
from services.loader.store import ModelStore
from shared.config import ServerConfig
from shared.telemetry_config import TelemetryConfig
from tests.calls import chat, collect, error_of, greedy, uncounted_calls
from tests.stack import ROOT, Service, Stack, free_ports, running, until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]

GEN_AI = {"gen_ai_provider_name": "mxgpt", "gen_ai_request_model": "demo-gpt-oss"}


@pytest.fixture(scope="module")
def watched(demo_gpt_oss: Path) -> Iterator[Stack]:
    with running(demo_gpt_oss, options=["--metrics", "127.0.0.1:0"]) as stack:
        yield stack


@pytest.fixture
def stub(watched: Stack) -> Iterator[Any]:
    with grpc.insecure_channel(watched.executor.address) as channel:
        yield executor_pb2_grpc.ExecutorServiceStub(channel)


def scrape(service: Service) -> Samples:
    with urllib.request.urlopen(f"http://{service.metrics}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Growth:
    """How much each sample of a service has grown since this was made."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._before = scrape(service)

    def __call__(self, name: str, **labels: str) -> float:
        key = (name, frozenset(labels.items()))
        now = scrape(self._service)
        assert key in now, f"no {key} among {sorted(each for each in now if each[0] == name)}"
        return now[key] - self._before.get(key, 0.0)


def value(service: Service, name: str, **labels: str) -> float:
    return scrape(service)[name, frozenset(labels.items())]


def test_a_request_is_counted_token_by_token(watched: Stack, stub: Any) -> None:
    grown, tokenizer = Growth(watched.executor), Growth(watched.tokenizer)
    prompt = "Sort these words: " + ", ".join(["pear", "apple", "fig", "plum", "kiwi"] * 8)
    stopping = executor_pb2.Stopping(max_tokens=20, ignore_eos=True)
    first = collect(stub.Generate(chat(prompt, sampling=greedy(), stopping=stopping)))
    second = collect(stub.Generate(chat(prompt, sampling=greedy(), stopping=stopping)))
    num_prompt = len(first.started.prompt_token_ids)
    num_cached = second.started.num_cached_tokens
    assert num_cached > 0
    labels = {**GEN_AI, "gen_ai_operation_name": "chat"}
    assert grown("mxgpt_executor_calls_total", method="Generate", reason="OK") == 2
    assert grown("mxgpt_executor_call_duration_seconds_count", method="Generate") == 2
    assert grown("gen_ai_server_request_duration_seconds_count", **labels, error_type="") == 2
    assert grown("gen_ai_server_time_to_first_token_seconds_count", **labels) == 2
    assert grown("gen_ai_server_time_per_output_token_seconds_count", **labels) == 2
    assert grown("mxgpt_executor_queue_seconds_count") == 2
    assert grown("mxgpt_executor_outputs_total", reason="LENGTH") == 2
    assert grown("mxgpt_executor_output_tokens_total") == 40
    assert grown("mxgpt_executor_prompt_tokens_total", source="cached") == num_cached
    assert grown("mxgpt_executor_prompt_tokens_total", source="computed") == 2 * num_prompt - num_cached
    assert grown("mxgpt_executor_batch_sequences_sum") == 40
    assert tokenizer("mxgpt_tokenizer_calls_total", method="RenderChat", reason="OK") == 2
    assert tokenizer("mxgpt_tokenizer_call_duration_seconds_count", method="RenderChat") == 2
    assert tokenizer("mxgpt_tokenizer_encoded_tokens_total") == 2 * num_prompt
    assert tokenizer("mxgpt_tokenizer_decoded_tokens_total") == 40
    until(lambda: value(watched.tokenizer, "mxgpt_tokenizer_sequences") == 0)
    assert value(watched.tokenizer, "mxgpt_tokenizer_streams") == 1


def test_times_are_those_that_the_answer_tells(watched: Stack, stub: Any) -> None:
    grown = Growth(watched.executor)
    request = executor_pb2.GenerateRequest(text="one two", sampling=greedy(n=2))
    request.stopping.max_tokens = 12
    request.stopping.ignore_eos = True
    timings = [finished.timings for finished in collect(stub.Generate(request)).finished.values()]
    labels = {**GEN_AI, "gen_ai_operation_name": "text_completion"}
    first = grown("gen_ai_server_time_to_first_token_seconds_sum", **labels)
    told = sum(each.first_token_seconds for each in timings)
    assert told < first < grown("gen_ai_server_request_duration_seconds_sum", **labels, error_type="") * 2
    per_token = grown("gen_ai_server_time_per_output_token_seconds_sum", **labels)
    assert per_token == pytest.approx(sum(each.decode_seconds / 11 for each in timings), rel=1e-6)
    assert grown("mxgpt_executor_queue_seconds_sum") == pytest.approx(sum(each.queue_seconds for each in timings))


def test_what_went_wrong_is_counted_by_its_reason(watched: Stack, stub: Any) -> None:
    grown = Growth(watched.executor)
    assert error_of(stub.Generate(chat("Hi", model="another"))).reason.name == "MODEL_NOT_FOUND"
    bad = chat("Hi", sampling=executor_pb2.Sampling(top_p=7.0))
    assert error_of(stub.Generate(bad)).reason.name == "FIELD_INVALID"
    endless = executor_pb2.Stopping(ignore_eos=True)
    meet_deadline(watched.executor, stub, chat("Hi", stopping=endless))
    call = stub.Generate(chat("Hi", stopping=endless))
    next(iter(call))
    call.cancel()
    for reason in ("MODEL_NOT_FOUND", "FIELD_INVALID", "DEADLINE", "CANCELLED"):
        key = {"method": "Generate", "reason": reason}
        until(lambda key=key: ("mxgpt_executor_calls_total", frozenset(key.items())) in scrape(watched.executor))
        assert grown("mxgpt_executor_calls_total", **key) == 1
        labels = {**GEN_AI, "gen_ai_operation_name": "chat", "error_type": reason}
        assert grown("gen_ai_server_request_duration_seconds_count", **labels) == 1


def meet_deadline(executor: Service, stub: Any, request: Any) -> None:
    """A call whose deadline passes while the executor sleeps: awake, it finds it passed by its own clock too."""
    began = time.monotonic()
    call = stub.Generate(request, timeout=3.0)
    next(iter(call))
    lag = time.monotonic() - began  # the executor's clock may be behind by as much
    executor.process.send_signal(signal.SIGSTOP)
    try:
        assert error_of(call).reason.name == "DEADLINE"
        time.sleep(lag)
    finally:
        executor.process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("remaining", "reason"), [(None, "CANCELLED"), (1.0, "CANCELLED"), (0.03, "DEADLINE"), (-0.2, "DEADLINE")]
)
def test_what_a_client_gives_up_about_its_deadline_took_too_long(remaining: float | None, reason: str) -> None:
    calls, reasons = uncounted_calls(), []
    calls.on_ended = lambda _call, reason, _seconds: reasons.append(reason)
    context: Any = SimpleNamespace(invocation_metadata=lambda: (), time_remaining=lambda: remaining)
    with pytest.raises(asyncio.CancelledError), calls.watch("Generate", None, context):
        raise asyncio.CancelledError
    assert reasons == [reason]


def test_running_streams_and_blocks_are_seen_while_they_run(watched: Stack, stub: Any) -> None:
    total = sum(
        value(watched.executor, "mxgpt_executor_kv_blocks", group="full", state=state)
        for state in ("used", "cached", "free")
    )
    calls = [stub.Generate(chat(f"Number {number}", stopping={"ignore_eos": True})) for number in range(3)]
    for call in calls:
        next(iter(call))
    now = scrape(watched.executor)

    def read(name: str, **labels: str) -> float:
        return now[name, frozenset(labels.items())]

    assert read("mxgpt_executor_streams") == 3
    assert read("mxgpt_executor_sequences", state="running") == 3
    assert read("mxgpt_executor_sequences", state="waiting") == 0
    assert read("mxgpt_executor_calls_running", method="Generate") == 3
    assert read("mxgpt_executor_kv_blocks", group="full", state="used") >= 3
    states = ("used", "cached", "free")
    assert sum(read("mxgpt_executor_kv_blocks", group="full", state=state) for state in states) == total
    assert value(watched.tokenizer, "mxgpt_tokenizer_sequences") == 3
    for call in calls:
        call.cancel()
    until(lambda: value(watched.executor, "mxgpt_executor_streams") == 0)
    until(lambda: value(watched.executor, "mxgpt_executor_calls_running", method="Generate") == 0)
    until(lambda: value(watched.executor, "mxgpt_executor_kv_blocks", group="full", state="used") == 0)


def test_a_loader_tells_loads_leases_and_bytes(watched: Stack) -> None:
    with grpc.insecure_channel(watched.loader.address) as channel:
        status = loader_pb2_grpc.LoaderServiceStub(channel).GetStatus(loader_pb2.GetStatusRequest())
    (model,) = status.models
    labels = {"model": model.name, "digest": model.digest, "layout": model.layout, "device": "cpu"}
    assert value(watched.loader, "mxgpt_loader_resident_bytes", **labels) == status.resident_bytes > 0
    assert value(watched.loader, "mxgpt_loader_leases", model=model.name) == 1
    assert value(watched.loader, "mxgpt_loader_load_duration_seconds_count", outcome="OK") == 1
    assert value(watched.loader, "mxgpt_loader_free_bytes", device="cpu") > 0
    assert value(watched.loader, "mxgpt_loader_used_bytes", device="cpu") == status.used_bytes
    assert value(watched.loader, "mxgpt_loader_calls_running", method="Attach") == 1
    weights = value(watched.executor, "mxgpt_executor_memory_bytes", kind="weights", device="cpu")
    assert weights >= status.resident_bytes
    assert value(watched.executor, "mxgpt_executor_leased") == 1


def test_a_load_that_fails_is_counted_by_its_reason(watched: Stack, tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with grpc.insecure_channel(watched.loader.address) as channel:
        stub = loader_pb2_grpc.LoaderServiceStub(channel)
        request = loader_pb2.LoadModelRequest(path=str(tmp_path / "broken.gguf"))
        assert error_of(stub.LoadModel(request)).reason.name == "MODEL_INVALID"
    assert value(watched.loader, "mxgpt_loader_load_duration_seconds_count", outcome="MODEL_INVALID") == 1
    assert value(watched.loader, "mxgpt_loader_calls_total", method="LoadModel", reason="MODEL_INVALID") == 1


def test_tokenizer_calls_are_counted_by_their_reason(watched: Stack) -> None:
    with grpc.insecure_channel(watched.tokenizer.address) as channel:
        stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
        grown = Growth(watched.tokenizer)
        num_ids = len(stub.Tokenize(tokenizer_pb2.TokenizeRequest(text="one two three")).token_ids)
        with pytest.raises(grpc.RpcError):
            stub.Tokenize(tokenizer_pb2.TokenizeRequest(model="another", text="x"))
        assert grown("mxgpt_tokenizer_encoded_tokens_total") == num_ids > 0
        assert grown("mxgpt_tokenizer_calls_total", method="Tokenize", reason="OK") == 1
        assert grown("mxgpt_tokenizer_calls_total", method="Tokenize", reason="MODEL_NOT_FOUND") == 1


def test_scrapes_disturb_nobody(watched: Stack, stub: Any) -> None:
    request = chat("Write a haiku about the sea.", sampling=greedy(), stopping={"max_tokens": 200, "ignore_eos": True})
    alone = collect(stub.Generate(request)).token_ids()
    ended = threading.Event()

    def scrape_on() -> None:
        while not ended.is_set():
            scrape(watched.executor)

    thread = threading.Thread(target=scrape_on)
    thread.start()
    try:
        assert collect(stub.Generate(request)).token_ids() == alone
    finally:
        ended.set()
        thread.join()


def test_metrics_are_for_this_machine_unless_allowed() -> None:
    loopback = ServerConfig("127.0.0.1:0")
    TelemetryConfig(metrics="127.0.0.1:0").require_allowed(loopback)
    TelemetryConfig(metrics="0.0.0.0:9460").require_allowed(ServerConfig("127.0.0.1:0", allow_insecure=True))
    with pytest.raises(ValueError, match="without TLS"):
        TelemetryConfig(metrics="0.0.0.0:9460").require_allowed(loopback)
    with pytest.raises(ValueError, match="HOST:PORT"):
        TelemetryConfig(metrics="localhost")


def test_metrics_beyond_loopback_have_the_services_own_tls(demo_gpt2: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tls = ROOT / "tests/tls"
    files = [
        "--tls-certificate",
        tls / "server.pem",
        "--tls-key",
        tls / "server.key",
        "--tls-client-ca",
        tls / "ca.pem",
    ]
    options = ["--model", str(demo_gpt2), *map(str, files)]
    tokenizer = Service("tokenizer", "--metrics", "0.0.0.0:0", *options)
    try:
        address = f"localhost:{tokenizer.metrics.rpartition(':')[2]}"
        shown = ["--tls-root", tls / "ca.pem", "--tls-certificate", tls / "client.pem", "--tls-key", tls / "client.key"]
        assert run(["top", address]) == 3
        assert run(["top", address, *map(str, shown[:2])]) == 3
        assert run(["top", address, "--interval", "0.1", *map(str, shown)]) == 0
        assert "TOKENIZER" in capsys.readouterr().out
    finally:
        tokenizer.stop()
    tokenizer = Service("tokenizer", "--metrics", "127.0.0.1:0", *options)
    try:  # what is for this machine alone is plain, so that `mxgpt top` reads it
        assert run(["top", tokenizer.metrics, "--interval", "0.1"]) == 0
    finally:
        tokenizer.stop()


def test_calls_refused_at_the_door_are_counted(demo_gpt2: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"client: {'k' * 64} role=generate\n")
    tokenizer = Service("tokenizer", "--model", str(demo_gpt2), "--metrics", "127.0.0.1:0", "--token-file", str(keys))
    try:
        with grpc.insecure_channel(tokenizer.address) as channel:
            stub = tokenizer_pb2_grpc.TokenizerServiceStub(channel)
            for _ in range(3):
                with pytest.raises(grpc.RpcError):
                    stub.Tokenize(tokenizer_pb2.TokenizeRequest(text="x"))
        assert value(tokenizer, "mxgpt_tokenizer_calls_total", method="Tokenize", reason="UNAUTHENTICATED") == 3
    finally:
        tokenizer.stop()


def test_an_address_in_use_is_one_line(watched: Stack) -> None:
    second = Service("tokenizer", "--loader", watched.loader.address, "--metrics", watched.tokenizer.metrics)
    assert second.process.wait(60) == 1
    second.joined()
    assert "can't be served" in second.text
    assert "Traceback" not in second.text


ALERTS = (ROOT / "deploy/alerts.yml").read_text()
METRIC_NAME = re.compile(r"\b(?:mxgpt|gen_ai|process)_\w+")


def dashboard_queries() -> list[str]:
    panels = json.loads((ROOT / "deploy/grafana/mxgpt.json").read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def test_dashboard_and_alerts_ask_for_what_is_served(watched: Stack, stub: Any) -> None:
    collect(stub.Generate(chat("What is 12 + 30?", sampling=greedy())))
    served = {name for service in (watched.executor, watched.tokenizer, watched.loader) for name, _ in scrape(service)}
    served |= {"mxgpt_loader_load_done_bytes", "mxgpt_loader_load_total_bytes"}  # while a load is under way
    queries = [*dashboard_queries(), *re.findall(r"expr:(.*?)\n +(?:for|annotations):", ALERTS, re.DOTALL)]
    assert len(queries) > 40
    assert sum("mxgpt_executor_leased" in query for query in queries) == 1  # alerts are among them
    asked = {name for query in queries for name in METRIC_NAME.findall(query)}
    assert asked <= served
    groupings = {
        label for query in queries for each in re.findall(r"by \(([^)]*)\)", query) for label in each.split(", ")
    }
    scraped = [key for service in (watched.executor, watched.tokenizer, watched.loader) for key in scrape(service)]
    assert groupings <= {label for _, labels in scraped for label, _ in labels} | {
        "instance"
    }  # Prometheus adds this one


def test_a_load_under_way_tells_how_far_it_is(demo_gpt2: Path, tmp_path: Path) -> None:
    """Asked of the collector itself: the demo model loads too fast for a scrape to meet it."""
    store = ModelStore()

    async def ask() -> dict[str, float]:
        loads = Loads(store, LoadOptions())
        async with loads.join(Source(demo_gpt2, "demo")) as load:
            found = {}
            while not load.ended.done():
                for metric in loader_metrics(store, loads, Leases()):
                    for sample in metric.samples:
                        if sample.labels.get("model") == "demo" and "load" in sample.name.removeprefix("mxgpt_loader"):
                            found[sample.name] = sample.value
                await asyncio.sleep(0)
            (await load.ended).free()
        return found

    found = asyncio.run(ask())
    assert found.keys() >= {"mxgpt_loader_load_done_bytes", "mxgpt_loader_load_total_bytes"}
    assert found["mxgpt_loader_load_done_bytes"] <= found["mxgpt_loader_load_total_bytes"]


@pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed: its own parser is not asked"
)
def test_a_real_prometheus_understands_every_query(watched: Stack, stub: Any, tmp_path: Path) -> None:
    targets = [service.metrics for service in (watched.executor, watched.tokenizer, watched.loader)]
    jobs = {"job_name": "mxgpt", "static_configs": [{"targets": targets}]}
    (tmp_path / "prometheus.yml").write_text(
        json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [jobs]})
    )
    address = f"127.0.0.1:{free_ports(1)[0]}"
    process = subprocess.Popen(
        ["prometheus", "--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={address}"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:

        def ask(query: str) -> list[Any]:
            url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                found: list[Any] = json.load(answer)["data"]["result"]
                return found

        def are_up() -> bool:
            with contextlib.suppress(OSError):
                return len([each for each in ask("up") if each["value"][1] == "1"]) == 3
            return False

        until(are_up)
        collect(stub.Generate(chat("What is 12 + 30?", sampling=greedy())))
        for query in dashboard_queries():
            if "mxgpt_loader_load_" not in query:  # nothing is being loaded
                asked = query.replace("$__rate_interval", "10s")
                until(lambda asked=asked: bool(ask(asked)))
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed: alerts are not tried on series"
)
def test_alerts_fire_when_they_should() -> None:
    subprocess.run(["promtool", "test", "rules", str(ROOT / "tests/alerts.yml")], check=True)
    subprocess.run(["promtool", "check", "config", str(ROOT / "deploy/prometheus.yml")], check=True)
