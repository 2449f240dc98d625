"""Name maps with integers as weights: instant, and readable as documentation."""

from __future__ import annotations

import pytest

from inranker_jax.checkpoints import name_maps
from inranker_jax.models import abstract_params, trees
from tests.models.reference import VARIANTS, config_of, torch_model


def renamed(config, tensors):
    """Our tree, with the numbers that stand for the tensors of another checkpoint."""
    sources = name_maps.expand(name_maps.HUGGINGFACE, config)
    return trees.unflatten({ours: tensors[source.name] for ours, source in sources.items()})


def test_huggingface_v1_0_encoder_layer():
    config = config_of("v1.0", num_layers=1, num_decoder_layers=1)
    block = "encoder.block.0.layer"
    tensors = dict.fromkeys((s.name for s in name_maps.expand(name_maps.HUGGINGFACE, config).values()), 0)
    tensors |= {
        f"{block}.0.layer_norm.weight": 1,
        f"{block}.0.SelfAttention.q.weight": 2,
        f"{block}.0.SelfAttention.k.weight": 3,
        f"{block}.0.SelfAttention.v.weight": 4,
        f"{block}.0.SelfAttention.o.weight": 5,
        f"{block}.1.layer_norm.weight": 6,
        f"{block}.1.DenseReluDense.wi.weight": 7,
        f"{block}.1.DenseReluDense.wo.weight": 8,
        f"{block}.0.SelfAttention.relative_attention_bias.weight": 9,
        "encoder.final_layer_norm.weight": 10,
        "shared.weight": 11,
    }
    tree = renamed(config, tensors)
    assert tree["token_embedder"] == {"embedding": 11}
    assert tree["encoder"] == {
        "relpos_bias": {"rel_embedding": 9},
        "encoder_norm": {"scale": 10},
        "layers_0": {
            "pre_attention_layer_norm": {"scale": 1},
            "attention": {
                "query": {"kernel": 2},
                "key": {"kernel": 3},
                "value": {"kernel": 4},
                "out": {"kernel": 5},
            },
            "pre_mlp_layer_norm": {"scale": 6},
            "mlp": {"wi": {"kernel": 7}, "wo": {"kernel": 8}},
        },
    }


def test_huggingface_v1_1_decoder_layer():
    config = config_of("v1.1", num_layers=1, num_decoder_layers=2)
    block = "decoder.block.1.layer"
    tensors = dict.fromkeys((s.name for s in name_maps.expand(name_maps.HUGGINGFACE, config).values()), 0)
    tensors |= {
        f"{block}.0.layer_norm.weight": 1,
        f"{block}.0.SelfAttention.q.weight": 2,
        f"{block}.0.SelfAttention.k.weight": 3,
        f"{block}.0.SelfAttention.v.weight": 4,
        f"{block}.0.SelfAttention.o.weight": 5,
        f"{block}.1.layer_norm.weight": 6,
        f"{block}.1.EncDecAttention.q.weight": 7,
        f"{block}.1.EncDecAttention.k.weight": 8,
        f"{block}.1.EncDecAttention.v.weight": 9,
        f"{block}.1.EncDecAttention.o.weight": 10,
        f"{block}.2.layer_norm.weight": 11,
        f"{block}.2.DenseReluDense.wi_0.weight": 12,
        f"{block}.2.DenseReluDense.wi_1.weight": 13,
        f"{block}.2.DenseReluDense.wo.weight": 14,
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": 15,
        "decoder.final_layer_norm.weight": 16,
        "lm_head.weight": 17,
    }
    decoder = renamed(config, tensors)["decoder"]
    assert decoder["relpos_bias"] == {"rel_embedding": 15}
    assert decoder["decoder_norm"] == {"scale": 16}
    assert decoder["logits_dense"] == {"kernel": 17}
    assert decoder["layers_1"] == {
        "pre_self_attention_layer_norm": {"scale": 1},
        "self_attention": {
            "query": {"kernel": 2},
            "key": {"kernel": 3},
            "value": {"kernel": 4},
            "out": {"kernel": 5},
        },
        "pre_cross_attention_layer_norm": {"scale": 6},
        "encoder_decoder_attention": {
            "query": {"kernel": 7},
            "key": {"kernel": 8},
            "value": {"kernel": 9},
            "out": {"kernel": 10},
        },
        "pre_mlp_layer_norm": {"scale": 11},
        "mlp": {"wi_0": {"kernel": 12}, "wi_1": {"kernel": 13}, "wo": {"kernel": 14}},
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_one_source_of_its_shape(variant):
    config = config_of(variant)
    sources = name_maps.expand(name_maps.HUGGINGFACE, config)
    wanted = trees.flatten(abstract_params(config))
    assert sources.keys() == wanted.keys()
    stored = {name: tuple(p.shape) for name, p in torch_model(config).named_parameters()}
    assert {source.name for source in sources.values()} == stored.keys()
    for path, source in sources.items():
        shape = tuple(reversed(wanted[path].shape)) if source.transpose else wanted[path].shape
        assert stored[source.name] == shape, path
