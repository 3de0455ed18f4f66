"""gpt-oss (OpenAI, 2025: gpt-oss-120b & gpt-oss-20b Model Card, https://arxiv.org/abs/2508.10925).

It follows OpenAI's reference (github.com/openai/gpt-oss, gpt_oss/torch/model.py). Where llama.cpp differs, in
rounding the ends of YaRN's ramp to whole dimensions, the reference is followed.
Shapes: T rows of the batch, H query heads and K key and value heads of D values, E experts of ffn values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.executor.ops import Array, KVLayer, Matrix, Ops, Step
from services.executor.weights import Weights


@dataclass(frozen=True)
class Layer:
    """The weights of one transformer layer."""

    attn_norm: Array  # (hidden,)
    attn_qkv: tuple[Matrix, Array]  # (hidden, (H + 2 K) D), ((H + 2 K) D,)
    attn_sinks: Array  # (H,)
    attn_output: tuple[Matrix, Array]  # (H D, hidden), (hidden,)
    ffn_norm: Array  # (hidden,)
    router: tuple[Matrix, Array]  # (hidden, E), (E,)
    gate_up: tuple[Sequence[Matrix], Array]  # E of (hidden, 2 ffn), (E, 2 ffn)
    down: tuple[Sequence[Matrix], Array]  # E of (ffn, hidden), (E, hidden)


class GPTOSS:
    """Pre-norm transformer: grouped queries with sinks, every other layer windowed, and a mixture of experts."""

    def __init__(self, weights: Weights, ops: Ops) -> None:
        config = weights.config
        self.ops = ops
        self.num_experts_used = config.num_experts_used
        self.token_embd = weights.embedding("token_embd.weight")  # (vocab, hidden)
        self.layers = [_layer(weights, f"blk.{index}.") for index in range(config.num_layers)]
        self.output_norm = weights.vector("output_norm.weight")  # (hidden,)
        self.head = weights.matrix("output.weight")  # (hidden, vocab)

    def forward(self, step: Step, kv_layers: Sequence[KVLayer]) -> Array:
        ops = self.ops
        x = ops.embed(self.token_embd, step.token_ids)  # (T, hidden)
        for layer, kv in zip(self.layers, kv_layers, strict=True):
            x = ops.add(x, self.attention(layer, ops.rms_norm(x, layer.attn_norm), step, kv))  # (T, hidden)
            x = ops.add(x, self.experts(layer, ops.rms_norm(x, layer.ffn_norm)))  # (T, hidden)
        x = ops.select_rows(x, step.logits_rows)  # (num_logits, hidden)
        return ops.linear(ops.rms_norm(x, self.output_norm), self.head)  # (num_logits, vocab)

    def attention(self, layer: Layer, x: Array, step: Step, kv: KVLayer) -> Array:
        qkv = self.ops.linear(x, *layer.attn_qkv)  # (T, (H + 2 K) D)
        queries = self.ops.store_kv(qkv, kv, step, rotate=True)  # (T, H, D)
        heads = self.ops.attention(queries, kv, step, layer.attn_sinks)  # (T, H D)
        return self.ops.linear(heads, *layer.attn_output)

    def experts(self, layer: Layer, x: Array) -> Array:
        routing = self.ops.route(self.ops.linear(x, *layer.router), self.num_experts_used)
        return self.ops.experts(x, routing, *layer.gate_up, *layer.down)


def _layer(weights: Weights, prefix: str) -> Layer:
    qkv = [f"{prefix}attn_{part}" for part in ("q", "k", "v")]
    gate_up = [f"{prefix}ffn_{part}_exps" for part in ("gate", "up")]
    return Layer(
        attn_norm=weights.vector(f"{prefix}attn_norm.weight"),
        attn_qkv=_linear(weights, *qkv),
        attn_sinks=weights.vector(f"{prefix}attn_sinks.weight"),
        attn_output=_linear(weights, f"{prefix}attn_output"),
        ffn_norm=weights.vector(f"{prefix}post_attention_norm.weight"),
        router=_linear(weights, f"{prefix}ffn_gate_inp"),
        gate_up=_experts(weights, *gate_up),
        down=_experts(weights, f"{prefix}ffn_down_exps"),
    )


def _linear(weights: Weights, *names: str) -> tuple[Matrix, Array]:
    """One matrix of several tensors of the same input, and its bias."""
    return weights.matrix(*[f"{name}.weight" for name in names]), weights.vector(*[f"{name}.bias" for name in names])


def _experts(weights: Weights, *names: str) -> tuple[Sequence[Matrix], Array]:
    """The matrix of each expert, and the biases of all."""
    matrices = weights.expert_matrices(*[f"{name}.weight" for name in names])
    return matrices, weights.vector(*[f"{name}.bias" for name in names])
