"""What a backend computes: the Protocol that models are written against, every op with its shapes.

A batch is ragged: the rows of all its sequences, one after another. Letters in shapes: T rows of the batch,
H query heads, K key and value heads, D values in a head, E experts, U experts that each token uses.
Everything is float32 unless said; a backend may round inputs of products to a smaller type and says so.
The numpy backend (`numpy_ops`) is the specification.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

from services.executor.step import StepBatch

Array: TypeAlias = Any  # a backend's own array, on its own device
Matrix: TypeAlias = Any  # a weight matrix of the backend: num_inputs, num_outputs
KVLayer: TypeAlias = Any  # one layer's keys and values in blocks


class Step(Protocol):
    """A batch as the backend wants it, made once and read by every layer."""

    token_ids: Array  # (T,)
    positions: Array  # (T,)
    logits_rows: Array  # (num_logits,)


class Ops(Protocol):
    """The ops of one backend, for one model. None changes its inputs unless it says so."""

    def prepare(self, batch: StepBatch) -> Any:
        """The `Step` of a batch: its arrays on the device, rotary angles, block tables, work lists."""
        ...

    def embed(
        self,
        table: Matrix,  # (vocab_size, hidden)
        ids: Array,  # (T,)
    ) -> Array:
        """Rows of an embedding, (T, hidden)."""
        ...

    def add(
        self,
        x: Array,  # (T, hidden)
        y: Array,  # (T, hidden)
    ) -> Array:
        """x + y, (T, hidden); may be written over x."""
        ...

    def rms_norm(
        self,
        x: Array,  # (T, hidden)
        weight: Array,  # (hidden,)
    ) -> Array:
        """x / sqrt(mean(x^2) + epsilon) * weight, (T, hidden); https://arxiv.org/abs/1910.07467."""
        ...

    def layer_norm(
        self,
        x: Array,  # (T, hidden)
        weight: Array,  # (hidden,)
        bias: Array,  # (hidden,)
    ) -> Array:
        """(x - mean) / sqrt(variance + epsilon) * weight + bias, (T, hidden); https://arxiv.org/abs/1607.06450."""
        ...

    def linear(
        self,
        x: Array,  # (T, inputs)
        matrix: Matrix,  # (inputs, outputs)
        bias: Array | None = None,  # (outputs,)
    ) -> Array:
        """x @ matrix + bias, (T, outputs)."""
        ...

    def gelu(
        self,
        x: Array,  # (T, ffn)
    ) -> Array:
        """0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), (T, ffn); https://arxiv.org/abs/1606.08415."""
        ...

    def store_kv(
        self,
        qkv: Array,  # (T, (H + 2 K) D): queries, keys, values; may be overwritten
        kv: KVLayer,
        step: Any,
        *,
        rotate: bool,
    ) -> Array:
        """Write the keys and values of every row into the blocks that its sequence's table names; queries (T, H, D).

        With `rotate`, queries and keys are turned by the rotary angles of their positions first: value i of a head's
        first half with value i of its second half.
        """
        ...

    def attention(
        self,
        queries: Array,  # (T, H, D)
        kv: KVLayer,  # the keys and values of this step's own rows included
        step: Any,
        sinks: Array | None = None,  # (H,)
    ) -> Array:
        """softmax(q k / sqrt(D)) v over the positions that a row may see, (T, H D).

        A row at position p of its sequence sees positions j <= p, in a windowed layer those with p - j < window.
        Query head h reads key head h // (H / K). A sink is one more logit of its head, unscaled, without a value.
        """
        ...

    def route(
        self,
        logits: Array,  # (T, E)
        num_used: int,
    ) -> Any:
        """The experts of each row: those of the U largest logits (of equals the first), weighed by their softmax."""
        ...

    def experts(
        self,
        x: Array,  # (T, hidden)
        routing: Any,  # from route
        gate_up: Sequence[Matrix],  # E of (hidden, 2 ffn): gate, then up
        gate_up_bias: Array,  # (E, 2 ffn)
        down: Sequence[Matrix],  # E of (ffn, hidden)
        down_bias: Array,  # (E, hidden)
    ) -> Array:
        """The weighted sum of each row's experts, (T, hidden).

        An expert is swiglu(x @ gate_up + gate_up_bias) @ down + down_bias, where with g = min(gate, 7) and
        u = clamp(up, -7, 7) swiglu is g sigmoid(1.702 g) (u + 1).
        """
        ...

    def select_rows(
        self,
        x: Array,  # (T, hidden)
        rows: Array,  # (n,)
    ) -> Array:
        """x[rows], (n, hidden)."""
        ...

    def to_numpy(
        self,
        x: Array,  # any shape
    ) -> Any:
        """The array in the host's memory, as numpy's."""
        ...


class Model(Protocol):
    """A model's weights bound to a backend's ops."""

    def forward(self, step: Any, kv_layers: Sequence[KVLayer]) -> Array:
        """Write the batch's keys and values, one KVLayer for each layer; logits (num_logits, vocab_size)."""
        ...
