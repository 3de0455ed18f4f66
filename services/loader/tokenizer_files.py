"""What a tokenizer needs of a model, from its GGUF file and from a tokenizer.json that lies beside it."""

from __future__ import annotations

from services.loader.loaded_model import LoadedModel
from services.loader.loading import LoadOptions, files_of, is_below
from shared.tokenizer_data import TokenizerData, read_tokenizer_json, tokenizer_data_from_gguf


def read_tokenizer(model: LoadedModel, options: LoadOptions) -> TokenizerData:
    """Read it; takes a second for a large vocabulary, and as long as hashing the files where these were adopted.

    Raises:
        ServiceError: MODEL_INVALID; MODEL_NOT_FOUND or MODEL_CHANGED if an adopted model's files are not there, or
            the tokenizer.json is not as pinned.
    """
    file = files_of(model, options)
    beside = file.paths[0].with_name("tokenizer.json")
    is_usable = beside.is_file() and is_below(options.model_root, beside)
    tokenizer_json = read_tokenizer_json(beside) if is_usable else b""
    if is_usable and options.pins is not None:
        options.pins.check(beside, tokenizer_json)
    manifest = model.manifest
    return tokenizer_data_from_gguf(
        file,
        model=manifest.model,
        digest=manifest.digest,
        aliases=manifest.aliases,
        tokenizer_json=tokenizer_json,
    )
