"""The two architectures in PyTorch, for training: parameters carry the names that they have in the GGUF.

Both models read rows of packed examples: `document_ids` says which example a token belongs to, and a token attends
to its own example only. Positions count along the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from models.train.mxfp4 import rounded

YARN_BETA_FAST, YARN_BETA_SLOW = 32.0, 1.0
SWIGLU_LIMIT, SWIGLU_ALPHA = 7.0, 1.702


@dataclass(frozen=True)
class GptOssConfig:
    """The demo's dimensions; what is not listed is as OpenAI's gpt-oss has it."""

    num_tokens: int = 1024
    context_length: int = 2048
    num_layers: int = 4
    hidden: int = 256
    num_heads: int = 8
    num_kv_heads: int = 2
    head_size: int = 64
    num_experts: int = 8
    num_experts_used: int = 4
    expert_hidden: int = 256
    sliding_window: int = 64
    norm_epsilon: float = 1e-5
    rope_theta: float = 150_000.0
    rope_factor: float = 32.0
    rope_original_context: int = 4096


@dataclass(frozen=True)
class Gpt2Config:
    num_tokens: int = 1024
    context_length: int = 1024
    num_layers: int = 6
    hidden: int = 256
    num_heads: int = 4
    norm_epsilon: float = 1e-5


class GptOss(nn.Module):
    """gpt-oss: RMSNorm, grouped queries with sinks and windows, YaRN, a mixture of experts in MXFP4."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.num_tokens, config.hidden)
        self.blk = nn.ModuleList(GptOssLayer(config) for _ in range(config.num_layers))
        self.output_norm = nn.RMSNorm(config.hidden, config.norm_epsilon)
        self.output = nn.Linear(config.hidden, config.num_tokens, bias=False)
        _init_matrices(self, config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("attn_sinks"):
                nn.init.normal_(parameter, std=0.5)

    def forward(self, ids: torch.Tensor, document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and document_ids (rows, length) to logits (rows, length, num_tokens) and the balance loss."""
        masks = (
            document_mask(document_ids, self.config.sliding_window),  # even layers
            document_mask(document_ids, None),
        )
        rotation = yarn_rotation(self.config, ids.shape[1], ids.device)
        x, balance = self.token_embd(ids), torch.zeros((), device=ids.device)
        for i, layer in enumerate(self.blk):
            x, layer_balance = layer(x, rotation, masks[i % 2])
            balance = balance + layer_balance
        return self.output(self.output_norm(x)), balance


class GptOssLayer(nn.Module):
    def __init__(self, config: GptOssConfig) -> None:
        super().__init__()
        self.config = config
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self.attn_norm = nn.RMSNorm(config.hidden, config.norm_epsilon)
        self.attn_q = nn.Linear(config.hidden, queries)
        self.attn_k = nn.Linear(config.hidden, keys)
        self.attn_v = nn.Linear(config.hidden, keys)
        self.attn_sinks = nn.Parameter(torch.empty(config.num_heads))
        self.attn_output = nn.Linear(queries, config.hidden)
        self.post_attention_norm = nn.RMSNorm(config.hidden, config.norm_epsilon)
        self.ffn_gate_inp = nn.Linear(config.hidden, config.num_experts)
        self.ffn_gate_exps = Experts(config.num_experts, config.hidden, config.expert_hidden)
        self.ffn_up_exps = Experts(config.num_experts, config.hidden, config.expert_hidden)
        self.ffn_down_exps = Experts(config.num_experts, config.expert_hidden, config.hidden)

    def forward(
        self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attend(self.attn_norm(x), rotation, mask)
        mixed, balance = self.mix_experts(self.post_attention_norm(x))
        return x + mixed, balance

    def attend(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        q, k, v = (
            projection(x).view(rows, length, -1, self.config.head_size).transpose(1, 2)
            for projection in (self.attn_q, self.attn_k, self.attn_v)
        )
        attended = attention(rotate(q, rotation), rotate(k, rotation), v, mask, self.attn_sinks)
        output: torch.Tensor = self.attn_output(attended.transpose(1, 2).reshape(rows, length, -1))
        return output

    def mix_experts(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every expert is computed for every token (there are only twice as many as are used): three plain products."""
        tokens = x.reshape(-1, x.shape[-1])
        weights, balance = self.route(tokens)
        hidden = swiglu(self.ffn_gate_exps.outputs(tokens), self.ffn_up_exps.outputs(tokens))
        return self.ffn_down_exps.mixture(hidden, weights).view_as(x), balance

    def route(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(num_tokens, hidden) to the experts' weights (num_tokens, num_experts), zero but for the top ones, and a loss
        that is least when all experts are used alike."""
        with torch.autocast(tokens.device.type, enabled=False):
            logits = self.ffn_gate_inp(tokens.float())
        top, top_ids = logits.topk(self.config.num_experts_used, dim=-1)
        weights = torch.zeros_like(logits).scatter(1, top_ids, top.softmax(dim=-1))
        used = (weights > 0).float().mean(dim=0)  # (num_experts,)
        return weights, (used * logits.softmax(dim=-1).mean(dim=0)).sum() * self.config.num_experts


class Experts(nn.Module):
    """One matrix of each expert; trained as it will be stored, in MXFP4."""

    def __init__(self, num_experts: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, num_outputs, num_inputs))
        self.bias = nn.Parameter(torch.zeros(num_experts, num_outputs))

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        """(num_tokens, num_inputs) to (num_tokens, num_experts, num_outputs)."""
        weight = rounded(self.weight)
        return functional.linear(x, weight.flatten(0, 1), self.bias.flatten()).view(-1, *self.bias.shape)

    def mixture(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x (num_tokens, num_experts, num_inputs), weights (num_tokens, num_experts) to (num_tokens, num_outputs)."""
        weight = rounded(self.weight).permute(1, 0, 2).flatten(1)  # (num_outputs, num_experts * num_inputs)
        weighted = x * weights.unsqueeze(-1).to(x.dtype)
        return functional.linear(weighted.flatten(1), weight) + weights @ self.bias


class Gpt2(nn.Module):
    """GPT-2: LayerNorm, learned positions, a head tied to the embedding."""

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        self.config = config
        self.token_embd = nn.Embedding(config.num_tokens, config.hidden)
        self.position_embd = nn.Embedding(config.context_length, config.hidden)
        self.blk = nn.ModuleList(Gpt2Layer(config) for _ in range(config.num_layers))
        self.output_norm = nn.LayerNorm(config.hidden, config.norm_epsilon)
        _init_matrices(self, config.num_layers)

    def forward(self, ids: torch.Tensor, document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """ids and document_ids (rows, length) to logits (rows, length, num_tokens) and no balance loss."""
        mask = document_mask(document_ids, None)
        x = self.token_embd(ids) + self.position_embd.weight[: ids.shape[1]]
        for layer in self.blk:
            x = layer(x, mask)
        return functional.linear(self.output_norm(x), self.token_embd.weight), torch.zeros((), device=ids.device)


class Gpt2Layer(nn.Module):
    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        self.config = config
        self.attn_norm = nn.LayerNorm(config.hidden, config.norm_epsilon)
        self.attn_qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.attn_output = nn.Linear(config.hidden, config.hidden)
        self.ffn_norm = nn.LayerNorm(config.hidden, config.norm_epsilon)
        self.ffn_up = nn.Linear(config.hidden, 4 * config.hidden)
        self.ffn_down = nn.Linear(4 * config.hidden, config.hidden)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows, length, hidden = x.shape
        qkv = self.attn_qkv(self.attn_norm(x)).view(rows, length, 3, self.config.num_heads, -1)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(dim=2))
        attended = attention(q, k, v, mask, sinks=None)
        x = x + self.attn_output(attended.transpose(1, 2).reshape(rows, length, hidden))
        output: torch.Tensor = x + self.ffn_down(functional.gelu(self.ffn_up(self.ffn_norm(x)), approximate="tanh"))
        return output


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.clamp(max=SWIGLU_LIMIT), up.clamp(-SWIGLU_LIMIT, SWIGLU_LIMIT)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def yarn_rotation(config: GptOssConfig, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, each (length, head_size / 2) float32, with YaRN's scaled frequencies and attention factor."""
    half = config.head_size // 2

    def ramp_end(rotations: float) -> float:
        """The (fractional) dimension that turns so many times over the original context."""
        turns = math.log(config.rope_original_context / (rotations * 2 * math.pi))
        return half * turns / math.log(config.rope_theta)

    dimensions = torch.arange(half, dtype=torch.float32, device=device)
    frequencies = config.rope_theta ** (-dimensions / half)
    low, high = ramp_end(YARN_BETA_FAST), ramp_end(YARN_BETA_SLOW)
    interpolated = ((dimensions - low) / (high - low)).clamp(0, 1)
    frequencies = frequencies * (1 - interpolated) + frequencies / config.rope_factor * interpolated
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    factor = 0.1 * math.log(config.rope_factor) + 1
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """x (rows, heads, length, head_size), its first half turned with its second."""
    cos, sin = rotation
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def attention(
    q: torch.Tensor,  # (rows, heads, length, head_size)
    k: torch.Tensor,  # (rows, kv_heads, length, head_size)
    v: torch.Tensor,  # (rows, kv_heads, length, head_size)
    mask: torch.Tensor,  # (rows, 1, length, length)
    sinks: torch.Tensor | None,  # (heads,)
) -> torch.Tensor:
    """(rows, heads, length, head_size). Written out: a compiler fuses it well enough at these lengths."""
    groups = q.shape[1] // k.shape[1]
    k, v = (kv.repeat_interleave(groups, dim=1) for kv in (k, v))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~mask, -torch.inf)
    largest = scores.detach().amax(dim=-1, keepdim=True)
    if sinks is not None:
        largest = torch.maximum(largest, sinks.detach().view(-1, 1, 1))
    shares = torch.exp(scores - largest)
    total = shares.sum(dim=-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks.view(-1, 1, 1) - largest)
    return (shares / total).to(v.dtype) @ v


def document_mask(document_ids: torch.Tensor, window: int | None) -> torch.Tensor:
    """Which keys a query sees, (rows, 1, length, length): those of its own document that are not later, the last
    `window` of them (itself included) or all."""
    positions = torch.arange(document_ids.shape[1], device=document_ids.device)
    distance = positions.view(-1, 1) - positions
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    return (near & (document_ids.unsqueeze(2) == document_ids.unsqueeze(1))).unsqueeze(1)


def _init_matrices(model: nn.Module, num_layers: int) -> None:
    """Normal weights, 1 / sqrt(inputs), those that write to the residual stream smaller; nothing else changed."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            is_embedding = "embd" in name
            std = 0.5 / math.sqrt(parameter.shape[-1])
            if "attn_output" in name or "ffn_down" in name:
                std /= math.sqrt(2 * num_layers)
            nn.init.normal_(parameter, std=0.02 if is_embedding else std)
