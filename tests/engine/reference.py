"""What `transformers` says, as the specification of the engine's greedy output."""

from __future__ import annotations

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from springtide.core.store import ModelFiles
from springtide.engine.models.config import ModelConfig
from springtide.engine.models.registry import open_checkpoint


def llama_of(files: ModelFiles) -> PreTrainedModel:
    """A fresh transformers model, float32, with the weights of our GGUF reader."""
    shape = open_checkpoint(files).config
    rope = shape.layers[0].rope
    assert rope is not None and rope.scaling is None
    return _filled(
        LlamaForCausalLM(
            LlamaConfig(
                **_sizes(shape),
                rope_parameters={"rope_type": "default", "rope_theta": rope.theta},
            )
        ),
        files,
    )


def gemma_of(files: ModelFiles) -> PreTrainedModel:
    """As `llama_of`."""
    shape = open_checkpoint(files).config
    ropes = {layer.window is None: layer.rope for layer in shape.layers}
    return _filled(
        Gemma3ForCausalLM(
            Gemma3TextConfig(
                **_sizes(shape),
                query_pre_attn_scalar=round((shape.attention_scale or 1.0) ** -2),
                sliding_window=next(layer.window for layer in shape.layers if layer.window),
                layer_types=["sliding_attention" if layer.window else "full_attention" for layer in shape.layers],
                rope_parameters={
                    kind: {"rope_type": "default", "rope_theta": rope.theta if (rope := ropes[everywhere]) else None}
                    for kind, everywhere in (("sliding_attention", False), ("full_attention", True))
                },
            )
        ),
        files,
    )


def _sizes(shape: ModelConfig) -> dict[str, object]:
    return {
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.context_length,
        "rms_norm_eps": shape.norm_eps,
        "tie_word_embeddings": shape.tie_word_embeddings,
    }


def _filled(model: PreTrainedModel, files: ModelFiles) -> PreTrainedModel:
    reader = open_checkpoint(files).reader
    weights = {name: torch.empty(size) for name, size in reader.shapes.items()}
    for name, tensor in weights.items():
        reader.read(name, tensor)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    return model.eval()


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """The tokens that `generate` gives, its cache included."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def greedy_after(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> list[int]:
    """The greedy token after the prompt and after each token of `answer` but the last: equal to `answer` just
    if that is the greedy answer. One pass over all, where generating takes one for each token."""
    ids = torch.tensor([prompt + answer[:-1]])
    logits = model(ids, logits_to_keep=len(answer)).logits
    return logits[0].argmax(dim=-1).tolist()
