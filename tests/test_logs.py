"""Logs: every line that belongs to a request names it, as text and as JSON, in every service; a line is a line."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from mxgpt.v1 import executor_pb2, executor_pb2_grpc
from shared.channel import open_channel
from shared.config import ServerConfig
from shared.errors import Reason, ServiceError
from shared.logs import add_log_fields, log_fields
from shared.server import Server, servicer_method
from tests.calls import chat, collect, error_of, greedy, uncounted_calls
from tests.stack import Service, running, until


def records(service: Service) -> list[dict[str, Any]]:
    """The service's JSON lines; nothing else is on its stderr."""
    return [json.loads(line) for line in service.log if not line.startswith(f"{service.name} listening")]


def test_lines_of_a_request_name_it_in_every_service(demo_gpt_oss: Path) -> None:
    with running(demo_gpt_oss, options=["--log-format", "json", "--log-level", "DEBUG"]) as stack:
        with grpc.insecure_channel(stack.executor.address) as channel:
            stub = executor_pb2_grpc.ExecutorServiceStub(channel)
            answer = collect(stub.Generate(chat("What is 12 + 30?", sampling=greedy(), request_id="müsli 1")))
            refused = chat("secret question", request_id="two")
            refused.chat.messages[0].role = "nobody"
            assert error_of(stub.Generate(refused)).reason.name == "FIELD_INVALID"
            unnamed = collect(stub.Generate(chat("What is 1 + 2?", sampling=greedy())))

        def ended() -> dict[str, str]:
            lines = [each for each in records(stack.executor) if each["message"].startswith("Generate ended")]
            return {line["request_id"]: line["message"] for line in lines}

        def of_tokenizer() -> list[dict[str, Any]]:
            return [each for each in records(stack.tokenizer) if "request_id" in each]

        until(lambda: len(ended()) == 3 and len(of_tokenizer()) >= 3)
        messages = ended()
        assert f"OK, {len(answer.started.prompt_token_ids)} prompt tokens" in messages["müsli 1"]
        assert f"{len(answer.token_ids())} output tokens, STOP" in messages["müsli 1"]
        assert messages["two"].endswith("FIELD_INVALID")
        assert unnamed.started.request_id in messages
        assert [each["request_id"] for each in of_tokenizer()] == ["müsli 1", "two", unnamed.started.request_id]
        assert "FIELD_INVALID" in of_tokenizer()[1]["message"]
        for service in (stack.executor, stack.tokenizer, stack.loader):
            for record in records(service):
                assert record.keys() >= {"time", "level", "service", "logger", "message"}
                assert record["service"] in (service.name, "engine")
            assert "What is" not in service.text
            assert "secret question" not in service.text


def test_a_record_is_one_line_whatever_its_request_is_called(capfd: pytest.CaptureFixture[str]) -> None:
    for log_format in ("text", "json"):
        code = (
            "from shared.logs import *; import logging;"
            f"set_up_logs('executor', 'INFO', {log_format!r}); add_log_fields(request_id='a\\nb\\x1b[31m');"
            "logging.getLogger('x').info('hello')"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
        (line,) = capfd.readouterr().err.splitlines()
        if log_format == "json":
            assert json.loads(line)["request_id"] == "a\nb\x1b[31m"
        assert "\x1b" not in line
        assert "hello" in line


def test_a_record_is_one_line_whatever_it_says(capfd: pytest.CaptureFixture[str]) -> None:
    """Names and paths may come from callers: none begins a line that looks like another record's; tracebacks do."""
    code = (
        "from shared.logs import *; import logging; set_up_logs('loader');\n"
        "log = logging.getLogger('x')\n"
        "log.info('adopted %s: größe', 'a\\n2026-01-01 00:00:00,000 INFO loader forged\\x85b\\u2028c\\x1b[31m')\n"
        "try: 1 / 0\nexcept ZeroDivisionError: log.exception('went\\nwrong')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    first, second, *traceback = capfd.readouterr().err.splitlines()
    assert first.endswith(r"x: adopted a\n2026-01-01 00:00:00,000 INFO loader forged\x85b\u2028c\x1b[31m: größe")
    assert second.endswith(r"x: went\nwrong")
    assert traceback[0] == "Traceback (most recent call last):"
    assert len(traceback) > 2


def test_exceptions_stay_within_their_json_line(capfd: pytest.CaptureFixture[str]) -> None:
    code = (
        "from shared.logs import *; import logging; set_up_logs('loader', 'INFO', 'json');\n"
        "try: 1 / 0\nexcept ZeroDivisionError: logging.getLogger('x').exception('went wrong')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    (line,) = capfd.readouterr().err.splitlines()
    record = json.loads(line)
    assert (record["level"], record["service"], record["message"]) == ("ERROR", "loader", "went wrong")
    assert "ZeroDivisionError" in record["exception"]


class Broken(executor_pb2_grpc.ExecutorServiceServicer):
    """Answers as an executor whose engine failed, or that has a defect of its own."""

    def __init__(self) -> None:
        self.calls = uncounted_calls()

    @servicer_method
    async def Cancel(self, request: Any, context: Any) -> Any:
        add_log_fields(request_id=request.request_id)
        if request.request_id == "engine":
            raise ServiceError(Reason.INTERNAL, "the model failed", metadata={"reference": "f00"})
        raise KeyError("a defect")


def test_a_failed_requests_lines_name_it_and_the_engines_reference(caplog: pytest.LogCaptureFixture) -> None:
    named: list[tuple[str, str | None]] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            named.append((record.getMessage(), log_fields().get("request_id")))

    async def ask() -> None:
        server = Server(ServerConfig("127.0.0.1:0"), ["mxgpt.v1.ExecutorService"])
        executor_pb2_grpc.add_ExecutorServiceServicer_to_server(Broken(), server.grpc)
        async with open_channel(await server.start()) as channel:
            stub: Any = executor_pb2_grpc.ExecutorServiceStub(channel)
            for request_id in ("engine", "defect"):
                with pytest.raises(grpc.RpcError):
                    await stub.Cancel(executor_pb2.CancelRequest(request_id=request_id))
        await server.stop()

    handler = Handler()
    logging.getLogger().addHandler(handler)
    try:
        with caplog.at_level(logging.INFO):
            asyncio.run(ask())
    finally:
        logging.getLogger().removeHandler(handler)
    (of_engine,) = [message for message, request_id in named if request_id == "engine"]
    assert of_engine.endswith("INTERNAL, reference f00")
    assert [request_id for message, request_id in named if "Broken.Cancel failed, reference" in message] == ["defect"]
