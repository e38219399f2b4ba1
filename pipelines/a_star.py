"""A-STAR and its siblings around a stock pipeline: latents that make attention tell concepts apart.

Methods have licences and patents of their own: A-STAR is the subject of US 12,633,000 B2. Whether to use it is the
user's decision.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from vision_attn.guidance.latents import MapLoss
from vision_attn.pipelines.denoisers import denoiser_class
from vision_attn.pipelines.guided import GuidedPipeline, require_arguments
from vision_attn.pipelines.moves import Moves, Settings, one_per_prompt
from vision_attn.pipelines.structured import StructuredDiffusionPipeline

_REFUSED = (
    "prompt_embeds", "prompt_2", "prompt_3", "timesteps", "sigmas", "denoising_end", "ip_adapter_image",
    "ip_adapter_image_embeds", "negative_ip_adapter_image", "negative_ip_adapter_image_embeds",
)  # fmt: skip


class AStarPipeline(GuidedPipeline):
    """A stock pipeline of SD 1, SD 2, SDXL, SD3 or FLUX.1 that keeps the concepts of a prompt apart while it draws.

    Before a denoising step the latents move down the gradient of a loss of the attention maps: concepts should not
    overlap, and should stay where they were. It costs one more forward and its backward pass, up to the last layer
    whose maps are needed: half of SD 1.5's work, three quarters of SDXL's, all of a transformer's.

    Maps of SD3 and FLUX are shared among the words of the prompt, as the image attends to them in joint attention; a
    word of SD3 has the mean of its tokens of CLIP and of T5. The paper knows cross-attention alone. All layers count,
    as in SAGA's maps of SD3: with one prompt for the embedded FLUX, at half of the run, the mean of all of them matched
    what was drawn better than that of its joint blocks alone (correlation .89 and .90, not .67 and .57).
    `layers="transformer_blocks.*"` takes these, the first third of FLUX.1, for about a third of the cost. Activations
    of a transformer are large: `pipe.transformer.enable_gradient_checkpointing()` keeps fewer of them.

    Of UniPC the corrector rests in steps whose latents were moved: it begins again at latents of its own, and of a move
    early in 50 steps a seventh was left. What DPM++ 2M, DEIS and UniPC remember is older than a move, which they take
    for a trend in part and carry 5 to 17 % too far (noise predictions held fixed), as a larger step size would.

    A `StructuredDiffusionPipeline` may be guided, with the phrases, mode and strength that it was made with: latents
    are moved and denoised by its text.

    Args:
        pipe: The stock pipeline, text-to-image, or a structured one around it.

    Raises:
        NotImplementedError: another pipeline, a UNet distilled to a few steps (it takes its guidance scale as a
            condition; FLUX.1-dev does so too, with steps enough), a model with a cache of steps. Transformers distilled
            to a few steps cannot be told from others: four steps of FLUX.1-schnell leave two moves.

    Source: arXiv 2306.14544; the losses of Attend-and-Excite (arXiv 2301.13826) and of your own as well.
    """

    def __init__(self, pipe: Any) -> None:
        structured = pipe if isinstance(pipe, StructuredDiffusionPipeline) else None
        stock = pipe if structured is None else structured.pipe
        denoiser_class("AStarPipeline", stock)
        super().__init__(stock)
        self.__dict__["structured"] = structured

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        concepts: Any = None,
        phrases: Any = None,
        loss: str | MapLoss = "a-star",
        step_size: float = 20.0,
        share: float = 0.5,
        refine: Mapping[int, float] | None = None,
        iterations: int = 20,
        threshold: float = 0.5,
        mode: str = "relative",
        layers: str | Sequence[str] | None = None,
        resolution: tuple[int, int] | None = None,
        return_maps: bool = False,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        num_images_per_prompt: int = 1,
        generator: Any = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **options: Any,
    ) -> Any:
        """Draw as the stock pipeline does.

        Args:
            prompt: One or several.
            concepts: Texts, offsets or `Phrase`s of the prompt, or lists of token positions; None for its noun phrases
                without their determiners. For several prompts one list per prompt.
            phrases: Of a structured pipeline, as of its call.
            loss: `"a-star"`, `"attend-and-excite"`, or a function of the maps `[n, Y, X]` of a sample and the masks of
                the step before (None in the first).
            step_size: Factor on the gradient in the first step, see `step_sizes`; 0 draws what the stock pipeline
                draws. Gradient and move are those of what the model sees, so that a size means the same under DDIM and
                under Euler, whose latents are larger.
            share: Share of the steps before which latents move; 1 is the paper's.
            refine: Steps and a loss each: before such a step an image whose loss is above moves again and again.
                Attend-and-Excite's, for its loss and 50 steps, is `{0: 0.95, 10: 0.5, 20: 0.2}`; A-STAR has none.
            iterations: Of these further moves, at most.
            threshold: Of the masks, see `binarize`.
            mode: Of the masks, see `binarize`.
            layers: Whose maps count, see `AttentionCapture`.
            resolution: Of the maps; None for a quarter of the latents', or for the tokens of a transformer.
            return_maps: Whether to keep the maps of the last step, before which the model is run once more if latents
                do not move there.
            height: Pixels.
            width: Pixels.
            num_inference_steps: Denoising steps; None for as many as the stock pipeline takes.
            num_images_per_prompt: Images of each prompt.
            generator: As of the stock pipeline.
            latents: Noise to begin with, as of the stock pipeline.
            callback_on_step_end: As of the stock pipeline; it sees the moved latents.
            callback_on_step_end_tensor_inputs: As of the stock pipeline.
            options: Further arguments of the stock pipeline.

        Returns:
            The stock pipeline's output. Unless it is a tuple, its attribute `losses` lists, per step, the loss of each
            image, and with `return_maps` its attribute `maps` holds for each image the concepts and their maps `[Y, X]`
            in the last step, as `concept_sheet(output.images[0], output.maps[0])` draws them. The progress bar tells
            the mean loss.

        Raises:
            TypeError: an unknown argument, phrases without a structured pipeline, text that is given as embeddings or
                as a second prompt, timesteps of your own, an IP-Adapter; maps in a tuple.
            NotImplementedError: a scheduler that goes back to latents of its own (PNDM, Heun, KDPM2, single-step
                DPM-Solver, SA-Solver).
            ValueError: concepts that the prompt does not have, or a prompt without any.
        """
        for name in _REFUSED:
            if options.get(name) is not None:
                raise TypeError(f"AStarPipeline: {name} must be left out")
        require_arguments("AStarPipeline", self.pipe, options)
        if return_maps and options.get("return_dict") is False:
            raise TypeError(
                "AStarPipeline: return_dict must be left out with return_maps, a tuple has no place for maps"
            )
        prompts, each = one_per_prompt("AStarPipeline", prompt, concepts)
        denoiser = denoiser_class("AStarPipeline", self.pipe)(
            self.pipe, prompts, images=num_images_per_prompt, height=height, width=width, steps=num_inference_steps,
            options=options,
        )  # fmt: skip
        settings = Settings(
            loss=loss, step_size=step_size, share=share, refine=refine or {}, iterations=iterations,
            threshold=threshold, mode=mode, layers=layers, resolution=resolution, return_maps=return_maps,
        )  # fmt: skip
        moves = Moves("AStarPipeline", denoiser, each, settings, uncorrected=True)

        def after_step(stock: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            tensors["latents"] = moves.before(index + 1, tensors["latents"])
            show()
            if callback_on_step_end is None:
                return tensors
            return {**tensors, **callback_on_step_end(stock, index, timestep, tensors)}

        wanted = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        noise = denoiser.noise(generator) if latents is None else latents
        text = self._text(prompt, num_images_per_prompt=num_images_per_prompt, phrases=phrases, **options)
        with text, _uncorrected(self.pipe.scheduler, moves.moved), _shown(self.pipe, moves.losses) as show:
            output = self.pipe(
                prompt,
                height=denoiser.height,
                width=denoiser.width,
                num_inference_steps=denoiser.steps,
                num_images_per_prompt=num_images_per_prompt,
                generator=generator,
                latents=moves.begin(noise.to(denoiser.device)),
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=list(dict.fromkeys(["latents", *wanted])),
                **options,
            )
        if not isinstance(output, tuple):
            output.losses = moves.losses
            if return_maps:
                output.maps = moves.maps
        return output

    def _text(self, prompt: str | Sequence[str], *, phrases: Any, **options: Any) -> Any:
        """The text that the model reads: a context, the structured pipeline's where there is one."""
        if self.structured is not None:
            return self.structured.text_context(prompt, phrases=phrases, **options)
        if phrases is not None:
            raise TypeError(
                f"AStarPipeline: phrases must be left out around {type(self.pipe).__name__}: make the pipeline of a "
                "StructuredDiffusionPipeline"
            )
        return contextlib.nullcontext()


