"""PyTorch transformers' models of a case's shape, with our weights copied into them.

Imports PyTorch and transformers, which requirements/peers.txt pins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from flax import traverse_util

from benchmarks.train_step_cases import Case
from t5like.models.config import ModelConfig


class Electra(torch.nn.Module):
    """A generator that reads the discriminator's embeddings, and predicts with them."""

    def __init__(self, generator: torch.nn.Module, discriminator: torch.nn.Module):
        super().__init__()
        self.discriminator, self.generator = discriminator, generator
        generator.electra.embeddings = discriminator.electra.embeddings
        generator.generator_lm_head.weight = generator.electra.embeddings.word_embeddings.weight

    def forward(self, inputs, targets, labels, chosen, temperature: float) -> torch.Tensor:
        """The total loss, 50 times the discriminator's counted in.

        Args:
          inputs, targets, labels: int [B, L]; labels are -100 where there is no loss.
          chosen: int [N], the drawn positions in the flattened batch.
          temperature: of the samples; 0 takes the likeliest token.
        """
        drafted = self.generator(inputs, labels=labels)
        scores = drafted.logits.detach().flatten(0, 1)[chosen]
        if temperature:
            noise = torch.rand_like(scores).log_().neg_().log_()  # minus a Gumbel draw
            scores = scores / temperature - noise
        tokens = targets.flatten().index_put((chosen,), scores.argmax(-1)).view_as(targets)
        detected = self.discriminator(tokens, labels=(tokens != targets).long())
        return drafted.loss + 50.0 * detected.loss


def peer_model(case: Case, params: Mapping[str, Any], attention: str) -> torch.nn.Module:
    """transformers' model with our weights; attention is its "eager" or "sdpa"."""
    config = case.config
    if case.name == "T5":
        model = transformers.T5ForConditionalGeneration(t5_config(config, attention))
        # Version 5 ties the output layer whatever the config says.
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    elif case.name == "Llama":
        model = transformers.LlamaForCausalLM(llama_config(config, attention))
    elif case.name == "BERT":
        model = transformers.BertForMaskedLM(bert_config("Bert", config, attention))
    else:
        small = case.bound.network(config).generator_config
        model = Electra(
            transformers.ElectraForMaskedLM(bert_config("Electra", small, attention)),
            transformers.ElectraForPreTraining(bert_config("Electra", config, attention)),
        )
    copy_weights(case.name, params, model)
    return model


def t5_config(config: ModelConfig, attention: str) -> transformers.T5Config:
    return transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.head_dim,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu",
        layer_norm_epsilon=config.norm_epsilon,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,  # so that the states are not scaled
        attn_implementation=attention,
    )


def llama_config(config: ModelConfig, attention: str) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=False,
        attn_implementation=attention,
    )


def bert_config(family: str, config: ModelConfig, attention: str) -> Any:
    """Of family "Bert" or "Electra"."""
    width = {"embedding_size": config.embedding_width} if family == "Electra" else {}
    return getattr(transformers, f"{family}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_length,
        layer_norm_eps=config.norm_epsilon,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation=attention,
        **width,
    )


# Our name of a parameter -> transformers', by these substitutions one after the other.
_ENDS = ((r"/(kernel|scale|embedding)$", "/weight"), ("/", "."))
_BERT = (
    ("model/token_embedder", "model/embeddings/word_embeddings"),
    ("encoder/(position|token_type)_embedder", r"embeddings/\1_embeddings"),
    ("encoder/embedding_norm", "embeddings/LayerNorm"),
    ("encoder/projection", "embeddings_project"),
    ("layers_", "layer/"),
    ("self_attention_norm", "attention/output/LayerNorm"),
    ("self_attention/out", "attention/output/dense"),
    ("self_attention", "attention/self"),
    ("mlp_norm", "output/LayerNorm"),
    ("mlp/wi", "intermediate/dense"),
    ("mlp/wo", "output/dense"),
)
NAMES = {
    "T5": (
        ("model/token_embedder", "shared"),
        ("model/head", "lm_head"),
        ("model/", ""),
        ("final_norm", "final_layer_norm"),
        ("relative_bias", "layers_0/self_attention/relative_attention_bias"),
        ("layers_", "block/"),
        (r"self_attention(\w*)/", r"layer/0/SelfAttention\1/"),
        (r"cross_attention(\w*)/", r"layer/1/EncDecAttention\1/"),
        (r"encoder(.*)mlp(\w*)/", r"encoder\1layer/1/DenseReluDense\2/"),
        (r"decoder(.*)mlp(\w*)/", r"decoder\1layer/2/DenseReluDense\2/"),
        (r"[A-Z]\w+_norm/", "layer_norm/"),
        (r"/(query|key|value|out)/", lambda found: f"/{found[1][0]}/"),
        *_ENDS,
    ),
    "Llama": (
        ("model/token_embedder", "model/embed_tokens"),
        ("model/head", "lm_head"),
        ("model/decoder", "model"),
        ("final_norm", "norm"),
        ("layers_", "layers/"),
        ("self_attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        ("self_attention", "self_attn"),
        (r"/(query|key|value|out)/", lambda found: f"/{found[1][0]}_proj/"),
        ("wi_0", "gate_proj"),
        ("wi_1", "up_proj"),
        ("wo", "down_proj"),
        *_ENDS,
    ),
    "BERT": (
        *_BERT,
        ("model/head/bias", "cls/predictions/bias"),
        ("model/head/transform", "cls/predictions/transform/dense"),
        ("model/head/norm", "cls/predictions/transform/LayerNorm"),
        ("^model", "bert"),
        *_ENDS,
    ),
    "ELECTRA": (
        *_BERT,
        ("generator/head/bias", "generator/generator_lm_head/bias"),
        ("generator/head/transform", "generator/generator_predictions/dense"),
        ("generator/head/norm", "generator/generator_predictions/LayerNorm"),
        ("discriminator_head/transform", "discriminator/discriminator_predictions/dense"),
        ("discriminator_head", "discriminator/discriminator_predictions/dense_prediction"),
        ("^model", "discriminator/electra"),
        ("^generator/(e)", r"generator/electra/\1"),
        *_ENDS,
    ),
}


def copy_weights(name: str, params: Mapping[str, Any], model: torch.nn.Module) -> None:
    """Puts our parameters into the peer `name`; ValueError unless each has its place."""
    places = dict(model.named_parameters())
    for path, value in traverse_util.flatten_dict(params, sep="/").items():
        place = path
        for pattern, replacement in NAMES[name]:
            place = re.sub(pattern, replacement, place)
        if place not in places:
            raise ValueError(f"{path} has no place {place} in {type(model).__name__}")
        value = np.asarray(value)
        value = value.T if path.endswith("kernel") else value  # PyTorch's are [out, in]
        with torch.no_grad():
            # A whole new storage: our buffers are donated to the step.
            places.pop(place).copy_(torch.from_numpy(np.array(value)))
    if places:
        raise ValueError(f"no weights for {', '.join(places)}")
