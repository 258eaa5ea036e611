"""A tiny model of any architecture that the installed transformers has, with random values in all its weights."""

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


VOCAB = 61
MAX_PARAMETERS = 60_000_000
LAYERS, HEADS, HEAD_DIM, HIDDEN, INNER, EXPERTS, WINDOW = 4, 4, 8, 32, 48, 4, 6

# Fields of configurations by what they hold, under every name that architectures give them.
_FIELDS = [
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers decoder_layers depth encoder_layers num_decoder_layers layers",
    ),
    (
        2,
        "num_key_value_heads num_experts_per_tok num_experts_per_token moe_k top_k topk_group n_group num_expert_group "
        "expert_top_k moe_top_k linear_num_key_heads n_groups mamba_n_groups num_kv_heads multi_query_group_num "
        "encoder_attention_heads_kv num_selects moe_topk zero_expert_num num_kv_shared_layers attn_layer_period expert_layer_period hc_count hc_mult",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "linear_num_value_heads linear_num_heads index_n_heads attention_heads mamba_n_heads mamba_num_heads",
    ),
    (
        HEAD_DIM,
        "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim "
        "linear_head_dim index_head_dim d_kv kv_channels mamba_head_dim attention_head_dim rotary_dim dim_head",
    ),
    (
        16,
        "kv_lora_rank q_lora_rank mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank laurel_rank "
        "hidden_size_per_layer_input lora_rank",
    ),
    (
        HIDDEN,
        "hidden_size d_model n_embd embed_dim embedding_size word_embed_proj_dim attention_hidden_size "
        "projection_dim hidden_dim encoder_hidden_size out_hidden_size text_hidden_size emb_dim adapter_in_dim adapter_out_dim",
    ),
    (
        INNER,
        "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner dff dim_ff "
        "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size intermediate_size_mlp "
        "expert_ffn_hidden_size feed_forward_size shared_experts_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    (
        WINDOW,
        "sliding_window sliding_window_size local_attention_window_len window_size index_topk attention_chunk_size",
    ),
    (VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        128,
        "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len model_max_length "
        "max_source_positions position_embedding_size",
    ),
    (1, "first_k_dense_replace n_shared_experts moe_layer_start_index"),
]
LIMITS = next(names for value, names in _FIELDS if value == WINDOW).split()
_VALUE_OF = {name: value for value, names in _FIELDS for name in names.split()}


def architectures() -> dict[str, type]:
    """The auto class of each model type: causal language models, and those that read images beside text."""
    text = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    return dict.fromkeys(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText) | text


# What else the sizes of a family have to agree with.
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_OWN = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": INNER, "moe_num_experts": EXPERTS, "hidden_size": HIDDEN},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 2 * HEAD_DIM},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM},
    "hunyuan_vl": {"text_config": {"head_dim": HEAD_DIM}},
    "jamba": {"attn_layer_offset": 1, "expert_layer_offset": 1, "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "full_attn_idxs": None},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"qk_head_dim": 2 * HEAD_DIM},
    "mistral4": {
        "rope_parameters": _ROPE
        | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8, "partial_rotary_factor": 1.0}
    },
    "mamba2": {"num_heads": 8, "head_dim": HEAD_DIM},
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"head_dim": HEAD_DIM, "num_key_value_heads": 2},
    "qwen4_exp_text": {"ngram_vocab_size_base": 50, "split_ngram_parts": 1, "ple_embed_dim": HIDDEN, "hc_lowrank": 8},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"] * 2, "attention_head_size": HEAD_DIM},
    "roc_bert": {"pronunciation_vocab_size": VOCAB, "shape_vocab_size": VOCAB},
    "xlm": {"n_langs": 1},
    "xmod": {"default_language": "en_XX"},
}
for _multimodal in "paddleocr_vl qwen2_vl qwen2_5_vl glm4v glm46v glm4v_moe glm_ocr glmga".split():
    _OWN[_multimodal] = {"text_config": {"rope_parameters": _ROPE | {"mrope_section": [1, 1, 2]}}}
_OWN["glm4v_moe"]["text_config"]["rope_parameters"] = _ROPE | {
    "mrope_section": [1, 0, 1],
    "partial_rotary_factor": 0.5,
}


def _kinds(values: list) -> list:
    """As many of a list, one for each layer, as there are layers, each kind of layer among them."""
    if all(isinstance(value, int) and value > INNER for value in values):
        return [INNER] * LAYERS
    kinds = list(dict.fromkeys(values))
    return [kinds[layer % len(kinds)] for layer in range(LAYERS)]


def _shrink(config: PreTrainedConfig) -> dict:
    fields, num_layers = {}, getattr(config, "num_hidden_layers", None)
    for name, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and name in _VALUE_OF:
            fields[name] = min(value, _VALUE_OF[name]) if value > 0 else value
        elif name.endswith("token_id") or name.endswith("token_index"):
            fields[name] = value % 7 if isinstance(value, int) else value
        elif name == "is_decoder":
            fields[name] = True
        elif isinstance(value, list) and len(value) == num_layers and not isinstance(value[0], list | dict):
            fields[name] = _kinds(value)
    if "kv_lora_rank" in fields:  # one latent for all heads
        fields["num_key_value_heads"] = HEADS
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = _shrink(part) | {"model_type": part.model_type}
    return fields


def _merge(fields: dict, own: dict) -> dict:
    for name, value in own.items():
        fields[name] = (
            _merge(fields.get(name, {}), value) if isinstance(value, dict) and name.endswith("_config") else value
        )
    return fields


def tiny_config(model_type: str, **fields) -> PreTrainedConfig:
    """The configuration of [`build`]."""
    own = _OWN.get(model_type, {}) | fields
    try:
        default = AutoConfig.for_model(model_type)
    except ValueError:  # of sizes that do not agree
        default = AutoConfig.for_model(model_type, **own)
    return AutoConfig.for_model(model_type, **_merge(_shrink(default), own))


def build(model_type: str, *, seed: int = 0, **kwargs) -> PreTrainedModel:
    """
    Build a tiny model of a type, in evaluation mode.

    Args:
        model_type (`str`):
            One of [`architectures`].
        seed (`int`, *optional*, defaults to `0`):
            Seed of the weights.
        **kwargs:
            `attn_implementation`, or fields of the configuration.

    Returns:
        [`~transformers.PreTrainedModel`]: The model, in float32.

    Raises:
        `Exception`: Of any kind, if the sizes do not agree or a package is missing.
    """
    attention = {name: kwargs.pop(name) for name in ("attn_implementation",) if name in kwargs}
    config, auto = tiny_config(model_type, **kwargs), architectures()[model_type]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise MemoryError(f"{size:,} parameters")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _randomize(auto.from_config(config, dtype=torch.float32, **attention), seed).eval()


def has_limits(config: PreTrainedConfig) -> bool:
    """Whether a token of the model sees so many others, in a window or of its choice, that a long text shows it alone."""
    return any(getattr(config.get_text_config(), name, None) for name in LIMITS)


@torch.no_grad()
def _randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw every weight and bias, so that none is the 0 or 1 that would hide a fault."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * (1.5 / max(parameter.shape[-1], 1) ** 0.5))
            else:
                parameter.copy_(parameter + 0.3 * noise)
    return model
