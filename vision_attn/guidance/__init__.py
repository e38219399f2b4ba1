"""Compositional guidance: what a prompt's phrases mean for attention, measured and steered."""

from vision_attn.guidance.capture import AttentionCapture
from vision_attn.guidance.contexts import text_context, value_context
from vision_attn.guidance.latents import LatentGuide, step_sizes
from vision_attn.guidance.losses import (
    attend_and_excite_loss,
    jensen_shannon_loss,
    overlap,
    retention_loss,
    segregation_loss,
    symmetric_kl_loss,
)
from vision_attn.guidance.maps import binarize, concept_maps, smoothed
from vision_attn.guidance.overlays import concept_overlays, concept_sheet
from vision_attn.guidance.phrases import Phrase, concept_phrases, constituents_of, noun_chunks_of, noun_phrases
from vision_attn.guidance.structured import StructuredEmbeds, structured_embeddings
from vision_attn.guidance.tokens import align, token_groups, word_positions

__all__ = [
    "AttentionCapture",
    "LatentGuide",
    "Phrase",
    "StructuredEmbeds",
    "align",
    "attend_and_excite_loss",
    "binarize",
    "concept_maps",
    "concept_overlays",
    "concept_phrases",
    "concept_sheet",
    "constituents_of",
    "jensen_shannon_loss",
    "noun_chunks_of",
    "noun_phrases",
    "overlap",
    "retention_loss",
    "segregation_loss",
    "smoothed",
    "step_sizes",
    "structured_embeddings",
    "symmetric_kl_loss",
    "text_context",
    "token_groups",
    "value_context",
    "word_positions",
]
