"""Architectures that are known and cannot be taken, with the reason."""

_LATENT = "multi-head latent attention: keys and values pass through a norm of their own"
_RECURRENT = "its layers mix attention with a recurrent or linear-attention state"
_STATE = "it is a state-space or recurrent model without attention blocks"

REFUSED = {
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "minicpm3"), _LATENT
    ),
    **dict.fromkeys(
        (
            "bamba",
            "falcon_h1",
            "granitemoehybrid",
            "jamba",
            "lfm2",
            "minimax",
            "nemotron_h",
            "qwen3_5_text",
            "qwen3_next",
            "recurrent_gemma",
            "zamba",
            "zamba2",
        ),
        _RECURRENT,
    ),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv"), _STATE),
}
