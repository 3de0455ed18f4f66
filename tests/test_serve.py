"""`mxgpt serve` and the commands that need a model: real processes over the demo model."""

import asyncio
import json
import math
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from mxgpt import Client, MxgptError, RetryPolicy
from mxgpt.bundled import find_model
from mxgpt.cli.main import run
from mxgpt.demo import command_from_here
from mxgpt.serve import ServeConfig, ServeError, Supervisor, serving
from mxgpt.v1 import loader_pb2, loader_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from shared.channel import open_channel
from shared.config import ClientConfig
from shared.errors import ServiceError
from tests.stack import ROOT, free_ports, until

TLS = ROOT / "tests" / "tls"
MXGPT = [sys.executable, "-m", "mxgpt"]
ANY_PORTS = ["--port", "0"]
CHILDREN = ("loader", "tokenizer", "executor")


class Served:
    """A running `mxgpt serve`."""

    def __init__(self, *options):
        self.process = subprocess.Popen(
            [*MXGPT, "serve", *ANY_PORTS, "--drain-seconds", "5", *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        self.address = line.split()[-1] if line else ""

    def children(self):
        """Process ids of the services, by name."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and _parent(entry) == self.process.pid:
                command = _command(entry)
                if len(command) > 2 and command[2].startswith("services."):
                    found[command[2].removeprefix("services.")] = int(entry.name)
        return found

    def stop(self, number=signal.SIGINT):
        self.process.send_signal(number)
        _, err = self.process.communicate(timeout=60)
        return self.process.returncode, err


def _parent(entry):
    try:
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def _command(entry):
    try:
        return (entry / "cmdline").read_bytes().decode().split("\0")
    except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
        return []


def _alive(process_ids):
    return [pid for pid in process_ids if Path(f"/proc/{pid}").exists() and _state(pid) != "Z"]


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def _is_halted(process_id):
    return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.fixture(scope="module")
def served():
    server = Served()
    assert server.address, server.process.communicate()[1]
    yield server
    server.stop()


def mxgpt(*arguments, server=None, text=None):
    """(exit code, stdout, stderr) of a command."""
    environment = {**os.environ, "MXGPT_SERVER": server or "127.0.0.1:1"}
    done = subprocess.run(
        [*MXGPT, *arguments],
        cwd=ROOT,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_serve_answers(served):
    assert sorted(served.children()) == sorted(CHILDREN)
    code, out, err = mxgpt("chat", "What is 348 + 575?", "--temperature", "0", server=served.address)
    assert (code, out, err) == (0, "923\n", "")
    code, out, _ = mxgpt("models", server=served.address)
    assert code == 0
    assert "demo-gpt-oss" in out


def test_generate_is_what_the_client_gets(served):
    with Client(served.address) as client:
        result = client.complete("Count from 3 to", max_tokens=20, temperature=0)
    code, out, _ = mxgpt(
        "generate", "Count from 3 to", "-m", "20", "--temperature", "0", "--json", server=served.address
    )
    assert code == 0
    pieces = [json.loads(line) for line in out.splitlines()][:-1]
    assert "".join(piece["text"] for piece in pieces) == result.text
    assert [i for piece in pieces for i in piece["token_ids"]] == list(result.outputs[0].token_ids)


def test_interrupt_frees_the_engine(served):
    environment = {**os.environ, "MXGPT_SERVER": served.address}
    process = subprocess.Popen(
        [*MXGPT, "generate", "hello", "--ignore-eos"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    os.read(process.stdout.fileno(), 1)
    with Client(served.address) as client:
        assert client.status().num_running == 1
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        assert process.returncode == 130
        until(lambda: client.status().num_running == 0)
        assert all(block.num_free == block.num_blocks for block in client.status().blocks)


def test_errors_of_a_real_server(served):
    code, _, err = mxgpt("generate", "x", "--stop", "", server=served.address)
    assert code == 1
    assert "stopping.stop_strings" in err
    code, _, err = mxgpt("generate", "x", "--model", "other", server=served.address)
    assert code == 1
    assert "MODEL_NOT_FOUND" in err
    code, _, err = mxgpt("generate", "word " * 3000, server=served.address)
    assert code == 1
    assert "CONTEXT_LENGTH_EXCEEDED" in err


def test_bench(served):
    code, out, _ = mxgpt("bench", "--streams", "4", "--max-tokens", "8", "--json", server=served.address)
    assert code == 0
    assert json.loads(out)["output_tokens"] == 16 * 8


def test_a_killed_tokenizer_and_loader_come_back(served):
    for name in ("tokenizer", "loader"):
        killed = served.children()[name]
        os.kill(killed, signal.SIGKILL)
        until(lambda name=name, killed=killed: served.children().get(name, killed) != killed)

    def answers():
        code, out, _ = mxgpt("chat", "What is 3 + 4?", "--temperature", "0", "--timeout", "20", server=served.address)
        return (code, out) == (0, "7\n")

    until(answers)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_requests_finish_and_stops_everything(number):
    server = Served("--drain-seconds", "30")
    process_ids = list(server.children().values())
    with Client(server.address) as client:
        generation = client.generate("hello", max_tokens=100, ignore_eos=True)
        next(generation)
        server.process.send_signal(number)
        for _ in generation:
            pass
        assert len(generation.result.outputs[0].token_ids) == 100
        assert generation.result.num_resumes == 0
    _, err = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert "running requests may finish" in err
    assert "Traceback" not in err
    assert _alive(process_ids) == []


@pytest.mark.parametrize("delay", [0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8])
def test_an_interrupt_while_it_starts_is_no_traceback(delay):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "faults"), "MXGPT_FAULT": "halt"}
    process = subprocess.Popen(
        [*MXGPT, "serve", *ANY_PORTS], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    until(lambda: _is_halted(process.pid))
    process.send_signal(signal.SIGCONT)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    assert process.returncode in (-signal.SIGINT, 130, 0)


def test_it_serves_and_stops_when_nobody_reads_its_log_any_more():
    server = Served()
    process_ids = list(server.children().values())
    server.process.stderr.close()
    with Client(server.address) as client:
        client.complete("one two", max_tokens=2)
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert _alive(process_ids) == []


def test_children_end_with_a_supervisor_that_is_killed():
    server = Served()
    process_ids = list(server.children().values())
    assert len(process_ids) == 3
    server.process.kill()
    server.process.communicate()
    until(lambda: not _alive(process_ids))


def test_a_killed_executors_stream_goes_on_at_the_other():
    server = Served("--executors", "2")
    assert server.address.count(",") == 1
    with Client(server.address) as client:
        whole = client.complete("hello", max_tokens=800, ignore_eos=True, seed=4)
        generation = client.generate("hello", max_tokens=800, ignore_eos=True, seed=4)
        pieces = [next(generation)]
        executor_id = generation.result.executor_id  # host and process id
        os.kill(int(executor_id.rpartition("-")[2]), signal.SIGKILL)
        pieces += generation
        assert "".join(piece.text for piece in pieces) == whole.text
        assert generation.result.outputs[0].token_ids == whole.outputs[0].token_ids
        assert generation.result.num_resumes >= 1
        assert generation.result.executor_id != executor_id
    assert server.stop()[0] == 0


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_hung_executors_stream_goes_on_at_the_other():
    """It neither answers nor closes its connections: keepalive finds out."""
    server = Served("--executors", "2")
    with Client(server.address) as client:
        whole = client.complete("hello", max_tokens=800, ignore_eos=True, seed=4)
        generation = client.generate("hello", max_tokens=800, ignore_eos=True, seed=4)
        next(generation)
        process_id = int(generation.result.executor_id.rpartition("-")[2])
        os.kill(process_id, signal.SIGSTOP)
        start = time.monotonic()
        for _ in generation:
            pass
        assert time.monotonic() - start < 90
        assert generation.result.text == whole.text
        assert generation.result.num_resumes == 1
        os.kill(process_id, signal.SIGCONT)
    assert server.stop()[0] == 0


def test_keys_and_certificates_are_wanted_where_they_are_given(tmp_path):
    """Through `mxgpt serve`: the executors' door, and the loader's and tokenizer's behind it."""
    keys = tmp_path / "keys"
    keys.write_text("alice: alices-key\nops: ops-key role=admin\n")
    certificate = ("--tls-certificate", str(TLS / "server.pem"), "--tls-key", str(TLS / "server.key"))
    server = Served("--token-file", str(keys), *certificate, "--tls-client-ca", str(TLS / "ca.pem"))
    target = f"localhost:{server.address.rpartition(':')[2]}"
    trust = {"tls_root": TLS / "ca.pem", "tls_certificate": TLS / "client.pem", "tls_key": TLS / "client.key"}
    try:
        options = ["--tls-root", str(TLS / "ca.pem"), "--tls-certificate", str(TLS / "client.pem")]
        options += ["--tls-key", str(TLS / "client.key"), "--max-tokens", "2"]
        code, _, err = mxgpt("generate", "x", *options, server=target)
        assert (code, "--token-file" in err) == (1, True)
        assert mxgpt("generate", "x", *options, "--token-file", str(keys), server=target)[0] == 0
        with Client(target, token="wrong", **trust) as client, pytest.raises(MxgptError, match="token"):
            client.list_models()
        nameless = Client(target, token="alices-key", tls_root=TLS / "ca.pem", retry=RetryPolicy(1))
        with nameless, pytest.raises(MxgptError, match="no answer"):
            nameless.list_models()
        killed = server.children()["executor"]
        os.kill(killed, signal.SIGKILL)
        until(lambda: server.children().get("executor", killed) != killed)
        with Client(target, token="alices-key", retry=RetryPolicy(100), **trust) as client:
            assert client.complete("x", max_tokens=2).outputs, "started again, with the same door"
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("keys", "answers"),
    [
        ("", {None: "UNAUTHENTICATED", "alices-key": "UNAUTHENTICATED"}),
        (
            "alice: alices-key\nops: ops-key role=admin\n",
            {None: "UNAUTHENTICATED", "alices-key": "PERMISSION_DENIED", "ops-key": "OK"},
        ),
    ],
    ids=["no keys", "keys"],
)
def test_the_loader_of_serve_is_closed_to_who_may_only_generate(tmp_path, demo_gpt2, keys, answers):
    (tmp_path / "keys").write_text(keys)
    token_files = (tmp_path / "keys",) if keys else ()

    async def ask():
        async with Supervisor(ServeConfig(demo_gpt2, token_files=token_files, drain_seconds=1.0)) as supervisor:
            (loader,) = (child for child in supervisor._children if child.name == "loader")
            address = await loader.address()
            for token, answer in answers.items():
                async with open_channel(address, ClientConfig(token=token)) as channel:
                    call = loader_pb2_grpc.LoaderServiceStub(channel).ListModels(loader_pb2.ListModelsRequest())
                    assert (await call.code()).name == answer, token
            async with open_channel(supervisor.tokenizer_address) as channel:
                call = tokenizer_pb2_grpc.TokenizerServiceStub(channel).GetInfo(tokenizer_pb2.GetInfoRequest())
                assert (await call.code() == grpc.StatusCode.OK) == (not keys)
            assert stat.S_IMODE(supervisor._own_keys.stat().st_mode) == 0o600
            return supervisor._own_keys

    assert not asyncio.run(ask()).exists()


def test_serve_listens_for_strangers_only_with_tls_or_when_told(tmp_path):
    code, out, err = mxgpt("serve", "--host", "0.0.0.0", *ANY_PORTS)
    assert (code, out) == (2, "")
    assert "without TLS" in err
    server = Served("--host", "0.0.0.0", "--allow-insecure")
    with Client(f"127.0.0.1:{server.address.rpartition(':')[2]}") as client:
        assert client.list_models()
    assert server.stop()[0] == 0


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "No such file"), (b"GGUF\3\0\0\0", "MODEL_INVALID"), (b"something else", "MODEL_INVALID")],
)
def test_a_bad_model_is_one_line(tmp_path, content, said):
    path = tmp_path / "model.gguf"
    if content is not None:
        path.write_bytes(content)
    code, out, err = mxgpt("serve", "--model", str(path), *ANY_PORTS)
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert said in err


