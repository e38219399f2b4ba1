"""Training: exact continuation, the loss, the schedules."""

from __future__ import annotations

import dataclasses
import math
from functools import partialmethod
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from vision_attn.shapes.model import build_pipeline
from vision_attn.shapes.train import FluxConfig, FluxTrainer, flow_shift, main, sample_batch
from vision_attn.shapes.trainer import Trainer, build_optimizers, load_shipped, train

TINY = FluxConfig(steps=2, tokens_per_step=340, warmup_steps=1, precision="float32")


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.parameters] + trainer.average


# torch's own remark on norms under autocast: they take the slower kernel.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_continued_run_ends_bit_for_bit_like_an_unbroken_one(tmp_path: Path, precision: str) -> None:
    config = dataclasses.replace(TINY, precision=precision)
    whole = FluxTrainer(build_pipeline(0), config)
    losses = [whole.train_step() for _ in range(2)]
    broken = FluxTrainer(build_pipeline(0), config)
    assert broken.train_step() == losses[0]
    broken.save(tmp_path / "checkpoint.pt")
    continued = FluxTrainer(build_pipeline(9), config)
    train(continued, tmp_path, score_every=0)
    assert continued.step == 2
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(continued), strict=True))
    assert not any(path.suffix == ".tmp" for path in tmp_path.iterdir())


def test_training_moves_every_kind_of_weight() -> None:
    trainer = FluxTrainer(build_pipeline(0), dataclasses.replace(TINY, steps=4))
    before = {name: value.detach().clone() for name, value in trainer.modules.named_parameters()}
    for _ in range(3):
        trainer.train_step()
    for block in trainer.pipeline.text_encoder_2.encoder.block:  # attention by position stays what it is
        assert not block.layer[0].SelfAttention.q.weight.any()
    after = dict(trainer.modules.named_parameters())
    for name in (
        "transformer.x_embedder.weight",
        "transformer.proj_out.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.weight",
        "text_encoder_2.shared.weight",
    ):
        assert not torch.equal(before[name], after[name]), name


def test_every_weight_has_one_optimizer() -> None:
    trainer = FluxTrainer(build_pipeline(0), TINY)
    muon, adamw = trainer.optimizers
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    given = [id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
    queries = [id(block.layer[0].SelfAttention.q.weight) for block in trainer.pipeline.text_encoder_2.encoder.block]
    assert sorted(given + queries) == sorted(id(p) for p in trainer.modules.parameters())
    matrix = trainer.pipeline.transformer.single_transformer_blocks[0].attn.to_q.weight
    assert id(matrix) in {id(p) for p in muon.param_groups[0]["params"]}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo looks
def test_compiled_blocks_train_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = FluxTransformer2DModel.compile_repeated_blocks
    # Inductor takes minutes on one thread.
    monkeypatch.setattr(FluxTransformer2DModel, "compile_repeated_blocks", partialmethod(stock, backend="aot_eager"))
    eager, compiled = FluxTrainer(build_pipeline(0), TINY), FluxTrainer(build_pipeline(0), TINY, compiled=True)
    for _ in range(2):  # the second loss has seen the gradients of the first step
        assert compiled.train_step() == pytest.approx(eager.train_step(), rel=1e-4)


def test_the_loss_of_an_untrained_model_is_the_size_of_its_target() -> None:
    trainer = FluxTrainer(build_pipeline(0), TINY)
    batch = sample_batch(trainer.pipeline, TINY, 0)
    # The untrained output is zero, so the loss is the mean square of noise - latents with the first draw as noise.
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))
    expected = (noise - batch.latents).square().mean()
    loss = trainer.loss(batch, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss.detach(), expected)


def test_batches_depend_on_seed_and_step_alone_and_keep_the_token_budget() -> None:
    pipeline = build_pipeline(0)
    config = FluxConfig(steps=100, tokens_per_step=1000)
    one, two = sample_batch(pipeline, config, 7), sample_batch(pipeline, config, 7)
    assert one.captions == two.captions
    assert torch.equal(one.latents, two.latents)
    grids = set()
    empty = total = 0
    for step in range(60, 100):
        batch = sample_batch(pipeline, config, step)
        grids.add(batch.grid)
        count, tokens, channels = batch.latents.shape
        assert (tokens, channels) == (math.prod(batch.grid), 12)
        assert count == 1 or count * (tokens + 24) <= 1000
        empty, total = empty + batch.captions.count(""), total + count
    assert len(grids) >= 4
    assert 0.02 < empty / total < 0.25


def test_latents_are_about_standard_normal() -> None:
    pipeline = build_pipeline(0)
    latents = torch.cat([sample_batch(pipeline, FluxConfig(), step).latents.flatten() for step in range(4)])
    assert abs(float(latents.mean())) < 0.15
    assert 0.8 < float(latents.std()) < 1.2


def test_schedules() -> None:
    config = FluxConfig(steps=1000, warmup_steps=100, learning_rate=1e-3)
    rates = np.array([config.learning_rate_at(step) for step in range(1001)])
    assert rates[0] == pytest.approx(1e-5)
    assert rates.argmax() in (99, 100)
    assert rates[550] == pytest.approx(5e-4, rel=0.01)
    assert rates[1000] == 0
    assert config.curriculum_at(250) == 0.25
    assert dataclasses.replace(config, curriculum_start=1.0).curriculum_at(10) == 1
    assert flow_shift(144) == 3
    assert flow_shift(144 * 16) == pytest.approx(6)


def test_a_shipped_model_can_be_trained_further(tiny_flux_folder: Path, tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--init-from", str(tiny_flux_folder), "--steps", "1", "--score-every", "0"]
    main([*arguments, "--tokens-per-step", "168", "--precision", "float32"])
    trained, shipped = build_pipeline(1), build_pipeline(2)
    load_shipped(trained, tmp_path / "model", FluxTrainer.models)
    load_shipped(shipped, tiny_flux_folder, FluxTrainer.models)
    assert trained.transformer.dtype == torch.float32
    pairs = zip(trained.transformer.parameters(), shipped.transformer.parameters(), strict=True)
    assert max(float((a - b).detach().abs().max()) for a, b in pairs) > 0


def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ImportError, match=r"build_optimizers: torch must be 2\.9 or newer for torch\.optim\.Muon, got"):
        build_optimizers(torch.nn.Linear(2, 2), [], 1e-3)


def test_bad_input_is_refused(tmp_path: Path) -> None:
    for name, value, text in [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("precision", "float16", "precision must be 'float32' or 'bfloat16', got 'float16'"),
        ("tokens_per_step", 100, "tokens_per_step must be at least 168, got 100"),
    ]:
        with pytest.raises(ValueError, match=f"FluxConfig: {text}"):
            dataclasses.replace(TINY, **{name: value})
    with pytest.raises(FileNotFoundError, match=r"load_shipped: directory must hold model_index\.json, got"):
        load_shipped(build_pipeline(0), tmp_path, FluxTrainer.models)
    FluxTrainer(build_pipeline(0), TINY).save(tmp_path / "checkpoint.pt")
    other = FluxTrainer(build_pipeline(0), dataclasses.replace(TINY, seed=3))
    with pytest.raises(ValueError, match=r"Trainer\.load: seed must be 0 as in the checkpoint, got 3"):
        other.load(tmp_path / "checkpoint.pt")
