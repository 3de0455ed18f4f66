"""Runs one target under atheris (libFuzzer) for a while; needs `pip install '.[fuzz]'`.

    python -m fuzz gguf_header --seconds 60 [--corpus DIR]

libFuzzer's own statistics go to standard error. Inputs that reach new branches are kept in the corpus directory, from
which the next run goes on; one that fails ends the run and is kept in fuzz/regressions/TARGET. The last line counts
what became of the corpus.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

# The packages whose branches guide the fuzzer.
TARGETS = {
    "gguf_header": ("shared",),
    "tokenizer_files": ("shared", "services.tokenizer"),
    "chat_template": ("jinja2", "services.tokenizer"),
}
REGRESSIONS = Path(__file__).parent / "regressions"

SECONDS_PER_INPUT = 20  # none takes longer: a target that bounds its own time fails first
MAX_RSS_MIB = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, help="kept between runs; a temporary one by default")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus = arguments.corpus or Path(folder)
        if arguments.child:
            fuzz(arguments.target, corpus, arguments.seconds)
        else:
            raise SystemExit(run(arguments.target, corpus, arguments.seconds))


def run(target: str, corpus: Path, seconds: int) -> int:
    """Fuzz in a child process, then count the corpus; the exit code, 0 if no input failed."""
    module = importlib.import_module(f"fuzz.{target}")
    corpus.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(module.seeds()):
        (corpus / f"seed-{index:03d}").write_bytes(seed)
    command = [sys.executable, "-m", "fuzz", target, "--seconds", str(seconds), "--corpus", str(corpus), "--child"]
    code = subprocess.run(command, check=False).returncode
    if code == 0:
        outcomes = collections.Counter(module.examine(path.read_bytes()) for path in sorted(corpus.iterdir()))
        counts = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
        print(f"{target}: {outcomes.total()} inputs kept: {counts}", flush=True)
    return code


def fuzz(target: str, corpus: Path, seconds: int) -> None:
    """Hand over to libFuzzer, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=list(TARGETS[target])):
        module = importlib.import_module(f"fuzz.{target}")
    regressions = REGRESSIONS / target
    regressions.mkdir(parents=True, exist_ok=True)
    options = (
        f"-max_total_time={seconds}",
        f"-max_len={module.MAX_BYTES}",
        f"-timeout={SECONDS_PER_INPUT}",
        f"-rss_limit_mb={MAX_RSS_MIB}",
        f"-artifact_prefix={regressions}/",
        "-print_final_stats=1",
    )

    def examine(data: bytes) -> None:
        module.examine(data)

    atheris.Setup([sys.argv[0], *options, str(corpus), str(regressions)], examine)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
