"""Reading and writing `config.json`, and what it must not accept."""

from __future__ import annotations

import dataclasses

import pytest

from inranker_jax.errors import InputError
from inranker_jax.models import Compute, T5Config
from tests.models.reference import SIZES, VARIANTS, config_of

T5_SMALL = {
    "model_type": "t5",
    "architectures": ["T5ForConditionalGeneration"],
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "n_positions": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "task_specific_params": {"summarization": {"num_beams": 4}},
}


def test_t5_small_is_read_with_the_defaults_of_its_time():
    config = T5Config.from_hf_dict(T5_SMALL)
    assert config.num_decoder_layers == 6
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (True, True)
    assert (config.gated, config.activation) == (False, "relu")
    assert config.num_params == 60_506_624  # the published count


@pytest.mark.parametrize(
    ("fields", "tied", "scaled"),
    [
        ({"tie_word_embeddings": False}, False, False),
        ({"tie_word_embeddings": True}, True, True),
        ({"tie_word_embeddings": True, "scale_decoder_outputs": False}, True, False),
        ({"tie_word_embeddings": False, "scale_decoder_outputs": True}, False, True),
        ({"model_type": "mt5"}, False, False),
        ({"model_type": "mt5", "tie_word_embeddings": True}, True, False),
    ],
)
def test_tying_and_scaling_are_kept_apart(fields, tied, scaled):
    config = T5Config.from_hf_dict(T5_SMALL | fields)
    assert (config.tie_word_embeddings, config.scale_decoder_outputs) == (tied, scaled)


def test_gated_gelu_means_the_tanh_form():
    assert config_of("v1.1").activation == "gelu_new"
    assert dataclasses.replace(config_of("v1.1"), feed_forward_proj="gelu").activation == "gelu"


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip(variant):
    config = config_of(variant, dropout_rate=0.25, initializer_factor=0.5, decoder_start_token_id=3)
    assert T5Config.from_hf_dict(config.to_hf_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "umt5"}, "model_type is 'umt5'.*t5, mt5"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"d_kv": None}, "has no d_kv"),
        ({"d_model": 0}, "d_model is 0"),
        ({"num_heads": 2.5}, "num_heads is 2.5"),
        ({"feed_forward_proj": "gated-gelo"}, "feed_forward_proj is 'gelo'.*Did you mean 'gelu'"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
        ({"relative_attention_num_buckets": 30}, "num_buckets is 30.*multiple of 4"),
        ({"relative_attention_max_distance": 8}, "max_distance is 8"),
        ({"decoder_start_token_id": 40000}, "decoder_start_token_id is 40000"),
    ],
)
def test_what_cannot_be_a_t5_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        T5Config.from_hf_dict(T5_SMALL | changes)


def test_unknown_compute_is_refused():
    with pytest.raises(InputError, match=r"Compute.dtype is 'bfloat61'.*Did you mean 'bfloat16'"):
        Compute(dtype="bfloat61")
    with pytest.raises(InputError, match=r"Compute.remat is 'all'.*none, full, dots"):
        Compute(remat="all")


def test_settings_are_hashable_so_that_jit_can_key_on_them():
    assert hash(config_of("v1.0")) == hash(T5Config(**SIZES, **VARIANTS["v1.0"]))
    assert hash(Compute()) == hash(Compute("float32", "none"))
