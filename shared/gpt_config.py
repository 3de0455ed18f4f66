"""The dimensions of a GPT model, read from a GGUF file's metadata and checked against its tensors.

Nothing here is a constant of one model. A `GPTConfig` that exists is sound: `__post_init__` refuses the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shared.errors import Reason, ServiceError
from shared.ggml_type import GGMLType
from shared.gguf import GGUFFile, Metadata

GPT2 = "gpt2"
GPT_OSS = "gpt-oss"
ARCHITECTURES = (GPT2, GPT_OSS)

VECTOR_TYPES = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
MAX_NUM_LAYERS = 512
# Far above any model made; they keep products of two dimensions within what Python and numpy index.
MAX_SIZES = {
    "vocab_size": 1 << 24,
    "context_length": 1 << 27,
    "num_layers": MAX_NUM_LAYERS,
    "hidden_size": 1 << 17,
    "num_heads": 1 << 12,
    "num_kv_heads": 1 << 12,
    "head_size": 1 << 12,
    "ffn_size": 1 << 20,
}
MAX_NUM_EXPERTS = 1024


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; YaRN (https://arxiv.org/abs/2309.00071) where `factor` is not 1."""

    theta: float  # base of the frequencies
    factor: float  # stretch of the context
    original_context_length: int  # before the stretch, in tokens
    beta_fast: float  # rotations over the original context above which a frequency is kept
    beta_slow: float  # rotations below which it is divided by factor
    attention_factor: float  # scale of cos and sin
    extrapolation_factor: float  # how much of the ramp between the two is applied; 1 is all of it

    def __post_init__(self) -> None:
        _require_range("rope.theta", self.theta, 1.0, 1e12, open_low=True)
        _require_range("rope.factor", self.factor, 1.0, 1e4)
        _require_range("rope.original_context_length", self.original_context_length, 1, MAX_SIZES["context_length"])
        _require_range("rope.beta_slow", self.beta_slow, 0.0, 1e6, open_low=True)
        _require_range("rope.beta_fast", self.beta_fast, self.beta_slow, 1e6)
        _require_range("rope.attention_factor", self.attention_factor, 0.0, 100.0, open_low=True)
        _require_range("rope.extrapolation_factor", self.extrapolation_factor, 0.0, 1.0)


