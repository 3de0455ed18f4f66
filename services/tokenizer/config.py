"""Configuration of a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from services.tokenizer.template_pool import TemplateLimits
from shared.config import ClientConfig, ServerConfig
from shared.pins import Pins
from shared.telemetry_config import TelemetryConfig


@dataclass(frozen=True)
class TokenizerConfig:
    """Where a tokenizer serves, and whose tokenizers: those of a loader's models, or that of one file.

    Raises:
        ValueError: for a tokenizer.json or pins without a model.
    """

    server: ServerConfig
    loader: str = "127.0.0.1:50053"  # not called where `model` is given
    peers: ClientConfig = field(default_factory=ClientConfig)
    model: Path | None = None  # GGUF file
    tokenizer_json: Path | None = None  # instead of the vocabulary in `model`
    pins: Pins | None = None  # SHA-256 of `model` and of its tokenizer.json
    num_template_workers: int = 2
    template_limits: TemplateLimits = field(default_factory=TemplateLimits)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        if self.tokenizer_json is not None and self.model is None:
            raise ValueError("--tokenizer-json goes with --model; a loader sends the one beside its model")
        if self.pins is not None and self.model is None:
            raise ValueError("--pins goes with --model; give it to the loader, which sends what it has checked")
        if self.num_template_workers < 1:
            raise ValueError("at least one template worker is needed")
