"""What is known of the keys of `config.json`: spellings, limits, and which change the result."""

from typing import Any

SPELLINGS: dict[str, tuple[str, ...]] = {
    "hidden_size": ("n_embd", "n_embed"),
    "num_hidden_layers": ("n_layer", "num_layers"),
    "num_attention_heads": ("n_head", "num_heads"),
    "intermediate_size": ("n_inner", "ffn_dim"),
    "max_position_embeddings": ("n_positions",),
    "hidden_act": ("activation_function",),
    "norm_eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"),
    "num_experts": ("num_local_experts",),
    "rope_theta": ("rotary_emb_base",),
    "partial_rotary_factor": ("rotary_pct",),
    "dtype": ("torch_dtype",),
    "sliding_window_pattern": ("_sliding_window_pattern",),
}
"""Older names of a key."""

LIMITS: dict[str, int] = {
    "vocab_size": 2**24,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "rotary_dim": 2**14,
    "num_experts": 2**12,
    "num_experts_per_tok": 2**12,
    "moe_intermediate_size": 2**22,
}
"""Largest value of an integer key, far above any model; other keys go to 2**31 - 1."""

ACTIVATIONS: dict[str, str] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "linear": "identity",
}
"""Hugging Face's activation names to the engine's."""

ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor"),
}
"""Keys that a rope type reads."""

CHANGES_RESULT: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "alibi": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "attention_chunk_size": (None,),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "attn_temperature_tuning": (False, None),
    "clip_qkv": (None,),
    "do_layer_norm_before": (True, None),
    "embedding_multiplier": (1.0, None),
    "final_logit_softcapping": (None,),
    "first_k_dense_replace": (0, None),
    "hidden_act": (None,),
    "is_encoder_decoder": (False, None),
    "layer_types": (None,),
    "logit_scale": (1.0, None),
    "logits_scaling": (1.0, None),
    "no_rope_layers": (None,),
    "norm_eps": (None,),
    "num_experts": (None,),
    "partial_rotary_factor": (1.0, None),
    "position_embedding_type": ("rope", "absolute", None),
    "q_lora_rank": (None,),
    "qk_layernorm": (False, None),
    "query_pre_attn_scalar": (None,),
    "_remove_final_layer_norm": (False, None),
    "residual_multiplier": (1.0, None),
    "rope_parameters": (None,),
    "rope_scaling": (None,),
    "scale_attn_by_inverse_layer_idx": (False, None),
    "scale_attn_weights": (True, None),
    "sliding_window": (None,),
    "swiglu_limit": (None,),
    "text_config": (None,),
    "use_bidirectional_attention": (False, None),
    "use_mrope": (False, None),
    "use_parallel_residual": (False, None),
    "use_qk_norm": (False, None),
    "use_sliding_window": (False, None),
    "vision_config": (None,),
    "word_embed_proj_dim": (None,),
}
"""Keys that change what a model computes, with the values at which they do nothing."""

IRRELEVANT: frozenset[str] = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path activation_dropout
    architectures attention_bias attention_dropout attention_out_bias
    attention_probs_dropout_prob attention_softmax_in_fp32 attn_pdrop auto_map bad_words_ids
    begin_suppress_tokens bias bias_dropout_fusion bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout classifier_dropout_prob
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dropout dtype
    early_stopping embd_pdrop embed_dropout embedding_dropout enable_bias
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id gradient_checkpointing hidden_dropout
    hidden_dropout_prob id2label init_std initializer_range is_decoder label2id
    layer_norm_elementwise_affine layerdrop length_penalty masked_softmax_fusion max_length
    max_window_layers min_length mlp_bias mlp_type model_type n_ctx no_repeat_ngram_size
    norm_type num_beam_groups num_beams num_return_sequences offset_alibi output_attentions
    output_hidden_states output_past output_router_logits output_scores pad_token_id prefix
    pretraining_tp problem_type pruned_heads quantization_config remove_invalid_values
    reorder_and_upcast_attn repetition_penalty resid_dropout resid_pdrop residual_dropout
    return_dict return_dict_in_generate rotary router_aux_loss_coef router_jitter_noise
    sep_token_id seq_length skip_bias_add skip_bias_add_qkv slow_but_exact summary_activation
    summary_first_dropout summary_proj_to_labels summary_type summary_use_proj suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torchscript transformers_version type_vocab_size typical_p
    unk_token_id use_bfloat16 use_bias use_cache use_qkv_bias
    """.split()  # noqa: SIM905 (a list would be a page long)
)
"""Keys that do not: training, tokens, generation, what the tensors tell (biases, tying)."""
