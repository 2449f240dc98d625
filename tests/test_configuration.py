"""Command lines and gin files: every shipped file parses, and mistakes are named."""

from __future__ import annotations

import argparse
import inspect
import pathlib

import gin
import pytest

from inranker_jax import configuration, paths
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
    with pytest.raises(
        InputError, match=r"(?s)losses.normalised_logit_mse.*Did you mean 'losses.normalized_logit_mse'"
    ):
        parse(bindings=["train.loss = @losses.normalised_logit_mse"])
    with pytest.raises(InputError, match="inner quotes"):
        parse("runs/inranker_60m_phase1.gin", bindings=["MODEL_DIR=somewhere"])
    message = r"^--gin\.BATCHSIZE: no gin file has a macro of that name. Did you mean 'BATCH_SIZE'"
    with pytest.raises(InputError, match=message):
        parse("runs/inranker_60m_phase1.gin", MODEL_DIR="x", bindings=["BATCHSIZE=3"])
    with pytest.raises(InputError, match=r"expected --gin\.NAME=VALUE"):
        configuration.split_gin_flags(["--gin.TRAIN_STEPS"])


def written(folder, text, name="mine.gin"):
    path = folder / name
    path.write_text(text)
    return str(path)


def refused(*files, bindings=(), **more):
    with pytest.raises(InputError) as caught:
        configuration.parse_gin(files, bindings, **more)
    return str(caught.value)


def test_a_misspelt_macro_in_a_file_is_named_with_its_line(tmp_path):
    text = 'include "small_synth.gin"\nTRAIN_STEPS = 5\nDROPUT_RATE = 0.1\n'
    mine = written(tmp_path, text)
    message = refused(mine)
    assert message.startswith(
        f"{mine}:3: nothing refers to the macro DROPUT_RATE, so it sets nothing. Did you mean 'DROPOUT_RATE'? "
        "Correct the name, take the line out, or refer to it: FUNCTION.ARGUMENT = %DROPUT_RATE. Macros in use: "
    )
    assert "TRAIN_STEPS" in message
    outer = written(tmp_path, f'include "{mine}"\nTRAIN_STEPS = 6\n', "outer.gin")
    assert refused(outer).startswith(f"{mine}:3: "), "in an included file"
    value = "{\n    'inputs': 3,\n}"
    longer = written(tmp_path, f'include "small_synth.gin"\nTASK_LENGTHS = {value}\nNEVER = 1\n')
    assert refused(longer).startswith(f"{longer}:2: nothing refers to the macro TASK_LENGTHS,")


@pytest.mark.parametrize(
    "text",
    [
        "train.log_every = %MINE\nMINE = 3",
        "MINE = 3\ntrain.lengths = (\n    48,\n    %MINE,\n)",
        "MINE = 3\nTASK_FEATURE_LENGTHS = {'inputs': [%MINE]}",
        "MINE = 3\nBATCH_SIZE = %MINE",
        "a/MINE = 3\nBATCH_SIZE = %a/MINE",
        "a = 3\nBATCH_SIZE = %a/MINE",
        "MINE/macro.value = 3\nBATCH_SIZE = @MINE/macro()",
        "MINE = 3\ntrain:\n    log_every = %MINE\n    lengths = (48, 64)",
        "MINE = 3\ntrain.log_every = %MINE\ntrain.log_every = 7",
        "FSDP = 4\nTENSOR = 2\nSLICES = 2",
    ],
)
def test_macros_that_something_refers_to_or_that_a_shipped_file_has_are_accepted(tmp_path, text):
    configuration.parse_gin([written(tmp_path, f'include "small_synth.gin"\n{text}\n')])


def test_a_macro_may_be_referred_to_from_another_file_or_the_command_line(tmp_path):
    mine = written(tmp_path, 'include "small_synth.gin"\nMINE = 3\n')
    user = written(tmp_path, "train.log_every = %MINE\n", "user.gin")
    configuration.parse_gin([mine, user])
    configuration.parse_gin([mine], ["train.log_every=%MINE"])
    assert "MINE" in refused(mine)
    scoped = written(tmp_path, 'include "small_synth.gin"\na/MINE = 3\nBATCH_SIZE = %b/MINE\nb/MINE = 4\n')
    assert refused(scoped).startswith(f"{scoped}:2: nothing refers to the macro a/MINE,")


