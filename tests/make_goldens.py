"""Makes tests/goldens/: small random models and the logits that Hugging Face transformers gives for them.

Run by `make goldens`, in an environment of its own with torch and transformers. Each model is a GGUF file, written
here with gguf-py, and an .npz with `token_ids` (n,) and `logits` (n, vocab_size), computed in float32 with eager
attention. Nothing is left at zero: biases, sinks, norms and the router are all random.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from numpy.typing import NDArray
from transformers import GPT2Config, GPT2LMHeadModel, GptOssConfig, GptOssForCausalLM

GOLDENS = Path(__file__).parent / "goldens"
NUM_TOKENS = 120
MXFP4 = gguf.GGMLQuantizationType.MXFP4

Tensors = dict[str, NDArray[np.float32]]


def main() -> None:
    """Make every golden."""
    torch.manual_seed(1)
    GOLDENS.mkdir(exist_ok=True)
    make_gpt2("gpt2")
    make_gpt_oss("gpt_oss", hidden_size=40, head_dim=20, intermediate_size=24, mxfp4=False)
    make_gpt_oss("gpt_oss_mxfp4", hidden_size=96, head_dim=24, intermediate_size=32, mxfp4=True)


def make_gpt2(name: str) -> None:
    """GPT-2 with five heads of 12 and a tied head."""
    config = GPT2Config(
        vocab_size=131, n_positions=128, n_embd=60, n_layer=2, n_head=5, n_inner=100, attn_implementation="eager"
    )
    model = GPT2LMHeadModel(config).float().eval()
    randomize(model)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    tensors: Tensors = {
        "token_embd.weight": state["transformer.wte.weight"],
        "position_embd.weight": state["transformer.wpe.weight"],
        "output_norm.weight": state["transformer.ln_f.weight"],
        "output_norm.bias": state["transformer.ln_f.bias"],
    }
    parts = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }
    for layer in range(config.n_layer):
        for theirs, ours in parts.items():
            weight = state[f"transformer.h.{layer}.{theirs}.weight"]
            # Their Conv1D holds (inputs, outputs), a GGUF (outputs, inputs).
            tensors[f"blk.{layer}.{ours}.weight"] = np.ascontiguousarray(weight.T) if weight.ndim == 2 else weight
            tensors[f"blk.{layer}.{ours}.bias"] = state[f"transformer.h.{layer}.{theirs}.bias"]
    metadata = {
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_inner,
        "block_count": config.n_layer,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }
    write(name, "gpt2", metadata, tensors, model)


def make_gpt_oss(name: str, *, hidden_size: int, head_dim: int, intermediate_size: int, mxfp4: bool) -> None:
    """gpt-oss: top-4 of 8 experts, six query heads on two key heads, a window of 24, YaRN from 32 positions on."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 32,
    }
    config = GptOssConfig(
        vocab_size=131,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=head_dim,
        num_local_experts=8,
        num_experts_per_tok=4,
        sliding_window=24,
        max_position_embeddings=1024,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).float().eval()
    randomize(model)
    if mxfp4:
        round_experts(model)
    state = {key: value.detach().numpy() for key, value in model.state_dict().items()}
    tensors: Tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        tensors |= gpt_oss_layer(state, f"model.layers.{layer}.", f"blk.{layer}.")
    metadata = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "expert_feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "expert_count": config.num_local_experts,
        "expert_used_count": config.num_experts_per_tok,
        "rope.freq_base": rope["rope_theta"],
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": rope["factor"],
        "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
    write(name, "gpt-oss", metadata, tensors, model, mxfp4_suffix="_exps.weight" if mxfp4 else None)


