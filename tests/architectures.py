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
MAX_PARAMETERS = 8_000_000
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
        "encoder_attention_heads_kv num_selects attn_layer_period expert_layer_period hc_count hc_mult",
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
        "projection_dim hidden_dim encoder_hidden_size",
    ),
    (
        INNER,
        "intermediate_size moe_intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim d_ff n_inner dff dim_ff "
        "shared_expert_intermediate_size shared_intermediate_size ffn_hidden_size intermediate_size_mlp "
        "shared_experts_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size",
    ),
    (EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_routed_experts"),
    (WINDOW, "sliding_window sliding_window_size local_attention_window_len window_size"),
    (VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (
        128,
        "max_position_embeddings n_positions n_ctx max_target_positions max_seq_len model_max_length "
        "max_source_positions position_embedding_size",
    ),
    (1, "first_k_dense_replace n_shared_experts moe_layer_start_index"),
]
_VALUE_OF = {name: value for value, names in _FIELDS for name in names.split()}


def architectures() -> dict[str, type]:
    """The auto class of each model type: causal language models, and those that read images beside text."""
    text = dict.fromkeys(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AutoModelForCausalLM)
    return dict.fromkeys(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, AutoModelForImageTextToText) | text


# What a family's own sizes have to agree with beside.
_OWN = {}


def _shrink(config: PreTrainedConfig) -> dict:
    fields = {}
    for name, value in config.to_dict().items():
        if isinstance(value, int) and not isinstance(value, bool) and name in _VALUE_OF:
            fields[name] = min(value, _VALUE_OF[name]) if value > 0 else value
        elif name.endswith("token_id") or name.endswith("token_index"):
            fields[name] = None if value is None else (value % 7 if isinstance(value, int) else value)
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            fields[name] = _shrink(part) | {"model_type": part.model_type}
    return fields


def tiny_config(model_type: str) -> PreTrainedConfig:
    fields = _shrink(AutoConfig.for_model(model_type))
    return AutoConfig.for_model(model_type, **fields | _OWN.get(model_type, {}))


def build(model_type: str, *, seed: int = 0, **kwargs) -> PreTrainedModel:
    config, auto = tiny_config(model_type), architectures()[model_type]
    with torch.device("meta"):
        size = sum(p.numel() for p in auto.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise MemoryError(f"{size:,} parameters")
    model = auto.from_config(config, dtype=torch.float32, **kwargs)
    return randomize(model, seed)


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
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
