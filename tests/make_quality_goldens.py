"""Makes tests/goldens/quality.json: what each type costs the demo models on a few short texts.

    python -m tests.make_quality_goldens

The figures are this program's own, for tests/test_quality.py to notice a change; that they mean something is shown in
docs/mxfp4.md. A change that is meant (a better quantiser, say) wants this run again, and a look at the difference.
"""

import hashlib
import itertools
import json
import math
import tempfile
from pathlib import Path

import numpy as np

from models.train.chats import HARMONY, PLAIN, task_example
from models.train.tasks import held_out_tasks, training_tasks
from mxgpt.bundled import find_model
from mxgpt.quantize_file import quantize_file
from mxgpt.recipes import RECIPES
from mxgpt.tensor_error import tensor_errors
from services.tokenizer.backends import make_tokenizer
from shared.gguf import read_gguf, read_tensor
from shared.tokenizer_data import tokenizer_data_from_gguf
from tests.tiny_models import load_runner

GOLDENS = Path(__file__).parent / "goldens" / "quality.json"
MODELS = {"demo-gpt-oss.gguf": HARMONY, "demo-gpt2.gguf": PLAIN}
RECIPE_NAMES = ("F16", "Q8_0", "Q4_K_M", "MXFP4")
SEED = 21
NUM_TASKS, NUM_HAIKU = 8, 3


def main() -> None:
    found = {name: figures(find_model(name), chat_format) for name, chat_format in MODELS.items()}
    GOLDENS.write_text(json.dumps(found, indent=1) + "\n")


def figures(path: Path, chat_format: str) -> dict[str, dict[str, float | str]]:
    """For each type: how far the weights are off, how the mean log-probability changes, the bytes of MXFP4's blocks."""
    with tempfile.TemporaryDirectory(prefix="mxgpt-") as directory:
        base = Path(directory) / "F32"
        quantize_file(path, base, RECIPES["F32"])
        passages = _passages(path, chat_format)
        base_logprobs, base_best = _score(base, passages)
        found: dict[str, dict[str, float | str]] = {}
        for name in RECIPE_NAMES:
            variant = Path(directory) / name
            quantize_file(base, variant, RECIPES[name])
            changed = [error for error in tensor_errors(base, variant) if error.type != error.base_type]
            logprobs, best = _score(variant, passages)
            found[name] = {
                "weights_off": math.sqrt(sum(error.relative**2 for error in changed) / len(changed)),
                "mean_loss": float(np.mean(base_logprobs - logprobs)),
                "best_differ": int(np.sum(base_best != best)),
            }
            if name == "MXFP4":
                found[name]["sha256"] = _digest(variant)
    return found


def _passages(path: Path, chat_format: str) -> list[tuple[list[int], int]]:
    """Token ids of a few conversations, and where in each the model's part begins."""
    tokenizer = make_tokenizer(tokenizer_data_from_gguf(read_gguf(path), model=path.stem, digest=""))
    haiku = (task for task in training_tasks(SEED) if task.kind == "haiku")
    passages = []
    for task in [*held_out_tasks(SEED, NUM_TASKS), *itertools.islice(haiku, NUM_HAIKU)]:
        example = task_example(chat_format, task)
        prompt = tokenizer.encode(example.prompt, parse_special=True, add_special=False)
        answer = tokenizer.encode(example.completion, parse_special=True, add_special=False)
        passages.append((prompt + answer, len(prompt)))
    return passages


def _score(path: Path, passages: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
    """Of every token that counts, its log-probability and the likeliest token there."""
    runner = load_runner(path)
    logprobs, best = [], []
    for token_ids, first_scored in passages:
        logits = runner.run(token_ids, chunk=128)[first_scored - 1 : -1].astype(np.float64)
        normalised = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        logprobs.append(np.take_along_axis(normalised, np.array(token_ids[first_scored:])[:, None], axis=1)[:, 0])
        best.append(logits.argmax(axis=1))
    return np.concatenate(logprobs), np.concatenate(best)


def _digest(path: Path) -> str:
    """Of all MXFP4 blocks: each step of that quantiser is exact, so its bytes are the same on every machine."""
    file = read_gguf(path)
    digest = hashlib.sha256()
    for info in file.tensors.values():
        if info.type.name == "MXFP4":
            digest.update(read_tensor(file, info))
    return digest.hexdigest()


if __name__ == "__main__":
    main()