@contextlib.contextmanager
def _uncorrected(scheduler: Any, moved: Iterable[int]) -> Iterator[None]:
    """Have UniPC go on from the latents that it is given in steps before which they were moved."""
    own = getattr(scheduler, "disable_corrector", None)
    if own is None:
        yield
        return
    scheduler.disable_corrector = [*own, *(index - 1 for index in moved if index)]  # it corrects the step before
    try:
        yield
    finally:
        scheduler.disable_corrector = own


@contextlib.contextmanager
def _shown(pipe: Any, losses: Sequence[Sequence[float]]) -> Iterator[Callable[[], None]]:
    """Have the pipeline's progress bar tell the mean of the last losses, whenever the function given is called."""
    bars: list[Any] = []
    stock, own = pipe.progress_bar, pipe.__dict__.get("progress_bar")

    def show() -> None:
        if losses and bars:
            bars[-1].set_postfix(loss=sum(losses[-1]) / len(losses[-1]))

    def progress_bar(*args: Any, **kwargs: Any) -> Any:
        bars.append(stock(*args, **kwargs))
        show()
        return bars[-1]

    pipe.progress_bar = progress_bar
    try:
        yield show
    finally:
        if own is None:
            del pipe.progress_bar
        else:
            pipe.progress_bar = own
