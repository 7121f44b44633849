"""What Llama and its relatives call the tensors of a block in transformers' files, by the names that marlin has for them."""

OF_BLOCK = {
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "ffn.gate_proj": "mlp.gate_proj",
    "ffn.up_proj": "mlp.up_proj",
    "ffn.down_proj": "mlp.down_proj",
}
NORMS_OF_BLOCK = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
