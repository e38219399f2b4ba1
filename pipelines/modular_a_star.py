"""A-STAR as a block of diffusers' modular pipelines.

The method has a patent of its own, see `a_star`.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.modular_pipelines import ComponentSpec, InputParam, ModularPipelineBlocks, OutputParam
from transformers import CLIPTokenizer

from vision_attn.pipelines.denoiser_unet import UNetDenoiser, require_latents_alone
from vision_attn.pipelines.moves import Moves, Settings, one_per_prompt

_REFUSED = ("prompt_2", "controlnet_cond", "ip_adapter_embeds", "timestep_cond")


class AStarStep(ModularPipelineBlocks):
    """Moves the latents of modular SDXL before each denoising step.

    It comes first in the denoising loop. Text-to-image, image-to-image and inpainting are served, the last with a UNet
    of the text-to-image kind. The pipeline has a further input, `concepts`, and further outputs, `losses` and `maps`,
    all as of `AStarPipeline`.

    Args:
        settings: As of `AStarCallback`.

    Raises:
        TypeError: an unknown setting.
        NotImplementedError: in a run, what the UNet sees besides the latents and the prompt: a ControlNet, an
            IP-Adapter, a guidance scale, a mask, a second prompt; a scheduler that goes back to latents of its own.
        ValueError: in a run, concepts that the prompt does not have.

    Example:
        ```
        blocks = diffusers.StableDiffusionXLAutoBlocks().get_workflow("text2image")
        blocks.sub_blocks["denoise.denoise"].sub_blocks.insert("a_star", AStarStep(), 0)
        pipe = blocks.init_pipeline("stabilityai/stable-diffusion-xl-base-1.0")
        pipe.load_components()
        image = pipe(prompt="a cat and a dog", output="images")[0]
        ```
    """

    model_name = "stable-diffusion-xl"

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self._settings = Settings(**settings)
        self._moves: Moves | None = None

    @property
    def description(self) -> str:
        """What diffusers prints."""
        return "Moves the latents so that the attention maps of the prompt's concepts do not overlap (A-STAR)."

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """What is read of the pipeline beside its scheduler, which the loop has."""
        return [ComponentSpec("unet", UNet2DConditionModel), ComponentSpec("tokenizer", CLIPTokenizer)]

    @property
    def inputs(self) -> list[InputParam]:
        """What is read of the state, beside what the loop and its denoiser read."""
        return [
            InputParam("prompt", required=True),
            InputParam("prompt_2"),
            InputParam("concepts"),
            InputParam("latents", required=True, type_hint=torch.Tensor),
        ]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """What is left in the state."""
        return [OutputParam("losses", type_hint=list), OutputParam("maps", type_hint=list)]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        """Move `block_state.latents` before step `i`."""
        if i == 0:
            self._moves = self._begin(components, block_state)
        assert self._moves is not None
        block_state.latents = self._moves.before(i, block_state.latents)
        block_state.losses, block_state.maps = self._moves.losses, self._moves.maps
        return components, block_state

    def _begin(self, components: Any, state: Any) -> Moves:
        for name in _REFUSED:
            if getattr(state, name, None) is not None:
                raise NotImplementedError(
                    f"AStarStep: {name} must be left out, maps depend on it in ways not known here"
                )
        require_latents_alone("AStarStep", components)
        prompts, concepts = one_per_prompt("AStarStep", state.prompt, state.concepts)
        denoiser = UNetDenoiser(
            components,
            prompts,
            images=len(state.latents) // len(prompts),
            height=1,
            width=1,
            steps=len(state.timesteps),
        )
        denoiser.timesteps = state.timesteps
        denoiser.condition = {
            "encoder_hidden_states": state.prompt_embeds,
            "added_cond_kwargs": {"text_embeds": state.pooled_prompt_embeds, "time_ids": state.add_time_ids},
            "cross_attention_kwargs": state.cross_attention_kwargs,
        }
        return Moves("AStarStep", denoiser, concepts, self._settings)
