"""The commands that talk to a server, as a shell sees them: what goes where, exit codes, signals, pipes."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading

import pytest

from mxgpt.cli.main import run as run_command
from shared.errors import Reason, ServiceError, invalid_field
from tests.scripted_executor import ScriptedExecutor, break_at, fail_at, hold_at, serve, whole_text
from tests.stack import ROOT, until

MXGPT = [sys.executable, "-m", "mxgpt"]
SECONDS = 60  # that a command may take, however busy the machine is


@pytest.fixture
def executor():
    scripted = ScriptedExecutor()
    server, scripted.address = serve(scripted)
    yield scripted
    server.stop(None)


def start(executor, *arguments):
    """A command as a process, its stdout a pipe."""
    environment = {**os.environ, "MXGPT_SERVER": executor.address}
    return subprocess.Popen(
        [*MXGPT, *arguments],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(executor, *arguments, text=""):
    """(exit code, stdout, stderr) of a command in this process, whose stdin is a pipe with `text`."""
    stdin = io.TextIOWrapper(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr("sys.stdin", stdin)
        patch.setenv("MXGPT_SERVER", executor.address if executor else "127.0.0.1:1")
        code = run_command(arguments)
    return code, out.getvalue(), err.getvalue()


def test_generate_to_a_pipe_is_text_alone(executor):
    code, out, err = run(executor, "generate", "hello", "--max-tokens", "9", "--temperature", "0", "--stop", "END")
    assert (code, out, err) == (0, whole_text(0, 9) + "\n", "")
    request = executor.requests[0]
    assert (request.text, request.stopping.max_tokens, list(request.stopping.stop_strings)) == ("hello", 9, ["END"])
    assert request.sampling.HasField("temperature")
    assert request.sampling.temperature == 0.0
    assert not request.sampling.HasField("top_p"), "defaults are the server's"


@pytest.mark.parametrize("arguments", [["-"], []])
def test_prompt_from_stdin_without_its_last_newline(executor, arguments):
    assert run(executor, "generate", *arguments, text="two\nlines\n")[0] == 0
    assert executor.requests[0].text == "two\nlines"


def test_text_streams_as_it_comes(executor):
    goes_on = threading.Event()
    executor.faults[:] = [hold_at(3, goes_on)]
    process = start(executor, "generate", "hello", "--max-tokens", "9")
    first = os.read(process.stdout.fileno(), 100)
    assert first, "the first piece comes before the last is there"
    goes_on.set()
    assert (first + process.stdout.read()).decode() == whole_text(0, 9) + "\n"
    assert process.wait(SECONDS) == 0


def test_a_broken_stream_is_resumed_unseen(executor):
    executor.faults[:] = [break_at(3)]
    assert run(executor, "generate", "hello", "--max-tokens", "9")[:2] == (0, whole_text(0, 9) + "\n")
    assert len(executor.requests) == 2


def test_json_lines(executor):
    code, out, _ = run(executor, "generate", "x", "--json", "--logprobs", "1", "--n", "2", "--max-tokens", "5")
    *pieces, last = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    for index in range(2):
        own = [piece["text"] for piece in pieces if piece["index"] == index]
        assert "".join(own) == whole_text(index, 5) == last["result"]["outputs"][index]["text"]
    assert pieces[0]["logprobs"][0]["top"][0] == [pieces[0]["token_ids"][0], -0.5]
    assert last["result"]["outputs"][0]["finish_reason"] == "length"


def test_several_outputs_one_after_another(executor):
    _, out, _ = run(executor, "generate", "x", "--n", "2", "--max-tokens", "5")
    assert out == f"--- output 0\n{whole_text(0, 5)}\n--- output 1\n{whole_text(1, 5)}\n"


def test_token_ids_and_stats(executor):
    code, _, err = run(executor, "generate", "--token-ids", "5, 6 7", "--stats", "--max-tokens", "9")
    assert code == 0
    assert list(executor.requests[0].token_ids.ids) == [5, 6, 7]
    assert "9 tokens at 16.0 tokens/s" in err


def test_interrupt_cancels_on_the_server(executor):
    executor.delay = 0.1
    process = start(executor, "generate", "hello", "--max-tokens", "1000")
    os.read(process.stdout.fileno(), 10)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in err.decode()
    assert executor.cancelled.wait(SECONDS)


def test_a_reader_that_goes_is_no_error(executor):
    executor.delay = 0.05
    process = start(executor, "generate", "hello", "--max-tokens", "1000")
    os.read(process.stdout.fileno(), 10)
    process.stdout.close()
    assert process.wait(SECONDS) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert executor.cancelled.wait(SECONDS)


def test_nobody_there():
    code, out, err = run(None, "generate", "hello")
    assert (code, out) == (3, "")
    assert err.startswith("mxgpt: ")
    assert "mxgpt serve" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "hint"),
    [
        (invalid_field("sampling.top_p", "must lie in (0, 1]"), 1, "sampling.top_p"),
        (ServiceError(Reason.CONTEXT_LENGTH_EXCEEDED, "the prompt has 99 tokens"), 1, "Shorten"),
        (ServiceError(Reason.UNAUTHENTICATED, "wants a token"), 1, "--token-file"),
        (ServiceError(Reason.TOKENIZER_UNAVAILABLE, "away"), 3, "TOKENIZER_UNAVAILABLE"),
    ],
)
def test_errors_are_one_line_that_helps(executor, error, code, hint):
    executor.faults[:] = [fail_at(0, error) for _ in range(10)]
    got, out, err = run(executor, "generate", "hello")
    assert (got, out) == (code, "")
    assert err.count("\n") == 1
    assert error.message in err
    assert hint in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--no-such-option"],
        ["generate", "x", "--top-k", "many"],
        ["generate", "x", "--logit-bias", "5"],
        ["generate", "x", "--token-ids"],
        ["generate", "x", "--token-file", "/nonexistent"],
        ["generate", "x", "--timeout", "-3"],
        ["generate", "x", "--logprobs", "3"],
        ["generate", "x", "--prompt-logprobs", "3"],
        ["generate", "a\udcff"],
        ["generate", "x", "--stop", "a\udcff"],
        ["chat", "a\udcff"],
        ["chat", "x", "--system", "a\udcff"],
        ["no-such-command"],
        [],
    ],
)
def test_wrong_usage(executor, arguments):
    code, out, err = run(executor, *arguments)
    assert (code, out) == (2, "")
    assert "Usage" in err
    assert executor.requests == []


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--max-tokens", "0", "x>=1"),
        ("--top-k", "-3", "x>=0"),
        ("--seed", "-1", "x>=0"),
        ("--top-p", "7", "0<x<=1"),
        ("--n", "17", "1<=x<=16"),
    ],
)
def test_a_number_out_of_its_range_is_told_the_range(executor, option, value, wanted):
    code, _, err = run(executor, "generate", "x", option, value)
    assert code == 2
    assert option in err
    assert f"not in the range {wanted}" in err


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_stdin_that_is_no_text_is_wrong_usage(executor, command):
    code, out, err = run(executor, command, text=b"a\xff\n")
    assert (code, out) == (2, "")
    assert "not UTF-8" in err


def test_a_prompt_larger_than_a_message_is_told_the_limit(executor):
    code, _, err = run(executor, "generate", text="x" * 2**24)
    assert code == 1
    assert "16 MiB at most" in err
    assert err.count("\n") == 1


ASCII_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, ASCII_LOCALE])
def test_characters_that_the_terminal_lacks_are_replaced(executor, environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    process = start(executor, "chat", "hé", "--max-tokens", "5")
    out, err = process.communicate(timeout=SECONDS)
    assert (process.returncode, err) == (0, b"")
    assert out.decode() == whole_text(0, 5).encode("ascii", "replace").decode() + "\n"
    assert executor.requests[0].chat.messages[0].content == "hé"


def test_json_is_whole_in_any_encoding(executor, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out, _ = start(executor, "generate", "x", "--max-tokens", "5", "--json").communicate(timeout=SECONDS)
    assert json.loads(out.splitlines()[-1])["result"]["outputs"][0]["text"] == whole_text(0, 5)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_traceback(executor, closed):
    environment = {**os.environ, "MXGPT_SERVER": executor.address}
    command = f'"$0" -m mxgpt generate x --max-tokens 2 --stats {closed}'
    done = subprocess.run(
        ["sh", "-c", command, sys.executable], cwd=ROOT, env=environment, capture_output=True, check=False, text=True
    )
    assert done.returncode == 0
    assert done.stdout == ("" if ">&- 2" in closed or closed == ">&-" else whole_text(0, 2) + "\n")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "remark"),
    [
        (["generate", "x", "--max-tokens", "5"], "stopped at 5 tokens (--max-tokens)"),
        (["generate", "x", "--max-tokens", "5", "--n", "2"], "stopped at 5 tokens (--max-tokens)"),
        (["generate", "x"], "stopped: the context of 14 tokens is full"),
        (["chat", "x", "--max-tokens", "5"], "stopped at 5 tokens (--max-tokens)"),
    ],
)
def test_a_limit_that_cut_the_text_off_is_told(executor, arguments, remark):
    assert run(executor, *arguments)[2] == "", "a pipe gets no remarks"
    code, _, err = run(executor, *arguments, "--stats")
    assert code == 0
    assert err.splitlines()[0] == remark
    assert len(err.splitlines()) == 2
    terminal = _Terminal(executor, *arguments)
    terminal.expect(remark)
    terminal.process.wait(SECONDS)


def test_stats_count_the_breaks_that_were_survived(executor):
    executor.faults[:] = [break_at(3)]
    assert run(executor, "generate", "x", "--stats")[2].endswith("tokens/s, resumed once\n")
    executor.faults[:] = [break_at(3), break_at(2)]
    assert run(executor, "generate", "x", "--stats")[2].endswith("tokens/s, resumed 2 times\n")


def test_a_conversation_with_nobody_does_not_begin():
    terminal = _Terminal(None, "chat")
    terminal.expect("mxgpt serve")
    assert terminal.process.wait(SECONDS) == 3
    assert ">" not in terminal.before


@pytest.mark.parametrize(
    "command",
    [
        *("", "serve", "generate", "chat", "models", "top"),
        *("inspect", "quantize", "compare", "bench", "perplexity", "evaluate"),
    ],
)
def test_help_teaches(command):
    code, out, _ = run(None, *command.split(), "--help")
    assert code == 0
    assert "Examples:" in out or not command
    assert all(len(line) <= 120 for line in out.splitlines())


def test_models(executor):
    code, out, _ = run(executor, "models")
    assert code == 0
    assert out.splitlines()[0].split() == ["MODEL", "ALIASES", "ARCHITECTURE", "CONTEXT", "VOCABULARY", "DIGEST"]
    assert out.splitlines()[1].split()[:4] == ["fake", "f", "gpt2", "1024"]
    fields = json.loads(run(executor, "models", "--json")[1])
    assert fields["models"][0]["vocab_size"] == 1000
    assert fields["status"]["num_running"] == 0


def test_one_question(executor):
    code, out, _ = run(executor, "chat", "Hello?", "--system", "Be brief.", "--date", "2026-01-02", "--max-tokens", "5")
    assert (code, out) == (0, whole_text(0, 5) + "\n")
    chat = executor.requests[0].chat
    assert [(m.role, m.content) for m in chat.messages] == [("system", "Be brief."), ("user", "Hello?")]
    assert chat.date == "2026-01-02"


def test_a_turn_for_each_line(executor):
    code, out, _ = run(executor, "chat", "--max-tokens", "5", text="one\n\ntwo\n")
    assert (code, out) == (0, 2 * (whole_text(0, 5) + "\n"))
    roles = [message.role for message in executor.requests[1].chat.messages]
    assert roles == ["user", "assistant", "user"]
    assert executor.requests[1].chat.messages[1].content == whole_text(0, 5)


def test_a_conversation_at_a_terminal(executor):
    """Prompts, a reset, an answer stopped by Ctrl-C, and the end by Ctrl-D."""
    terminal = _Terminal(executor, "chat", "--max-tokens", "5")
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect(whole_text(0, 5).strip().split()[-1])
    terminal.expect("> ")
    terminal.type("/reset\n")
    terminal.expect("a new conversation")
    terminal.expect("> ")
    executor.faults[:] = [hold_at(2, threading.Event())]
    terminal.type("again\n")
    until(lambda: len(executor.requests) == 2, SECONDS)
    terminal.process.send_signal(signal.SIGINT)
    terminal.expect("stopped")
    assert executor.cancelled.wait(SECONDS)
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.process.wait(SECONDS) == 0
    assert [message.content for message in executor.requests[1].chat.messages] == ["again"]


class _Terminal:
    """A command at a pseudo-terminal."""

    def __init__(self, executor, *arguments):
        self.fd, child = pty.openpty()
        address = executor.address if executor else "127.0.0.1:1"
        environment = {**os.environ, "MXGPT_SERVER": address, "TERM": "xterm"}
        self.process = subprocess.Popen(
            [*MXGPT, *arguments], env=environment, cwd=ROOT, stdin=child, stdout=child, stderr=child
        )
        os.close(child)
        self.seen = ""

    def type(self, text):
        os.write(self.fd, text.encode())

    def expect(self, text):
        while text not in self.seen:
            self.seen += os.read(self.fd, 1000).decode(errors="replace")
        self.before, _, self.seen = self.seen.partition(text)


def test_control_characters_do_not_reach_a_terminal(executor, monkeypatch):
    monkeypatch.setattr("tests.scripted_executor.WORDS", ("\x1b[2J\x07wiped",))
    terminal = _Terminal(executor, "generate", "x", "--max-tokens", "1")
    terminal.expect("wiped")
    assert terminal.process.wait(SECONDS) == 0
    assert run(executor, "generate", "x", "--max-tokens", "1")[1] == "\x1b[2J\x07wiped\n", "a pipe gets what there is"


def test_bench(executor):
    code, out, _ = run(executor, "bench", "--streams", "3", "--requests", "7", "--max-tokens", "9", "--json")
    fields = json.loads(out)
    assert code == 0
    assert (fields["requests"], fields["failed"], fields["output_tokens"]) == (7, 0, 63)
    assert fields["first_token_ms"]["p50"] > 0
    assert fields["between_tokens_ms"]["p99"] >= fields["between_tokens_ms"]["p50"]
    assert len(executor.requests) == 8, "one more to warm up"
    assert "tokens/s" in run(executor, "bench", "--requests", "1")[1]


def test_bench_says_when_requests_failed(executor):
    executor.faults[:] = [fail_at(0, invalid_field("n", "no")) for _ in range(5)]
    code, out, err = run(executor, "bench", "--requests", "5", "--warm-up", "0")
    assert code == 1
    assert "failed: n: no" in err
    assert out == ""
