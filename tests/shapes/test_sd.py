"""shapes-sd: architecture, the text encoder's start, training, export, evaluation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from vision_attn.shapes.evaluate_sd import evaluate_split, main, markdown
from vision_attn.shapes.leakage import measure_leakage
from vision_attn.shapes.model_sd import build_sd_pipeline
from vision_attn.shapes.scenes import parse_caption
from vision_attn.shapes.splits import has_held_out_pair
from vision_attn.shapes.train_sd import SDConfig, SDTrainer, sample_sd_batch, training_scene
from vision_attn.shapes.train_sd import main as train_main
from vision_attn.shapes.trainer import train

TINY = SDConfig(steps=2, pictures=2, warmup_steps=1, precision="float32")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return build_sd_pipeline(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny-sd"
    SDTrainer(build_sd_pipeline(0), TINY).export(path)
    return path


def test_an_exported_model_is_a_stock_pipeline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    classes = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderTiny,
        "text_encoder": CLIPTextModel,
        "tokenizer": CLIPTokenizer,
        "scheduler": DDIMScheduler,
    }
    for name, kind in classes.items():
        assert type(getattr(pipe, name)) is kind
    assert pipe.vae_scale_factor == 2
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 25_000_000
    settings = json.loads((folder / "vision_attn.json").read_text())
    settings.pop("guidance")
    pipe.set_progress_bar_config(disable=True)
    settings |= {"height": 48, "width": 64, "num_inference_steps": 2, "output_type": "np"}
    first, second = (pipe(**settings, generator=torch.Generator().manual_seed(4)).images for _ in range(2))
    assert first.shape == (1, 48, 64, 3)
    np.testing.assert_array_equal(first, second)


def test_cross_attention_is_at_the_half_and_the_quarter(pipeline: StableDiffusionPipeline) -> None:
    sizes = []
    attention = [module for name, module in pipeline.unet.named_modules() if name.endswith("attn2")]
    handles = [
        module.to_q.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1])) for module in attention
    ]
    pipeline.unet(torch.randn(1, 3, 32, 32), 5, torch.randn(1, 24, 128))
    for handle in handles:
        handle.remove()
    assert sorted(sizes) == [64] * 4 + [256] * 3


def test_two_heads_start_as_copies_of_the_words_before(pipeline: StableDiffusionPipeline) -> None:
    text = getattr(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    attention = text.encoder.layers[0].self_attn
    ids = torch.tensor([pipeline.tokenizer("a red circle and a blue square").input_ids])
    hidden = text.encoder.layers[0].layer_norm1(text.embeddings(input_ids=ids))
    query, key = (getattr(attention, name)(hidden).unflatten(-1, (4, 32))[0] for name in ("q_proj", "k_proj"))
    scores = torch.einsum("qhd,khd->hqk", query, key) / 32**0.5
    for head, distance in ((0, 1), (1, 2)):
        for position in range(distance, ids.shape[1]):
            shares = scores[head, position, : position + 1].softmax(0)
            assert shares[position - distance] > 0.99


def test_the_encoder_is_causal(pipeline: StableDiffusionPipeline) -> None:
    ids = [
        pipeline.tokenizer(text).input_ids for text in ("a red circle and a blue star", "a red circle and a red star")
    ]
    with torch.no_grad():
        one, other = (pipeline.text_encoder(torch.tensor([each]))[0][0] for each in ids)
    torch.testing.assert_close(one[:6], other[:6], rtol=0, atol=1e-6)
    assert (one[7] - other[7]).abs().max() > 0.1  # the star holds its color


def test_a_continued_run_ends_bit_for_bit_like_an_unbroken_one(tmp_path: Path) -> None:
    whole = SDTrainer(build_sd_pipeline(0), TINY)
    losses = [whole.train_step() for _ in range(2)]
    broken = SDTrainer(build_sd_pipeline(0), TINY)
    assert broken.train_step() == losses[0]
    broken.save(tmp_path / "checkpoint.pt")
    continued = SDTrainer(build_sd_pipeline(9), TINY)
    train(continued, tmp_path, score_every=0)
    pairs = zip([*whole.parameters, *whole.average], [*continued.parameters, *continued.average], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert (tmp_path / "model" / "model_index.json").is_file()


def test_the_target_is_the_velocity(pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = SDTrainer(build_sd_pipeline(0), TINY)
    batch = sample_sd_batch(trainer.pipeline, TINY, 0)
    seen = {}

    def forward(noisy: torch.Tensor, times: torch.Tensor, text: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        seen.update(noisy=noisy, times=times)
        return (torch.zeros_like(noisy),)

    monkeypatch.setattr(trainer.pipeline.unet, "forward", forward)
    loss = trainer.loss(batch, torch.Generator().manual_seed(3))
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(3))
    # alpha and sigma of the schedule by its definition: betas are the square of a line between roots.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[seen["times"]].sqrt()[:, None, None, None]
    sigma = (1 - alpha**2).sqrt()
    torch.testing.assert_close(seen["noisy"].double(), alpha * batch.latents + sigma * noise, rtol=1e-4, atol=1e-4)
    expected = (alpha * noise - sigma * batch.latents).square().mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)


def test_batches_hold_no_held_out_pair_and_depend_on_seed_and_step_alone(pipeline: StableDiffusionPipeline) -> None:
    config = SDConfig(steps=100, pictures=9)
    one, two = sample_sd_batch(pipeline, config, 7), sample_sd_batch(pipeline, config, 7)
    assert one.captions == two.captions
    assert torch.equal(one.latents, two.latents)
    assert one.latents.shape == (16, 3, 24, 24)
    assert sample_sd_batch(pipeline, config, 70).latents.shape == (9, 3, 32, 32)
    counts = []
    for step in range(20, 40):
        for caption in sample_sd_batch(pipeline, config, step).captions:
            if caption:
                spec = parse_caption(caption)
                assert not has_held_out_pair(spec)
                counts.append(len(spec.objects))
    assert set(counts) == {1, 2}
    assert 0.1 < counts.count(1) / len(counts) < 0.3
    assert not has_held_out_pair(training_scene((0, 0, 3), 64, "two").spec)


def test_training_moves_the_unet_and_the_text_encoder() -> None:
    trainer = SDTrainer(build_sd_pipeline(0), dataclasses.replace(TINY, steps=4))
    before = {name: value.detach().clone() for name, value in trainer.modules.named_parameters()}
    for _ in range(2):
        trainer.train_step()
    moved = {name for name, value in trainer.modules.named_parameters() if not torch.equal(before[name], value)}
    assert {name.split(".")[0] for name in moved} == {"unet", "text_encoder"}
    assert len(moved) > 0.95 * len(before)


def test_a_model_is_scored_and_gets_its_card(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = tmp_path / "scores.json"
    settings = json.loads((folder / "vision_attn.json").read_text())
    (folder / "vision_attn.json").write_text(json.dumps(settings | {"num_inference_steps": 1}))
    main([str(folder), "--captions", "2", "--card", "--json", str(scores)])
    rows = json.loads(scores.read_text())
    assert [row["split"] for row in rows] == ["one", "two", "new pair", "three"]
    assert all(row["pictures"] == 2 and 0 <= row["objects"] <= row["colors"] <= 1 for row in rows)
    card = (folder / "README.md").read_text()
    assert "| three objects, of which training shows none | 2 |" in card
    assert "with 1 DDIM steps" in card
    assert card in (folder / "README.md").read_text()
    for part in capsys.readouterr().out.strip().split("\n\n"):
        assert part in card


def test_scores_do_not_depend_on_the_batch(pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_attn.shapes import evaluate_sd

    captions = ["a red circle", "a blue star and a red square", "a green square"]
    whole = evaluate_sd.draw(pipeline, captions, 48, 2, 4.0)
    monkeypatch.setattr(evaluate_sd, "_BATCH", 2)
    for one, other in zip(whole, evaluate_sd.draw(pipeline, captions, 48, 2, 4.0), strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_bad_input_is_refused(tmp_path: Path, pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="SDConfig: pictures must be at least 1, got 0"):
        SDConfig(pictures=0)
    with pytest.raises(ValueError, match="SDConfig: steps must be at least 1, got 0"):
        SDConfig(steps=0)
    with pytest.raises(FileNotFoundError, match=r"load_shipped: directory must hold model_index\.json, got"):
        train_main(["--out", str(tmp_path / "run"), "--init-from", str(tmp_path)])
    with pytest.raises(ValueError, match="split must be one of"):
        evaluate_split(pipeline, "none", 1)


@pytest.mark.parametrize("leak", [0.0, 0.5])
def test_leakage_of_an_encoder_that_sums_words(
    pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, leak: float
) -> None:
    def encode(ids: torch.Tensor) -> tuple[torch.Tensor]:
        """A token is its word and the one before it, which is the color, and a share of the circle's color."""
        words = torch.nn.functional.one_hot(ids, len(pipeline.tokenizer)).double()
        return (words + words.roll(1, 1) + leak * words.roll(5, 1),)

    monkeypatch.setattr(pipeline, "text_encoder", encode)
    # Unit vectors, at right angles but where both colors are the same one of six.
    different, same = (2 + leak**2) ** 0.5, (1 + (1 + leak) ** 2) ** 0.5
    inverse_length = (5 / different + 1 / same) / 6
    leakage = measure_leakage(pipeline)
    assert leakage.other == pytest.approx(2**0.5 * leak * inverse_length)
    assert leakage.own == pytest.approx(2**0.5 * inverse_length)
    assert leakage.alone == pytest.approx(2**0.5 * leak * inverse_length)  # of padding, alone


def test_the_table_is_markdown(pipeline: StableDiffusionPipeline) -> None:
    row = evaluate_split(pipeline, "two", 1, 48, 1)
    assert markdown([row]).splitlines()[2].startswith("| two objects of seen pairs | 1 | ")