def test_every_shipped_file_parses_alone_and_with_each_mesh():
    everything = sorted(GIN.rglob("*.gin"))
    macros = {"MODEL_DIR": "x", "INITIAL_CHECKPOINT_PATH": "y"}
    for path in everything:
        text = path.read_text()
        for mesh in [None, *GIN.glob("meshes/*.gin")] if path.parent.name == "runs" else [None]:
            needed = {name: value for name, value in macros.items() if "distil" in text or "runs/" in text}
            if path.stem in ("distil", "human_hard", "phase1_human_soft", "phase2_synthetic_soft", "adapt"):
                needed |= {"MIXTURE_OR_TASK_NAME": "t", "MIXTURE_OR_TASK_MODULE": "m", "TRAIN_STEPS": 2}
            if path.stem == "distil":
                needed |= macros
            configuration.parse_gin([str(path), *([str(mesh)] if mesh else [])], macros=needed)


def test_a_value_without_its_quotes_is_named_as_it_was_typed(tmp_path):
    assert refused("gin/small_synth.gin", bindings=["TRAIN_STEPS=5", "BATCH_SIZE=abc"]) == (
        "--gin.BATCH_SIZE=abc: abc is not a value. Expected a Python literal (a number, True, False, None, a quoted "
        "string, or a list, tuple or dict of these), @FUNCTION or %MACRO. A string needs inner quotes: "
        "--gin.BATCH_SIZE='\"abc\"'."
    )
    bindings = {
        "DTYPE=": "nothing is not a value. Expected a Python literal",
        "BATCH_SIZE=8 9": "8 9 is not a value. Expected",
        "train.lengths=(1,2": "(1,2 is not a value. Expected",
        "USE_CACHED_TASKS=true": "Did you mean 'True'?",
        "MODEL_DIR=gs://a/b": """--gin.MODEL_DIR='"gs://a/b"'.""",
        "train.-x=3": "'train.-x' is not a name. Expected --gin.NAME=VALUE",
    }
    for binding, expected in bindings.items():
        message = refused("gin/small_synth.gin", bindings=[binding])
        assert message.startswith(f"--gin.{binding}: ")
        assert expected in message
        assert "0x" not in message
    texts = {
        "\nDTYPE = float32\n": ":2: float32 is not a value. Expected a Python literal (a number, True, False, None, a "
        'quoted string, or a list, tuple or dict of these), @FUNCTION or %MACRO. A string needs quotes: "float32".',
        "DTYPE =\n": ":1: Unable to parse value: DTYPE =. Expected a Python literal",
        "\n\nDTYPE\n": ":3: Couldn't parse statement",
        "train.lengths = (1,\n": ": a bracket or a string is not closed",
    }
    for text, expected in texts.items():
        path = written(tmp_path, text)
        outer = written(tmp_path, f'include "{path}"\n', "outer.gin")
        for file in (path, outer):
            assert refused(file).startswith(f"{path}{expected}")


def test_a_wrong_parameter_is_suggested_and_quotes_are_not(tmp_path):
    assert refused("gin/small_synth.gin", bindings=["train.log_evry=5"]) == (
        "--gin.train.log_evry=5: Configurable 'train' doesn't have a parameter named 'log_evry'. "
        "Did you mean 'log_every'?"
    )
    names = ("evaluation.Settings", "evaluation.load_reranker", "packing.Layout")
    message = refused("gin/eval_beir.gin", bindings=["evaluation.Settings.depht=5"], names=names)
    assert message.startswith("--gin.evaluation.Settings.depht=5: ")
    assert message.endswith("Did you mean 'depth'?")
    assert "Parameters: accumulation, " in refused("gin/small_synth.gin", bindings=["train.qq=5"])
    path = written(tmp_path, "\ntrain.lengths = (\n  3,\n)\nmodels.T5Config.d_modl = 3\n")
    assert refused(path) == (
        f"{path}:5: Configurable 'models.T5Config' doesn't have a parameter named 'd_modl'. Did you mean 'd_model'?"
    )
    assert refused(bindings=["trian.log_every=5"]).endswith("'trian'. Did you mean 'train'?")
    assert refused(bindings=["constant.value=5"]).startswith("--gin.constant.value=5: Ambiguous selector")