def test_a_port_in_use_is_reported(served):
    port = served.address.rpartition(":")[2]
    for options in (["--port", port], ["--port", "0", "--loader-port", port], ["--port", "0", "--metrics-port", port]):
        code, out, err = mxgpt("serve", *options)
        assert (code, out) == (1, "")
        (line,) = err.splitlines()
        assert f"127.0.0.1:{port} ({options[-2]}) is in use" in line
    code, _, err = mxgpt("serve", "--port", "0", "--host", "192.0.2.1", "--allow-insecure")
    assert code == 1
    assert "192.0.2.1" in err


def test_with_a_port_of_its_own_the_others_are_free_ones(demo_gpt2):
    (port,) = free_ports(1)
    command = [*MXGPT, "serve", "--model", str(demo_gpt2), "--port", str(port)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().split()[-1] == f"127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "gpu"], "'gpu' is neither 'cpu' nor 'cuda:N'"),
        (["--log-level", "LOUD"], "'LOUD' is not one of"),
        (["--token-file", "no-such-file"], "'no-such-file' does not exist"),
        (["--pins", "no-such-file"], "'no-such-file' does not exist"),
        (["--traces", "nonsense"], "--traces"),
        (["--tls-certificate", "tests/tls/server.pem", "--tls-key", "tests/tls/client.key"], "can't do TLS with"),
        (["--tls-certificate", "README.md", "--tls-key", "tests/tls/client.key"], "can't do TLS with README.md"),
    ],
    ids=lambda each: each[0] if isinstance(each, list) else "",
)
def test_options_that_can_not_be_are_usage_errors(options, said):
    code, out, err = mxgpt("serve", *ANY_PORTS, *options)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert "mxgpt serve --help" in err


