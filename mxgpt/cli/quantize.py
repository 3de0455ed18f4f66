"""`mxgpt quantize`: a GGUF file with its tensors in other types."""

from __future__ import annotations

from pathlib import Path

import click

from mxgpt.cli.failures import CommandError
from mxgpt.cli.terminal import print_table, progress
from mxgpt.inspect_file import inspect_file
from mxgpt.quantize_file import quantize_file
from mxgpt.recipes import RECIPES


@click.command(
    epilog="""\b
Examples:
  mxgpt quantize models/demo-gpt2.gguf demo-gpt2-q4_k_m.gguf --type Q4_K_M
  mxgpt quantize model-f16-00001-of-00003.gguf model-mxfp4.gguf --type MXFP4_MOE
  mxgpt compare model-f16-00001-of-00003.gguf model-mxfp4.gguf --text story.txt

\b
A type's name means all matrices in that type. Two are mixtures: Q4_K_M is llama.cpp's, with Q5_K, Q6_K and Q8_0 where
it pays; MXFP4_MOE is how gpt-oss is published, experts in MXFP4 and other matrices in Q8_0. Vectors, the router and
learned positions stay as they are. Quantising from a file that is quantised already adds its error to the new one's;
tensors that have their type already are copied byte for byte.
"""
)
@click.argument("source", metavar="IN.gguf", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.gguf", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--type", "recipe", required=True, type=click.Choice(list(RECIPES), case_sensitive=False), help="What to write."
)
@click.option("--force", is_flag=True, help="Replace OUT.gguf if it is there.")
def quantize(source: Path, target: Path, recipe: str, force: bool) -> None:
    """Write OUT.gguf: IN.gguf with its matrices in another type. IN.gguf may be the first of several shards."""
    if target.exists() and not force:
        raise CommandError(f"{target} is there already; replace it with --force")
    with progress() as bar:
        task = bar.add_task("values", total=None)
        quantize_file(
            source, target, RECIPES[recipe], lambda done, total: bar.update(task, completed=done, total=total)
        )
    found = inspect_file(target)
    rows = [(c.name, c.num_tensors, c.num_values, c.num_bytes, f"{c.bits_per_value:.2f}") for c in found.types]
    print_table(("TYPE", "TENSORS", "VALUES", "BYTES", "BITS A VALUE"), rows, align="lrrrr")
