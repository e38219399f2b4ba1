"""Positions of phrases among tokens, and their encodings put there."""

import json
import pathlib

import numpy as np
import pytest
import torch

from vision_attn.guidance import align, noun_phrases, token_groups, word_positions
from vision_attn.shapes.model import build_clip_tokenizer, build_t5_tokenizer

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "structured.json").read_text())["alignment_cases"]
PROMPT = "A  red circle, and a blue square."


@pytest.fixture(scope="module", params=[build_clip_tokenizer, build_t5_tokenizer], ids=["clip", "t5"])
def tokenizer(request):
    return request.param()


def test_groups_spell_their_phrases(tokenizer):
    phrases = noun_phrases(PROMPT)
    groups = token_groups(tokenizer, PROMPT, phrases)
    ids = tokenizer(PROMPT).input_ids
    for phrase, group in zip(phrases, groups, strict=True):
        spelled = tokenizer.decode([ids[place] for place in group])
        assert spelled.lower().split() == phrase.text.lower().split()
        assert group == list(range(group[0], group[-1] + 1))


def test_bos_is_counted():
    assert token_groups(build_clip_tokenizer(), "a red circle", ["red circle"]) == [[2, 3]]
    assert token_groups(build_t5_tokenizer(), "a red circle", ["red circle", (0, 1)]) == [[1, 2], [0]]


def test_words_that_the_encoder_reads():
    assert word_positions(build_clip_tokenizer(), "a red circle") == [1, 2, 3]  # BOS stands before them
    assert word_positions(build_t5_tokenizer(), "a red circle") == [0, 1, 2]
    assert word_positions(build_clip_tokenizer(), "a red circle", length=4) == [1, 2]
    with pytest.raises(ValueError, match=r"spans must be within the 3 tokens that .* got 'circle' at position 3"):
        token_groups(build_clip_tokenizer(), "a red circle", ["circle"], length=4)


def test_mistakes(tokenizer):
    long = "a red circle and " * 8 + "a blue star"
    with pytest.raises(ValueError, match=r"spans must be within the 23 tokens that .* got 'a blue star' at position"):
        token_groups(tokenizer, long, ["a blue star"])
    with pytest.raises(ValueError, match="spans must hold at least one token, got ' '"):
        token_groups(tokenizer, "a red circle", [(1, 2)])
    with pytest.raises(ValueError, match="phrases must be in the prompt"):
        token_groups(tokenizer, "a red circle", ["a blue star"])

    class Slow:
        model_max_length = 77

        def __call__(self, text, return_offsets_mapping=False, **options):
            raise NotImplementedError("return_offset_mapping is not available")

    with pytest.raises(TypeError, match="tokenizer must be a fast tokenizer that tells offsets, got Slow"):
        token_groups(Slow(), "a red circle", ["red"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["prompt"])
def test_alignment_is_that_of_the_released_code(case):
    expected = np.load(GOLDEN / "structured.npz")[f"align/{case['id']}/struct/v"]
    encodings = torch.stack([1000 * source + torch.arange(77) for source in range(len(case["spans"]))])[..., None]
    groups = [list(range(start + 1, end + 1)) for start, end in case["spans"]]
    aligned = align(encodings[0], encodings[1:], groups[1:])
    assert [tensor.flatten().tolist() for tensor in aligned] == expected[1:].tolist()
    batch = align(encodings[:1].expand(2, -1, -1), encodings[1:, None].expand(-1, 2, -1, -1), groups[1:])
    assert all(torch.equal(many[1], one) for many, one in zip(batch, aligned, strict=True))


@pytest.mark.parametrize(
    ("phrases", "groups", "message"),
    [
        (1, [[1, 2], [3]], "phrase_embeds must be one per group, 2, got 1"),
        (1, [[1, 3]], r"groups must hold consecutive positions, got \[1, 3\]"),
        (1, [[]], r"groups must hold consecutive positions, got \[\]"),
        (1, [[8, 9, 10]], r"groups must fit 10 positions of the prompt and 6 of the phrase .* got \[8, 9, 10\]"),
        (1, [list(range(6))], r"groups must fit 10 positions of the prompt and 6 of the phrase .* got \[0, 1"),
    ],
)
def test_alignment_mistakes(phrases, groups, message):
    with pytest.raises(ValueError, match=message):
        align(torch.zeros(10, 4), torch.zeros(phrases, 6, 4), groups)
