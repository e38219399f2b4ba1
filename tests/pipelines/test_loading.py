import json
import logging
import shutil
import sys

import diffusers
import pytest
import torch
import transformers

from vision_attn.pipelines import loading
from vision_attn.pipelines.loading import find_model, load_pipeline, run_defaults


def test_a_folder_is_loaded_as_a_stock_pipeline(tiny_flux_folder):
    pipe = load_pipeline(str(tiny_flux_folder), dtype=torch.bfloat16)
    assert type(pipe) is diffusers.FluxPipeline
    assert {part.dtype for part in (pipe.transformer, pipe.text_encoder)} == {torch.bfloat16}


def test_loading_leaves_the_libraries_logging_as_it_was(tiny_flux_folder):
    libraries = [diffusers.utils.logging, transformers.utils.logging]
    before = [library.get_verbosity() for library in libraries]
    libraries[0].set_verbosity(logging.INFO)
    try:
        load_pipeline(str(tiny_flux_folder))
        assert [library.get_verbosity() for library in libraries] == [logging.INFO, before[1]]
    finally:
        libraries[0].set_verbosity(before[0])


def test_run_defaults_come_from_the_folder(tmp_path, tiny_flux_folder):
    assert run_defaults(str(tiny_flux_folder))["num_inference_steps"] == 20
    (tmp_path / "model_index.json").write_text("{}")
    assert run_defaults(str(tmp_path)) == {}
    (tmp_path / "vision_attn.json").write_text(json.dumps({"height": 32}))
    assert run_defaults(str(tmp_path)) == {"height": 32}
    assert run_defaults("owner/name") == {}


def test_embedded_models_are_in_the_packages_assets(tmp_path, monkeypatch):
    folder = tmp_path / "assets" / "shapes-flux"
    folder.mkdir(parents=True)
    monkeypatch.setattr(loading.vision_attn, "__path__", [str(tmp_path)])
    with pytest.raises(FileNotFoundError, match="'shapes-flux' is not part of this installation"):
        find_model("shapes-flux")
    (folder / "model_index.json").write_text("{}")
    assert find_model("shapes-flux") == folder


@pytest.mark.parametrize("model", ["shapes-fulx", "./missing", "/missing/model", "a/b/c", "", "owner/", "~/missing"])
def test_neither_folder_nor_hub_id(model):
    with pytest.raises(FileNotFoundError, match=f"find_model: model must be one of shapes-flux, .*got '{model}'"):
        find_model(model)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a pipeline's folder, got .*holds no model_index\.json"):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize("content", ["[]", "{}", '"text"', "{", "{'a': 1}"])
def test_a_model_index_that_is_none(tmp_path, content):
    (tmp_path / "model_index.json").write_text(content)
    with pytest.raises(
        ValueError, match=r"(find_model|load_pipeline): .*model_index\.json must (be|hold) .*, got .+: "
    ):
        load_pipeline(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model_index.json", '{"_class_name": "NoSuchPipeline"}', "AttributeError: .*NoSuchPipeline"),
        ("tokenizer_2/tokenizer.json", "{}", "KeyError: "),
        ("vae/config.json", "[]", "[A-Z].*config"),
        ("transformer/diffusion_pytorch_model.safetensors", "no weights", "Unable to load weights"),
    ],
)
def test_a_broken_file_is_an_error_that_names_the_folder(tiny_flux_folder, tmp_path, file, content, reason):
    folder = tmp_path / "model"
    shutil.copytree(tiny_flux_folder, folder)
    assert (folder / file).is_file()
    (folder / file).write_text(content)
    message = f"load_pipeline: model '{folder}' could not be loaded: {reason}"
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_pipeline(str(folder))
    assert len(str(caught.value).splitlines()) == 1


def test_a_package_that_the_pipeline_needs_is_named(tiny_flux_folder, monkeypatch):
    def need(*args, **kwargs):
        raise ImportError("T5Tokenizer requires the sentencepiece library")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", need)
    with pytest.raises(ImportError, match=f"model '{tiny_flux_folder}' could not be loaded: .*sentencepiece library"):
        load_pipeline(str(tiny_flux_folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"find_model: .*vision_attn\.json must be a JSON file, got .*line 1"),
        ("[1]", r"find_model: .*vision_attn\.json must hold a JSON object, .*got \[1\]"),
        ('{"height": "64"}', r'run_defaults: height in .*vision_attn\.json must be a whole number, got "64"'),
        ('{"true_cfg_scale": []}', r"run_defaults: true_cfg_scale in .*vision_attn\.json must be a number, got \[\]"),
        ('{"prompt": 3}', r"run_defaults: prompt in .*vision_attn\.json must be text, got 3"),
    ],
)
def test_broken_run_defaults_name_their_file(tmp_path, content, message):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "vision_attn.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        run_defaults(str(tmp_path))


def test_a_hub_id_that_cannot_be_had():
    with pytest.raises(FileNotFoundError, match="load_pipeline: model 'nobody/nothing' could not be loaded: "):
        load_pipeline("nobody/nothing")


def test_missing_diffusers_says_what_to_install(tiny_flux_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'vision-attn\[diffusers\]'"):
        load_pipeline(str(tiny_flux_folder))
