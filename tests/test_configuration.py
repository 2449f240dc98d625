"""Command lines and gin files: every shipped file parses, and mistakes are named."""

from __future__ import annotations

import argparse
import inspect
import pathlib

import gin
import pytest

from inranker_jax import configuration
from inranker_jax.errors import InputError
from inranker_jax.models import T5Config

GIN = configuration.shipped_gin_folder()
RUNS = sorted(str(path.relative_to(GIN)) for path in GIN.glob("runs/inranker_*_phase?.gin")) + sorted(
    str(path.relative_to(GIN)) for path in GIN.glob("runs/monot5_*_hard.gin")
)
SIZES = {"60m": 60e6, "220m": 220e6, "740m": 740e6, "3b": 2.85e9}


@pytest.fixture(autouse=True)
def _train_binary():
    from inranker_jax import train

    gin.clear_config()
    with gin.unlock_config():
        try:
            gin.get_configurable("train")
        except ValueError:
            gin.external_configurable(train.train, "train", module="inranker_jax")
    yield
    gin.clear_config()


def bound(parameter):
    return gin.query_parameter(f"train.{parameter}")


def parse(*files, bindings=(), **macros):
    configuration.parse_gin([f"gin/{name}" for name in files], bindings, macros=macros)


def test_all_sizes_and_phases_are_there():
    expected = {f"runs/inranker_{size}_phase{phase}.gin" for size in SIZES for phase in (1, 2)}
    expected |= {f"runs/monot5_{size}_human_hard.gin" for size in SIZES}
    assert expected <= set(RUNS)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_file_opens_with_command_cost_and_expectation_and_parses(name):
    lines = (GIN / name).read_text().splitlines()
    assert lines[0].startswith(f"# Command:  python -m inranker_jax.train --gin_file=gin/{name}")
    assert lines[1].startswith("# Cost:")
    assert lines[2].startswith("# Expected:")
    if "INITIAL_CHECKPOINT_PATH = %gin.REQUIRED" in lines:
        with pytest.raises(InputError, match="INITIAL_CHECKPOINT_PATH"):
            parse(name, MODEL_DIR="x")
    parse(name, MODEL_DIR="x", INITIAL_CHECKPOINT_PATH="y")
    size = next(size for size in SIZES if f"_{size}" in name)
    config = gin.get_configurable("models.T5Config")()
    assert isinstance(config, T5Config)
    assert config.num_params == pytest.approx(SIZES[size], rel=0.06)


@pytest.mark.parametrize("path", sorted(GIN.glob("models/*.gin")), ids=lambda path: path.stem)
def test_every_model_file_gives_an_architecture_of_the_stated_size(path):
    parse(f"models/{path.name}")
    config = gin.get_configurable("models.T5Config")()
    first = path.read_text().splitlines()[0]
    stated = first.split(" parameters")[0].split()[-1]
    number = float(stated[:-1]) * {"M": 1e6, "B": 1e9}[stated[-1]]
    assert config.num_params == pytest.approx(number, rel=0.06)


@pytest.mark.parametrize(
    "path", sorted([*GIN.glob("losses/*.gin"), *GIN.glob("meshes/*.gin")]), ids=lambda p: p.stem
)
def test_every_loss_and_mesh_file_parses(path):
    configuration.parse_gin([str(path)])
    parameter = "loss" if path.parent.name == "losses" else "mesh"
    assert bound(parameter) is not None


def test_the_shared_run_file_binds_only_arguments_of_train():
    from inranker_jax.train import train

    text = "".join(path.read_text() for path in GIN.rglob("*.gin"))
    names = {
        line.split("=")[0].strip().removeprefix("train.")
        for line in text.splitlines()
        if line.startswith("train.")
    }
    assert names
    assert names <= set(inspect.signature(train).parameters)


def test_a_flag_wins_over_the_file_and_a_binding_over_the_flag():
    parse("runs/inranker_60m_phase1.gin", MODEL_DIR="flag", bindings=["BATCH_SIZE=64"])
    assert gin.query_parameter("BATCH_SIZE/gin.macro.value") == 64
    assert gin.query_parameter("MODEL_DIR/gin.macro.value") == "flag"
    parse("runs/inranker_60m_phase1.gin", MODEL_DIR="flag", bindings=['MODEL_DIR="binding"'])
    assert gin.query_parameter("MODEL_DIR/gin.macro.value") == "binding"


