"""GPT-2 (Radford et al., 2019: Language Models are Unsupervised Multitask Learners).

Shapes: T rows of the batch, H heads of D values, H D = hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from services.executor.ops import Array, KVLayer, Matrix, Ops, Step
from services.executor.weights import Weights


@dataclass(frozen=True)
class Layer:
    """The weights of one transformer layer."""

    attn_norm: tuple[Array, Array]  # weight (hidden,), bias (hidden,)
    attn_qkv: tuple[Matrix, Array]  # (hidden, 3 hidden), (3 hidden,)
    attn_output: tuple[Matrix, Array]  # (hidden, hidden), (hidden,)
    ffn_norm: tuple[Array, Array]  # (hidden,), (hidden,)
    ffn_up: tuple[Matrix, Array]  # (hidden, ffn), (ffn,)
    ffn_down: tuple[Matrix, Array]  # (ffn, hidden), (hidden,)


class GPT2:
    """Pre-norm transformer with learned positions; the head is the embedding unless the file has one of its own."""

    def __init__(self, weights: Weights, ops: Ops) -> None:
        config = weights.config
        self.ops = ops
        self.token_embd = weights.embedding("token_embd.weight")  # (vocab, hidden)
        self.position_embd = weights.embedding("position_embd.weight")  # (context, hidden)
        self.layers = [_layer(weights, f"blk.{index}.") for index in range(config.num_layers)]
        self.output_norm = _norm(weights, "output_norm")
        self.head = weights.matrix("token_embd.weight" if config.tied_head else "output.weight")  # (hidden, vocab)

    def forward(self, step: Step, kv_layers: Sequence[KVLayer]) -> Array:
        ops = self.ops
        x = ops.add(ops.embed(self.token_embd, step.token_ids), ops.embed(self.position_embd, step.positions))
        for layer, kv in zip(self.layers, kv_layers, strict=True):
            x = ops.add(x, self.attention(layer, ops.layer_norm(x, *layer.attn_norm), step, kv))  # (T, hidden)
            x = ops.add(x, self.feed_forward(layer, ops.layer_norm(x, *layer.ffn_norm)))  # (T, hidden)
        x = ops.select_rows(x, step.logits_rows)  # (num_logits, hidden)
        return ops.linear(ops.layer_norm(x, *self.output_norm), self.head)  # (num_logits, vocab)

    def attention(self, layer: Layer, x: Array, step: Step, kv: KVLayer) -> Array:
        qkv = self.ops.linear(x, *layer.attn_qkv)  # (T, 3 hidden)
        queries = self.ops.store_kv(qkv, kv, step, rotate=False)  # (T, H, D)
        heads = self.ops.attention(queries, kv, step)  # (T, hidden)
        return self.ops.linear(heads, *layer.attn_output)

    def feed_forward(self, layer: Layer, x: Array) -> Array:
        hidden = self.ops.gelu(self.ops.linear(x, *layer.ffn_up))  # (T, ffn)
        return self.ops.linear(hidden, *layer.ffn_down)


def _layer(weights: Weights, prefix: str) -> Layer:
    return Layer(
        attn_norm=_norm(weights, prefix + "attn_norm"),
        attn_qkv=_linear(weights, prefix + "attn_qkv"),
        attn_output=_linear(weights, prefix + "attn_output"),
        ffn_norm=_norm(weights, prefix + "ffn_norm"),
        ffn_up=_linear(weights, prefix + "ffn_up"),
        ffn_down=_linear(weights, prefix + "ffn_down"),
    )


def _norm(weights: Weights, name: str) -> tuple[Array, Array]:
    return weights.vector(f"{name}.weight"), weights.vector(f"{name}.bias")


def _linear(weights: Weights, name: str) -> tuple[Matrix, Array]:
    return weights.matrix(f"{name}.weight"), weights.vector(f"{name}.bias")