def test_with_json_logs_every_line_is_an_object(demo_gpt2):
    served = Served("--model", str(demo_gpt2), "--log-format", "json", "--metrics-port", "0")
    with Client(served.address) as client:
        client.complete("one two", max_tokens=3, request_id="mine")
    code, err = served.stop()
    assert code == 0
    records = [json.loads(line) for line in err.splitlines()]
    assert {record["service"] for record in records} >= {"loader", "tokenizer", "executor", "serve"}
    assert [r["service"] for r in records if r.get("request_id") == "mine" and "Generate ended" in r["message"]] == [
        "executor"
    ]
    assert sum("metrics on 127.0.0.1:" in record["message"] for record in records) == 3


def test_a_child_that_can_not_stay_up_ends_the_whole(demo_gpt2, monkeypatch):
    monkeypatch.setattr("mxgpt.serve.MAX_RESTARTS", 1)
    monkeypatch.setattr("mxgpt.serve.RESTART_DELAY", 0.0)

    async def kill_often():
        async with Supervisor(ServeConfig(demo_gpt2, drain_seconds=1.0)) as supervisor:
            (tokenizer,) = (child for child in supervisor._children if child.name == "tokenizer")
            ended = asyncio.create_task(supervisor.ended())
            while not ended.done():
                tokenizer.kill()
                await asyncio.sleep(0.1)
            await ended

    with pytest.raises(ServeError, match="tokenizer was killed by SIGKILL, for the 2th time"):
        asyncio.run(kill_often())


