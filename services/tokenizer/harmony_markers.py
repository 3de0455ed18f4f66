"""The special tokens of Harmony, the message format of gpt-oss."""

from __future__ import annotations

import enum


class Marker(enum.Enum):
    """A special token of Harmony, by its spelling."""

    START = "<|start|>"
    CHANNEL = "<|channel|>"
    CONSTRAIN = "<|constrain|>"
    MESSAGE = "<|message|>"
    END = "<|end|>"
    RETURN = "<|return|>"
    CALL = "<|call|>"
