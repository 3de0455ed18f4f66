"""The documentation says what the code does."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import io
import re
from pathlib import Path
from typing import Any

import click
import pytest

import generate_api
from mxgpt import Client
from mxgpt.cli import failures
from mxgpt.cli.main import cli
from shared.errors import Reason
from tests.hostile_files import hostile_files
from tests.page_samples import run_commands, samples
from tests.stack import Stack

ROOT = Path(__file__).parents[1]


def test_every_reason_is_documented_with_its_status_and_meaning() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (.+) \|$", (ROOT / "docs/errors.md").read_text(), re.MULTILINE)
    assert rows == [(reason.name, reason.status.name, reason.meaning) for reason in Reason]


def test_tests_that_the_page_on_hostile_files_names_are_there() -> None:
    """Each promise of docs/hostile-files.md is held by a test; every test file that it names is followed by some."""
    page = (ROOT / "docs/hostile-files.md").read_text()
    named = set(re.findall(r"`(?:Test\w+)?(?:::)?(test_\w+)`", page)) | set(re.findall(r"`(Test\w+)", page))
    sources = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    there = set(re.findall(r"^\s*(?:async )?(?:def|class) (\w+)", sources, re.MULTILINE))
    assert len(named) > 40
    assert named <= there, named - there
    assert set(re.findall(r"\b(test_\w+\.py)", page)) <= {path.name for path in (ROOT / "tests").glob("test_*.py")}


def test_known_flaws_are_all_in_the_corpus() -> None:
    page = (ROOT / "docs/hostile-files.md").read_text()
    listed = re.findall(r"^\| ((?:CVE|llama\.cpp)[^|]+?) \|.*\| corpus[^|]*\|$", page, re.MULTILINE)
    assert set(listed) == {file.source for file in hostile_files()}


def test_links_between_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
            if not target.startswith(("http:", "https:", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_commands_about_security_do_what_they_say(tmp_path: Path) -> None:
    """All of them, in order, in one shell; ports are free ones, and what runs at the end is stopped."""
    _, _, served, separate, renewed = run_commands(samples("docs/security.md", "sh"), tmp_path)
    assert "923" in served
    assert "demo-gpt-oss" in served
    assert "923" in separate
    assert "demo-gpt-oss" in renewed
    keys = (tmp_path / "keys").read_text()
    assert (tmp_path / "alice.new").read_text().strip() in keys
    assert (tmp_path / "alice.token").read_text().strip() not in keys


def test_the_reference_of_the_contract_is_what_the_protos_say() -> None:
    page = (ROOT / "docs/api.md").read_text()
    assert page == generate_api.page(), "docs/api.md is not what `make api` writes"
    for name in generate_api.FILES:
        for line in (ROOT / f"protos/mxgpt/v1/{name}.proto").read_text().splitlines():
            # What the script does not know of would be left out without a word.
            for kind, part in re.findall(r"^ *(service|rpc|message|enum) (\w+)", line):
                assert re.search(rf"^####? (\w+/)?{part}$", page, re.MULTILINE), f"{kind} {part} is not on the page"
            for field in re.findall(r"^ +[\w.<>, ]+ (\w+ = \d+)(?: \[|;)", line):
                number = field.partition(" = ")[2]
                assert f"| `{field.split()[0]}` = {number} |" in page, f"{field} is not on the page"


def test_links_to_a_heading_find_it() -> None:
    """Anchors are as GitHub makes them: small letters, no punctuation, hyphens for spaces."""
    num_links = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)#([^)\s]+)\)", page.read_text()):
            there = (page.parent / target if target else page).read_text()
            headings = [
                re.sub(r"[^\w -]", "", heading.lower()) for heading in re.findall(r"^#+ (.+)$", there, re.MULTILINE)
            ]
            assert anchor in {heading.replace(" ", "-") for heading in headings}, f"{page.name}: no {target}#{anchor}"
            num_links += 1
    assert num_links > 60


def test_every_reason_has_something_to_do_next() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert [reason for reason, _ in rows] == [reason.name for reason in Reason]


def test_every_benchmark_is_on_its_page() -> None:
    page = (ROOT / "docs/benchmarks.md").read_text()
    programs = [*(path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")), "quality", "weight_error"]
    assert len(programs) > 10
    for program in programs:
        assert f"benchmarks.{program}" in page, f"docs/benchmarks.md does not name benchmarks.{program}"


def test_symbols_that_pages_link_to_are_in_their_files() -> None:
    """[`name`](../path) says that `name` is defined in that file."""
    num_links = 0
    for page in (ROOT / "docs").rglob("*.md"):
        for symbol, target in re.findall(r"\[`(\w+)`\]\(([^)#\s]+\.(?:py|cu|cuh|proto))\)", page.read_text()):
            source = (page.parent / target).read_text()
            defined = rf"^\s*(?:async )?(?:def|class|enum|struct|message|service) {symbol}\b"
            named = rf"^{symbol}(?:: [^=\n]+)? = |^(?:constexpr|__device__) [^\n=(]*\b{symbol}\b"
            assert re.search(f"{defined}|{named}", source, re.MULTILINE), f"{page.name}: {target} defines no {symbol}"
            num_links += 1
    assert num_links > 60


def test_options_that_pages_name_are_there() -> None:
    """Every `mxgpt COMMAND` in a block of commands exists and has the options given."""
    num_options = 0
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for block in re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for name, rest in re.findall(r"^(?:until |[A-Z_]+=\S+ )*(?:\.venv/bin/)?mxgpt (\w+)([^#|;&]*)", line):
                    command = cli.get_command(click.Context(cli), name)
                    assert command is not None, f"{page.name}: there is no command {name!r}"
                    known = {option for parameter in command.params for option in parameter.opts}
                    known |= {option for parameter in command.params for option in parameter.secondary_opts}
                    for option in re.findall(r"(?<!\S)--[a-z0-9-]+", rest):
                        assert option in known | {"--help"}, f"{page.name}: mxgpt {name} has no {option}"
                        num_options += 1
    assert num_options > 30


def test_exit_codes_are_those_of_the_help_and_of_the_page() -> None:
    codes = sorted(value for value in vars(failures).values() if isinstance(value, int))
    assert len(codes) > 5
    assert [int(code) for code in re.findall(r"\b\d+\b", cli.epilog or "")] == codes
    page = (ROOT / "docs/cli.md").read_text()
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == codes


def test_the_samples_about_the_python_client_do_what_they_say(stack: Stack) -> None:
    """All of docs/client.md, in order in one module; `async with` at the top as in asyncio's own shell."""
    first, second, ask, whole, refused = samples("docs/client.md", "python", stack)
    module: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as written:
        exec(first, module)
    assert written.getvalue().startswith(" 5, 6, 7, 8, 9, 10, 11,")
    with contextlib.redirect_stdout(io.StringIO()) as written_async:
        running = eval(compile(second, "docs/client.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), module)
        asyncio.run(running)
    assert written_async.getvalue() == written.getvalue()
    with Client(stack.executor.address) as module["client"]:
        exec(ask, module)
        assert "".join(piece.text for piece in module["stream"]) == "923", "with little effort it answers at once"
        exec(whole, module)
        assert module["numbers"] == written.getvalue()
        assert module["answer"] == "923"
        module["told"] = []
        exec(re.sub(r"^    (error\.\w+)  # .*$", r"    told.append(\1)", refused, flags=re.MULTILINE), module)
    status, reason, _message, field, _retry_after = module["told"]
    assert (status.name, reason, field) == ("INVALID_ARGUMENT", "FIELD_INVALID", "sampling.top_p")
    assert f"grpc.StatusCode.{status.name}" in refused
    assert f'"{reason}"' in refused
    assert f'"{field}"' in refused


@pytest.mark.parametrize(("page", "answer"), [("README.md", r"(.+\n){2}.+"), ("docs/quick-start.md", "923\n")])
def test_the_first_sample_in_python_writes_the_answer_alone(stack: Stack, page: str, answer: str) -> None:
    (sample,) = samples(page, "python", stack)
    sample = sample.replace("temperature=0.7", "temperature=0.7, seed=1")  # of haiku one in many has another form
    with contextlib.redirect_stdout(io.StringIO()) as written:
        exec(sample, {})
    assert re.fullmatch(answer, written.getvalue())


@pytest.mark.timeout(300)
def test_the_quick_starts_commands_do_what_they_say(tmp_path: Path) -> None:
    """Those for the CPU, in order, in one shell. Installing is what `make` has done for these tests already."""
    install, *commands = samples("docs/quick-start.md", "sh")
    assert install == "make install\n. .venv/bin/activate\n"
    assert re.search(r"^install:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    started, stopped = run_commands(commands, tmp_path)
    assert "mxgpt serves demo-gpt-oss.gguf" in started
    assert "923" in started
    assert re.search(r"^2 requests over 1 streams in .*, 0 failed$", started, re.MULTILINE)
    assert not stopped.strip()