def test_a_missing_gin_file_has_a_suggestion_only_when_one_is_close(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, meant in {
        "gin/models/t5_smal.gin": "gin/models/t5_small.gin",
        "models/t5_smal.gin": "models/t5_small.gin",
        "t5_smal.gin": "gin/models/t5_small.gin",
        "mehses/fsdp.gin": "gin/meshes/fsdp.gin",
        "small_synt": "small_synth.gin",
    }.items():
        assert refused(name) == f"no gin file {name!r}. Did you mean {meant!r}?"
    meshes = ", ".join(sorted(path.name for path in GIN.glob("meshes/*.gin")))
    assert refused("meshes/nosuch.gin") == f"no gin file 'meshes/nosuch.gin'. Gin files in meshes: {meshes}."
    assert "Shipped files: gin/eval_beir.gin, " in refused("no/nosuch.gin")
    written(tmp_path, "", "recipe.gin")
    assert refused("recipy.gin") == "no gin file 'recipy.gin'. Did you mean 'recipe.gin'?"


def test_a_missing_include_is_named_with_its_line(tmp_path):
    mine = written(tmp_path, '# mine\ninclude "meshes/fsdp_tenser.gin"\n')
    missing = f"{mine}:2: no gin file 'meshes/fsdp_tenser.gin'. Did you mean 'meshes/fsdp_tensor.gin'?"
    assert refused(mine) == missing
    assert refused(written(tmp_path, f'include "{mine}"\n', "outer.gin")) == missing
    circle = written(tmp_path, f'include "{tmp_path}/circle.gin"\n', "circle.gin")
    assert refused(circle).startswith(f"{circle}:1: '{circle}' includes itself.")
    (tmp_path / "latin.gin").write_bytes(b'DTYPE = "\xe9"\n')
    assert (
        refused(f"{tmp_path}/latin.gin") == f"{tmp_path}/latin.gin: not text in UTF-8. Expected a gin file."
    )


def test_places_in_a_bucket_are_named_by_their_address(tmp_path, monkeypatch):
    bucket = {
        "gs://bkt/mine.gin": 'include "small_synth.gin"\ninclude "rates.gin"\n',
        "gs://bkt/rates.gin": "\nLEARNING_RAT = 3\n",
        "gs://bkt/wrong.gin": "\n\ntrain.log_evry = 3\n",
        "gs://bkt/value.gin": "DTYPE = float32\n",
    }
    copies = {
        name: written(tmp_path, text, f"{number}.gin") for number, (name, text) in enumerate(bucket.items())
    }
    monkeypatch.setattr(paths, "local_copy", lambda path: copies.get(path, path))
    monkeypatch.setattr(
        configuration, "_is_file", lambda path: path in copies or pathlib.Path(path).is_file()
    )
    in_bucket = {"search_paths": ["gs://bkt"]}
    assert refused("gs://bkt/mine.gin", **in_bucket).startswith(
        "gs://bkt/rates.gin:2: nothing refers to the macro LEARNING_RAT, so it sets nothing. "
        "Did you mean 'LEARNING_RATE'?"
    )
    assert refused("wrong.gin", **in_bucket).startswith("gs://bkt/wrong.gin:3: Configurable 'train' doesn't")
    assert refused("gs://bkt/value.gin").startswith("gs://bkt/value.gin:1: float32 is not a value.")


def test_the_effective_configuration_of_a_run_is_a_gin_file(tmp_path):
    parse("runs/inranker_60m_phase1.gin", MODEL_DIR="x")
    text = configuration.effective_config()
    configuration.parse_gin([written(tmp_path, text, "config.gin")])
    assert configuration.effective_config() == text


def test_a_macro_of_t5x_without_a_meaning_is_named_with_its_line(tmp_path):
    path = written(tmp_path, 'include "small_synth.gin"\nZ_LOSS = 0.1\n')
    assert refused(path).startswith(f"{path}:2: Z_LOSS is T5X's and does nothing here")


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