def gpt_oss_layer(state: Mapping[str, NDArray[np.float32]], theirs: str, ours: str) -> Tensors:
    """One layer's tensors under their names in a GGUF."""
    gate_up = state[theirs + "mlp.experts.gate_up_proj"].transpose(0, 2, 1)  # (experts, 2 ffn, hidden), interleaved
    gate_up_bias = state[theirs + "mlp.experts.gate_up_proj_bias"]
    down = state[theirs + "mlp.experts.down_proj"].transpose(0, 2, 1)  # (experts, hidden, ffn)
    tensors: Tensors = {
        "attn_norm.weight": state[theirs + "input_layernorm.weight"],
        "attn_sinks.weight": state[theirs + "self_attn.sinks"],
        "post_attention_norm.weight": state[theirs + "post_attention_layernorm.weight"],
        "ffn_gate_inp.weight": state[theirs + "mlp.router.weight"],
        "ffn_gate_inp.bias": state[theirs + "mlp.router.bias"],
        "ffn_gate_exps.weight": gate_up[:, 0::2],
        "ffn_up_exps.weight": gate_up[:, 1::2],
        "ffn_gate_exps.bias": gate_up_bias[:, 0::2],
        "ffn_up_exps.bias": gate_up_bias[:, 1::2],
        "ffn_down_exps.weight": down,
        "ffn_down_exps.bias": state[theirs + "mlp.experts.down_proj_bias"],
    }
    for part, name in (("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")):
        for kind in ("weight", "bias"):
            tensors[f"{name}.{kind}"] = state[f"{theirs}self_attn.{part}_proj.{kind}"]
    return {ours + name: np.ascontiguousarray(values) for name, values in tensors.items()}


def randomize(model: torch.nn.Module) -> None:
    """Random values everywhere, at scales that keep activations near one and logits spread."""
    for name, parameter in model.named_parameters():
        is_norm = "norm" in name or ".ln_" in name
        with torch.no_grad():
            if is_norm and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim < 2 or name.endswith("bias"):
                parameter.normal_(0.0, 0.5)
            elif "wte" in name or "wpe" in name or "embed_tokens" in name:
                parameter.normal_(0.0, 0.7)
            else:
                inputs = parameter.shape[-1] if "proj" in name and parameter.ndim == 2 else parameter.shape[-2]
                parameter.normal_(0.0, 1.5 / inputs**0.5)


def round_experts(model: torch.nn.Module) -> None:
    """Round the experts' matrices, along their inputs, to what MXFP4 holds; gguf-py's decoder says what that is."""
    for name, parameter in model.named_parameters():
        if name.endswith(("gate_up_proj", "down_proj")):
            rows = parameter.detach().numpy().transpose(0, 2, 1)  # (experts, outputs, inputs)
            blocks = gguf.quants.quantize(np.ascontiguousarray(rows), MXFP4)
            values = gguf.quants.dequantize(blocks, MXFP4).astype(np.float32)
            with torch.no_grad():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(values.transpose(0, 2, 1))))


def write(
    name: str,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Tensors,
    model: torch.nn.Module,
    mxfp4_suffix: str | None = None,
) -> None:
    """Write the model's file, and its logits for a random sequence."""
    writer = gguf.GGUFWriter(GOLDENS / f"{name}.gguf", architecture)
    for key, value in metadata.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        add(f"{architecture}.{key}", value)
    for tensor_name, values in tensors.items():
        if mxfp4_suffix is not None and tensor_name.endswith(mxfp4_suffix):
            blocks = gguf.quants.quantize(values, MXFP4)
            assert np.array_equal(gguf.quants.dequantize(blocks, MXFP4), values)
            writer.add_tensor(tensor_name, blocks, raw_dtype=MXFP4)
        else:
            writer.add_tensor(tensor_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    token_ids = torch.randint(0, model.config.vocab_size, (1, NUM_TOKENS))
    with torch.no_grad():
        logits = model(token_ids).logits[0].numpy()
    np.savez_compressed(GOLDENS / f"{name}.npz", token_ids=token_ids[0].numpy(), logits=logits)


if __name__ == "__main__":
    main()
