"""What `transformers` says, as the specification of the engine's greedy output."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from springtide.core.store import ModelFiles
from springtide.engine.weights.gguf import GGUFFile


def llama_of(files: ModelFiles) -> LlamaForCausalLM:
    """A fresh transformers model, float32, with the weights of our GGUF reader."""
    file = GGUFFile(files.path)
    shape = file.config
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        max_position_embeddings=shape.context_length,
        rms_norm_eps=shape.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=shape.tie_word_embeddings,
    )
    weights = {name: torch.empty(size) for name, size in file.shapes.items()}
    for name, tensor in weights.items():
        file.read(name, tensor)
    model = LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    return model


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: list[int], num_tokens: int) -> list[int]:
    """The tokens that `generate` gives, its cache included."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return output[0, len(prompt) :].tolist()


@torch.inference_mode()
def greedy_after(model: LlamaForCausalLM, prompt: list[int], answer: list[int]) -> list[int]:
    """The greedy token after the prompt and after each token of `answer` but the last: equal to `answer` just
    if that is the greedy answer. One pass over all, where generating takes one for each token."""
    ids = torch.tensor([prompt + answer[:-1]])
    logits = model(ids, logits_to_keep=len(answer)).logits
    return logits[0].argmax(dim=-1).tolist()