def test_required_values_are_named_with_their_flags():
    with pytest.raises(InputError, match=r"MODEL_DIR.*--output_dir=DIR"):
        parse("runs/inranker_60m_phase1.gin")


def test_shipped_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pathlib.Path(configuration.find_gin_file("gin/models/t5_small.gin")).is_file()
    assert pathlib.Path(configuration.find_gin_file("models/t5_small.gin")).is_file()
    (tmp_path / "mine.gin").write_text('include "models/t5_base.gin"\nmodels.T5Config.d_ff = 64\n')
    configuration.parse_gin(["mine.gin"])
    assert gin.get_configurable("models.T5Config")().d_ff == 64


def test_a_folder_of_the_users_called_runs_is_in_nobodys_way(tmp_path, monkeypatch):
    for name in ("runs", "models", "losses", "meshes", "gin"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    parse("small_synth.gin")
    assert bound("total_steps") is not None


def test_mistakes_are_named():
    with pytest.raises(InputError, match=r"no gin file .*Did you mean 'models/t5_small.gin'"):
        parse("models/t5_smal.gin")
    with pytest.raises(
        InputError, match=r"(?s)losses.normalised_logit_mse.*Did you mean 'losses.normalized_logit_mse'"
    ):
        parse(bindings=["train.loss = @losses.normalised_logit_mse"])
    with pytest.raises(InputError, match="doesn't have a parameter named 'batchsize'"):
        parse(bindings=["train.batchsize = 3"])
    with pytest.raises(InputError, match="inner quotes"):
        parse("runs/inranker_60m_phase1.gin", bindings=["MODEL_DIR=somewhere"])
    with pytest.raises(InputError, match=r"no gin file has a macro of that name. Did you mean 'BATCH_SIZE'"):
        parse("runs/inranker_60m_phase1.gin", MODEL_DIR="x", bindings=["BATCHSIZE=3"])
    with pytest.raises(InputError, match=r"expected --gin\.NAME=VALUE"):
        configuration.split_gin_flags(["--gin.TRAIN_STEPS"])


def test_flags_are_split_from_bindings():
    bindings, rest = configuration.split_gin_flags(["--gin.TRAIN_STEPS=10", "--gin_file=a", "--gin_file=b"])
    parser = argparse.ArgumentParser()
    configuration.add_gin_flags(parser)
    assert bindings == ["TRAIN_STEPS=10"]
    assert parser.parse_args([*rest, "--gin_search_paths=x,y"]).gin_file == ["a", "b"]
    assert parser.parse_args(["--gin_search_paths=x,y"]).gin_search_paths == ["x", "y"]


def test_a_run_goes_on_with_any_shipped_mesh_and_with_what_saves_memory():
    recipe = "runs/inranker_3b_phase2.gin"

    def deciding(files, bindings=()):
        configuration.parse_gin(files, ['MODEL_DIR="x"', *bindings])
        return configuration.deciding_bindings()

    expected = deciding([recipe])
    assert "LEARNING_RATE" in expected
    for mesh in sorted((configuration.shipped_gin_folder() / "meshes").glob("*.gin")):
        assert deciding([recipe, f"meshes/{mesh.name}"]) == expected, mesh.name
    assert deciding([recipe, "meshes/slices_fsdp.gin"], ["SLICES=4"]) == expected
    assert deciding([recipe, "meshes/fsdp_tensor.gin"], ["TENSOR=4"]) == expected
    free = ('REMAT="none"', "models.Compute.scan=False", "packing.Layout.tokens_per_call=512")
    assert deciding([recipe], [*free, "train.accumulation=4"]) == expected
    assert deciding([recipe], ["LEARNING_RATE=1.0"]) != expected
    assert deciding([recipe], ['models.Compute.gradients="bfloat16"']) != expected


def test_the_effective_configuration_parses_to_itself():
    parse("runs/inranker_60m_phase1.gin", MODEL_DIR="x")
    text = configuration.effective_config()
    gin.clear_config()
    gin.parse_config(text)
    assert configuration.effective_config() == text