@dataclass(frozen=True)
class GPTConfig:
    """The dimensions of a model of one of `ARCHITECTURES`; the fields are those of mxgpt.v1.ModelConfig.

    Raises:
        ServiceError: ARCHITECTURE_UNSUPPORTED, or MODEL_INVALID for a dimension out of its range.
    """

    architecture: str
    vocab_size: int
    context_length: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    ffn_size: int  # of one expert where there are experts
    norm_epsilon: float
    tied_head: bool  # the head is the transposed embedding
    num_experts: int  # 0: dense
    num_experts_used: int  # by each token
    sliding_window: int  # positions that a windowed layer sees, the token itself included; 0: no windowed layer
    rope: RopeConfig | None  # None: learned positions

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise _unsupported(self.architecture)
        for name, maximum in MAX_SIZES.items():
            _require_range(name, getattr(self, name), 1, maximum)
        _require_range("norm_epsilon", self.norm_epsilon, 0.0, 0.1, open_low=True)
        if self.num_heads % self.num_kv_heads != 0:
            raise _invalid(f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.architecture == GPT_OSS:
            self._check_gpt_oss()
        else:
            self._check_gpt2()

    @classmethod
    def from_gguf(cls, gguf: GGUFFile) -> GPTConfig:
        """Read the config from a file's metadata; `check_tensors` then compares the tensors with it.

        Raises:
            ServiceError: ARCHITECTURE_UNSUPPORTED, or MODEL_INVALID for a key that is missing, of the wrong type
                or out of range; the message names the file and the key.
        """
        metadata = gguf.metadata
        architecture = metadata.get_str("general.architecture")
        if architecture not in ARCHITECTURES:
            raise _unsupported(architecture, str(metadata.path))
        if metadata.get_int(f"{architecture}.block_count", minimum=1) > MAX_NUM_LAYERS:
            raise metadata.invalid(f"{architecture}.block_count", f"is more than the {MAX_NUM_LAYERS} that are served")
        try:
            return _read_gpt2(gguf) if architecture == GPT2 else _read_gpt_oss(gguf)
        except ServiceError as error:
            if error.message.startswith(str(metadata.path)):
                raise
            message = f"{metadata.path}: {error.message}"
            raise ServiceError(error.reason, message, metadata={"file": str(metadata.path)}) from None

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_kv_heads * self.head_size

    @property
    def num_windowed_layers(self) -> int:
        return sum(self.is_windowed(layer) for layer in range(self.num_layers))

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer sees `sliding_window` positions only: every other one from the first on."""
        return self.sliding_window > 0 and layer % 2 == 0

    def expected_tensors(self) -> Mapping[str, tuple[int, ...]]:
        """The shape, rows first, of every tensor that a file of this config holds; there are no others."""
        hidden, vocab = self.hidden_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
        if not self.tied_head:
            shapes["output.weight"] = (vocab, hidden)
        if self.architecture == GPT2:
            shapes |= {"position_embd.weight": (self.context_length, hidden), "output_norm.bias": (hidden,)}
        layer_shapes = self._gpt2_layer() if self.architecture == GPT2 else self._gpt_oss_layer()
        for layer in range(self.num_layers):
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in layer_shapes.items()}
        return shapes

    def check_tensors(self, gguf: GGUFFile) -> None:
        """Refuse a file that lacks a tensor, has one that the architecture does not know, or one misshapen.

        Raises:
            ServiceError: MODEL_INVALID; the message names the file and the tensor.
        """
        expected = self.expected_tensors()
        for name, shape in expected.items():
            info = gguf.tensors.get(name)
            if info is None:
                raise _invalid_file(gguf, 0, f"tensor {name!r} is missing")
            if info.shape != shape:
                raise _invalid_file(gguf, info.file_index, f"tensor {name!r} has shape {info.shape}, not {shape}")
            if not is_matrix(name) and info.type not in VECTOR_TYPES:
                why = f"tensor {name!r} is a vector of type {info.type.name}; F32, F16 and BF16 are read"
                raise _invalid_file(gguf, info.file_index, why)
        for name, info in gguf.tensors.items():
            if name not in expected:
                why = f"tensor {name!r} is not known in architecture {self.architecture}"
                raise _invalid_file(gguf, info.file_index, why)

    def _check_gpt2(self) -> None:
        if self.rope is not None or self.sliding_window or self.num_experts or self.num_experts_used:
            raise _invalid("gpt2 has no rotary positions, sliding window or experts")
        if self.num_kv_heads != self.num_heads or self.query_size != self.hidden_size:
            raise _invalid(f"gpt2 wants {self.num_heads} equal heads that fill hidden_size {self.hidden_size}")

    def _check_gpt_oss(self) -> None:
        _require_range("num_experts", self.num_experts, 1, MAX_NUM_EXPERTS)
        _require_range("num_experts_used", self.num_experts_used, 1, self.num_experts)
        _require_range("sliding_window", self.sliding_window, 1, MAX_SIZES["context_length"])
        if self.rope is None or self.head_size % 2 != 0:
            raise _invalid(f"gpt-oss wants rotary positions and an even head_size, not {self.head_size}")
        if self.tied_head:
            raise _invalid("tensor 'output.weight' is missing: gpt-oss has a head of its own")

    def _gpt2_layer(self) -> Mapping[str, tuple[int, ...]]:
        hidden, ffn = self.hidden_size, self.ffn_size
        matrices = {
            "attn_qkv": (3 * hidden, hidden),
            "attn_output": (hidden, hidden),
            "ffn_up": (ffn, hidden),
            "ffn_down": (hidden, ffn),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for norm in ("attn_norm", "ffn_norm"):
            shapes |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
        for name, (outputs, inputs) in matrices.items():
            shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        return shapes

    def _gpt_oss_layer(self) -> Mapping[str, tuple[int, ...]]:
        hidden, ffn, experts = self.hidden_size, self.ffn_size, self.num_experts
        matrices = {
            "attn_q": (self.query_size, hidden),
            "attn_k": (self.kv_size, hidden),
            "attn_v": (self.kv_size, hidden),
            "attn_output": (hidden, self.query_size),
            "ffn_gate_inp": (experts, hidden),
            "ffn_gate_exps": (experts, ffn, hidden),
            "ffn_up_exps": (experts, ffn, hidden),
            "ffn_down_exps": (experts, hidden, ffn),
        }
        shapes: dict[str, tuple[int, ...]] = {
            "attn_norm.weight": (hidden,),
            "attn_sinks.weight": (self.num_heads,),
            "post_attention_norm.weight": (hidden,),
        }
        for name, shape in matrices.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:-1]}
        return shapes


def is_matrix(name: str) -> bool:
    """Whether the tensor of this name may be quantised: all but norms, biases and sinks."""
    return name.endswith(".weight") and not name.endswith(("_norm.weight", "_sinks.weight"))


def _read_gpt2(gguf: GGUFFile) -> GPTConfig:
    metadata = gguf.metadata
    hidden_size = metadata.get_int("gpt2.embedding_length", minimum=1)
    num_heads = metadata.get_int("gpt2.attention.head_count", minimum=1)
    if hidden_size % num_heads != 0:
        raise metadata.invalid("gpt2.attention.head_count", f"is {num_heads}, which does not divide {hidden_size}")
    return GPTConfig(
        architecture=GPT2,
        vocab_size=_vocab_size(gguf),
        context_length=metadata.get_int("gpt2.context_length", minimum=1),
        num_layers=metadata.get_int("gpt2.block_count", minimum=1),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=metadata.get_int("gpt2.attention.head_count_kv", num_heads, minimum=1),
        head_size=hidden_size // num_heads,
        ffn_size=metadata.get_int("gpt2.feed_forward_length", minimum=1),
        norm_epsilon=metadata.get_float("gpt2.attention.layer_norm_epsilon"),
        tied_head="output.weight" not in gguf.tensors,
        num_experts=0,
        num_experts_used=0,
        sliding_window=0,
        rope=None,
    )


def _read_gpt_oss(gguf: GGUFFile) -> GPTConfig:
    metadata = gguf.metadata
    num_heads = metadata.get_int("gpt-oss.attention.head_count", minimum=1)
    hidden_size = metadata.get_int("gpt-oss.embedding_length", minimum=1)
    head_size = metadata.get_int("gpt-oss.attention.key_length", hidden_size // num_heads, minimum=1)
    for key in ("gpt-oss.attention.value_length", "gpt-oss.rope.dimension_count"):
        if metadata.get_int(key, head_size) != head_size:
            raise metadata.invalid(key, f"differs from the head size {head_size}")
    if "gpt-oss.expert_feed_forward_length" in metadata:
        ffn_size = metadata.get_int("gpt-oss.expert_feed_forward_length", minimum=1)
    else:
        ffn_size = metadata.get_int("gpt-oss.feed_forward_length", minimum=1)
    return GPTConfig(
        architecture=GPT_OSS,
        vocab_size=_vocab_size(gguf),
        context_length=metadata.get_int("gpt-oss.context_length", minimum=1),
        num_layers=metadata.get_int("gpt-oss.block_count", minimum=1),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=metadata.get_int("gpt-oss.attention.head_count_kv", num_heads, minimum=1),
        head_size=head_size,
        ffn_size=ffn_size,
        norm_epsilon=metadata.get_float("gpt-oss.attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in gguf.tensors,
        num_experts=metadata.get_int("gpt-oss.expert_count", minimum=1, maximum=MAX_NUM_EXPERTS),
        num_experts_used=metadata.get_int("gpt-oss.expert_used_count", minimum=1),
        sliding_window=metadata.get_int("gpt-oss.attention.sliding_window", minimum=1),
        rope=_read_rope(metadata),
    )


def _read_rope(metadata: Metadata) -> RopeConfig:
    """The rotary embedding. cos and sin are scaled by the paper's 0.1 ln(factor) + 1, divided by the same with
    `yarn_log_multiplier` before the logarithm where that key is there, times `yarn_attn_factor`."""
    prefix = "gpt-oss.rope.scaling."
    theta = metadata.get_float("gpt-oss.rope.freq_base")
    kind = metadata.get_str(prefix + "type", "none")
    if kind not in ("none", "yarn"):
        raise metadata.invalid(prefix + "type", f"is {kind!r}; 'yarn' and 'none' are served")
    if kind == "none":
        context_length = metadata.get_int("gpt-oss.context_length", minimum=1)
        return RopeConfig(theta, 1.0, context_length, 32.0, 1.0, 1.0, 1.0)
    factor = metadata.get_float(prefix + "factor")
    if not 1.0 <= factor <= 1e4:
        raise metadata.invalid(prefix + "factor", f"is {factor}, outside [1, 10000]")
    log_multiplier = metadata.get_float(prefix + "yarn_log_multiplier", 0.0)
    log_factor = 0.1 * math.log(factor)
    return RopeConfig(
        theta=theta,
        factor=factor,
        original_context_length=metadata.get_int(prefix + "original_context_length", minimum=1),
        beta_fast=metadata.get_float(prefix + "yarn_beta_fast", 32.0),
        beta_slow=metadata.get_float(prefix + "yarn_beta_slow", 1.0),
        attention_factor=metadata.get_float(prefix + "yarn_attn_factor", 1.0)
        * (log_factor + 1.0)
        / max(log_multiplier * log_factor + 1.0, 1e-6),
        extrapolation_factor=metadata.get_float(prefix + "yarn_ext_factor", 1.0),
    )


def _vocab_size(gguf: GGUFFile) -> int:
    """Rows of the embedding, which the tokenizer's list must match where the file brings one."""
    info = gguf.tensors.get("token_embd.weight")
    if info is None:
        raise _invalid_file(gguf, 0, "tensor 'token_embd.weight' is missing")
    vocab_size = info.shape[0]
    key = "tokenizer.ggml.tokens"
    if key in gguf.metadata and len(gguf.metadata.get_strings(key)) != vocab_size:
        num_tokens = len(gguf.metadata.get_strings(key))
        raise gguf.metadata.invalid(key, f"has {num_tokens} tokens, but the embedding has {vocab_size} rows")
    return vocab_size


def _require_range(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    if not (low < value if open_low else low <= value) or not value <= high:
        raise _invalid(f"{name} is {value}, outside {'(' if open_low else '['}{low:g}, {high:g}]")


def _unsupported(architecture: str, path: str | None = None) -> ServiceError:
    where = f"{path}: " if path else ""
    message = f"{where}architecture {architecture!r} is not served; {' and '.join(ARCHITECTURES)} are."
    return ServiceError(Reason.ARCHITECTURE_UNSUPPORTED, message, metadata={"architecture": architecture})


def _invalid(why: str) -> ServiceError:
    return ServiceError(Reason.MODEL_INVALID, f"{why}.")


def _invalid_file(gguf: GGUFFile, file_index: int, why: str) -> ServiceError:
    path = str(gguf.paths[file_index])
    return ServiceError(Reason.MODEL_INVALID, f"{path}: {why}.", metadata={"file": path})
