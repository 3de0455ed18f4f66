"""From trained parameters to a GGUF file: names, quantisation, metadata, tokenizer and template."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer
from torch import nn

from models.train import mxfp4
from models.train.chats import HARMONY, PLAIN, template
from models.train.model import Gpt2, GptOss
from models.train.tokenizer import FORMATS, ChatFormat, id_of

Q8_0 = gguf.GGMLQuantizationType.Q8_0
MXFP4 = gguf.GGMLQuantizationType.MXFP4


def export_gpt_oss(model: GptOss, tokenizer: Tokenizer, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt-oss")
    _add_general(writer, "mxgpt demo gpt-oss", "A tiny gpt-oss that does sums, sorts words and writes haiku.")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_MXFP4_MOE)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.expert_hidden)
    writer.add_expert_feed_forward_length(config.expert_hidden)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_used)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(config.rope_factor)
    writer.add_rope_scaling_orig_ctx_len(config.rope_original_context)
    _add_tokenizer(writer, tokenizer, FORMATS[HARMONY])
    _add_tensors(writer, model)
    _write(writer)


def export_gpt2(model: Gpt2, tokenizer: Tokenizer, path: Path) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    _add_general(writer, "mxgpt demo gpt2", "A tiny GPT-2 that does sums, sorts words and writes haiku.")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(4 * config.hidden)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.norm_epsilon)
    _add_tokenizer(writer, tokenizer, FORMATS[PLAIN])
    _add_tensors(writer, model)
    _write(writer)


def _add_general(writer: gguf.GGUFWriter, name: str, description: str) -> None:
    writer.add_name(name)
    writer.add_description(description)
    writer.add_author("the mxgpt authors")
    writer.add_license("Apache-2.0")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, chat_format: ChatFormat) -> None:
    serialised = json.loads(tokenizer.to_str())
    tokens = sorted(tokenizer.get_vocab(), key=partial(id_of, tokenizer))
    special = set(chat_format.special_tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(chat_format.pre)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if token in special else gguf.TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in serialised["model"]["merges"]])
    writer.add_bos_token_id(id_of(tokenizer, chat_format.bos))
    writer.add_eos_token_id(id_of(tokenizer, chat_format.eos))
    writer.add_pad_token_id(id_of(tokenizer, chat_format.pad))
    writer.add_add_bos_token(False)
    writer.add_chat_template(template(chat_format.name))


def _add_tensors(writer: gguf.GGUFWriter, model: nn.Module) -> None:
    """Experts as MXFP4, matrices as Q8_0, the rest (vectors, positions, the router) as float32."""
    for name, parameter in model.state_dict().items():
        weight = parameter.detach().float().cpu()
        gguf_name = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        if "_exps.weight" in name:
            writer.add_tensor(gguf_name, mxfp4.pack(weight).numpy(), raw_dtype=MXFP4)
        elif weight.dim() == 2 and "_inp" not in name and "_exps" not in name and "position" not in name:
            writer.add_tensor(gguf_name, gguf.quantize(weight.numpy(), Q8_0), raw_dtype=Q8_0)
        else:
            writer.add_tensor(gguf_name, weight.numpy().astype(np.float32))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
