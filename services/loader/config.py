"""Configuration of a loader."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from shared.config import ServerConfig
from shared.devices import device_index
from shared.layout import FLOAT32_BUDGET
from shared.pins import Pins
from shared.telemetry_config import TelemetryConfig

MAX_SOCKET_PATH_BYTES = 107  # what a Unix address holds


@dataclass(frozen=True)
class LoaderConfig:
    """What a loader loads, into how much memory, and who may map it.

    Raises:
        ValueError: for a value out of its range.
    """

    server: ServerConfig
    socket: Path  # Unix socket over which descriptors pass
    models: tuple[Path, ...] = ()  # loaded at start; not healthy before
    model_root: Path | None = None  # models are loaded from below it; None: from anywhere
    float32_budget: int = FLOAT32_BUDGET  # bytes that a model may take as float32; a larger one stays quantised
    allowed_uids: tuple[int, ...] = ()  # users, beside this one, whose executors may map weights
    adoption_seconds: float = 5.0  # how long executors of a loader that died may bring its memory before files are read
    num_threads: int = 4  # that read, decode and hash
    pins: Pins | None = None  # SHA-256 of every file that may be loaded
    device: str = "cpu"  # or "cuda:N": where weights live
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)

    def __post_init__(self) -> None:
        if self.server.is_exposed and not (self.server.knows_callers or self.server.allow_insecure):
            raise ValueError(
                f"refusing to load models for whoever reaches {self.server.listen}: give --token-file or "
                "--tls-client-ca, or --allow-insecure inside a network that you trust"
            )
        if len(os.fsencode(self.socket)) > MAX_SOCKET_PATH_BYTES:
            raise ValueError(f"--socket: {self.socket} is longer than the {MAX_SOCKET_PATH_BYTES} bytes of an address")
        if self.model_root is not None and not self.model_root.is_dir():
            raise ValueError(f"--model-root: {self.model_root} is no directory")
        if self.float32_budget < 0:
            raise ValueError(f"--float32-budget: {self.float32_budget} is negative")
        device_index(self.device)
        if self.adoption_seconds < 0:
            raise ValueError(f"--adoption-seconds: {self.adoption_seconds} is negative")
        if self.num_threads < 1:
            raise ValueError(f"{self.num_threads} threads can't load anything")


def default_socket() -> Path:
    """The socket's path where none is given: in the user's runtime directory, or in one of their own under /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    directory = Path(runtime) / "mxgpt" if runtime else Path(f"/tmp/mxgpt-{os.getuid()}")
    return directory / "loader.sock"