def test_serving_refuses_a_missing_model(tmp_path):
    async def serve():
        async with serving(tmp_path / "none.gguf"):
            pass

    with pytest.raises(ServiceError, match="No such file"):
        asyncio.run(serve())


def test_demo():
    done = subprocess.run(
        [sys.executable, "-m", "mxgpt.demo"], cwd=ROOT, capture_output=True, text=True, timeout=110, check=True
    )
    assert "923" in done.stdout
    assert len(re.findall(r"tokens/s", done.stdout)) == 4
    assert "all stopped" in done.stdout


def test_the_demo_names_a_command_that_works_from_here(tmp_path, monkeypatch):
    bin_ = tmp_path / ".venv" / "bin"
    bin_.mkdir(parents=True)
    monkeypatch.setattr(sys, "executable", str(bin_ / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.chdir(tmp_path)
    assert command_from_here() == ".venv/bin/python -m mxgpt"
    script = bin_ / "mxgpt"
    script.touch(mode=0o755)
    assert command_from_here() == ".venv/bin/mxgpt"
    monkeypatch.chdir(ROOT)
    assert command_from_here() == str(script)
    monkeypatch.chdir(bin_)
    assert command_from_here() == "./mxgpt"
    monkeypatch.setenv("PATH", str(bin_))
    assert command_from_here() == "mxgpt"


def test_find_model(tmp_path, monkeypatch):
    assert find_model().name == "demo-gpt-oss.gguf"
    (tmp_path / "mine.gguf").write_bytes(b"")
    monkeypatch.setenv("MXGPT_MODELS", str(tmp_path))
    assert find_model("mine.gguf") == tmp_path / "mine.gguf"
    with pytest.raises(FileNotFoundError, match="--model FILE"):
        find_model("theirs.gguf")


def test_evaluate(served, capsys):
    assert run(["evaluate", "--server", served.address, "--tasks", "24", "--minimum", "0.9"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["KIND", "RIGHT", "ASKED", "SHARE"]
    assert lines[-1].split()[2] == "24"
    assert run(["evaluate", "--server", "127.0.0.1:1", "--tasks", "2"]) == 3


def test_evaluate_fails_below_the_minimum(served, capsys, monkeypatch):
    monkeypatch.setattr("models.train.tasks.is_correct", lambda _task, _answer: False)
    assert run(["evaluate", "--server", served.address, "--tasks", "2", "--minimum", "0.1", "--wrong"]) == 1
    assert "wanted:" in capsys.readouterr().out


def test_perplexity_is_that_of_the_logprobs(served, demo_gpt_oss, tmp_path):
    """Against one request over the whole text, and windows against requests of their own."""
    text = "What is 12 + 30?\nSort these words: river, apple\nWrite a haiku about the moon.\n"
    (tmp_path / "text").write_text(text)
    code, out, _ = mxgpt("perplexity", str(demo_gpt_oss), str(tmp_path / "text"), "--json")
    assert code == 0
    measured = json.loads(out)
    with Client(served.address) as client:
        whole = client.complete(text, prompt_logprobs=0, max_tokens=1)
        ids = whole.prompt_token_ids
        logprobs = [entry.logprob for entry in whole.prompt_logprobs]
        assert measured["num_scored"] == len(logprobs) == len(ids) - 1
        assert measured["perplexity"] == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-5)

        scored = [entry.logprob for entry in client.complete(ids[:8], prompt_logprobs=0, max_tokens=1).prompt_logprobs]
        for end in range(11, len(ids) + 3, 3):
            end_ids = ids[max(0, min(end, len(ids)) - 8) : min(end, len(ids))]
            num_new = min(end, len(ids)) - (end - 3)
            entries = client.complete(end_ids, prompt_logprobs=0, max_tokens=1).prompt_logprobs
            scored += [entry.logprob for entry in entries[-num_new:]]
    code, out, _ = mxgpt(
        "perplexity", str(demo_gpt_oss), str(tmp_path / "text"), "--window", "8", "--stride", "3", "--json"
    )
    assert json.loads(out)["perplexity"] == pytest.approx(math.exp(-sum(scored) / len(scored)), rel=1e-5)


def test_perplexity_usage(tmp_path):
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    assert mxgpt("perplexity", "only-one")[0] == 2
    code, _, err = mxgpt("perplexity", "model.gguf", str(tmp_path / "text"))
    assert (code, "UTF-8" in err) == (1, True)
