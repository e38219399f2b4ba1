import json
import logging
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


def test_a_hub_id_that_cannot_be_had():
    with pytest.raises(FileNotFoundError, match="load_pipeline: model 'nobody/nothing' could not be loaded: "):
        load_pipeline("nobody/nothing")


def test_missing_diffusers_says_what_to_install(tiny_flux_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'vision-attn\[diffusers\]'"):
        load_pipeline(str(tiny_flux_folder))
