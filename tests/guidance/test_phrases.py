"""Noun phrases by closed word classes, and the phrases that users give."""

import json
import pathlib
import re
import types

import pytest

from vision_attn.guidance import Phrase, constituents_of, noun_chunks_of, noun_phrases
from vision_attn.guidance.phrases import find_phrases

CASES = {
    "a red car and a white sheep": ["a red car", "a white sheep"],
    "A red car and a white sheep in front of the old barn.": ["A red car", "a white sheep", "the old barn"],
    "two dogs and cats": ["two dogs", "cats"],
    "a red and blue bird": ["a red and blue bird"],
    "a small, red, wooden box": ["a small, red, wooden box"],
    "a black, white and brown dog sitting on the green grass": ["a black, white and brown dog", "the green grass"],
    "red square and blue star": ["red square", "blue star"],
    "a red square, a blue star": ["a red square", "a blue star"],
    "large red square above a small star": ["large red square", "a small star"],
    "a red circle left of a blue square, on a gray background": ["a red circle", "a blue square", "a gray background"],
    "an orange and blue bird": ["an orange and blue bird"],
    "an orange next to a lime": ["an orange", "a lime"],
    "The dog's red bowl, two black and white cats and a bird": [
        "The dog's red bowl", "two black and white cats", "a bird",
    ],
    "the girl’s mother’s house": ["the girl’s mother’s house"],
    "it's a dog's life": ["a dog's life"],
    "café tables don't move": ["café tables"],
    "an x-ray of well-lit rooms": ["an x-ray", "well-lit rooms"],
    "A man wearing a hat rides a horse": ["A man", "a hat", "a horse"],
    "a parking meter next to parked cars": ["a parking meter", "parked cars"],
    "a brightly colored parrot": ["a brightly colored parrot"],
    "a car is red": ["a car"],
    "  A  BIG  Dog ": ["A  BIG  Dog"],
    "": [],
    "red": [],
    "and, the, of!": [],
    "ein rotes Auto": ["ein rotes Auto"],
}  # fmt: skip


@pytest.mark.parametrize("prompt", CASES)
def test_phrases(prompt):
    phrases = noun_phrases(prompt)
    assert [phrase.text for phrase in phrases] == CASES[prompt]
    for phrase in phrases:
        assert prompt[phrase.start : phrase.end] == phrase.text


def test_they_are_the_lowest_phrases_of_parses_made_by_hand():
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden/structured.json").read_text())
    tried = 0
    for case in golden["alignment_cases"]:
        if "'" not in case["prompt"]:  # there a possessive is a phrase of its own
            assert [p.text.lower() for p in noun_phrases(case["prompt"])] == [
                text for text, _ in case["lowest_noun_phrases"]
            ]
            tried += 1
    assert tried == 5


def test_users_phrases_win():
    prompt = "a cat and a Cat, on a catwalk"
    assert find_phrases(prompt, ["a cat", "a cat"]) == [Phrase("a cat", 0, 5), Phrase("a Cat", 10, 15)]
    assert find_phrases(prompt, [(2, 5), Phrase("anything", 20, 22)]) == [Phrase("cat", 2, 5), Phrase("a ", 20, 22)]
    assert find_phrases(prompt, lambda text: [(0, len(text))]) == [Phrase(prompt, 0, len(prompt))]
    assert find_phrases(prompt) == noun_phrases(prompt)


def test_a_parser_of_spacy():
    chunk = types.SimpleNamespace(text="a cat", start_char=0, end_char=5)
    chunks = noun_chunks_of(lambda prompt: types.SimpleNamespace(noun_chunks=[chunk]))
    assert find_phrases("a cat sits", chunks) == [Phrase("a cat", 0, 5)]


def tree(text):
    """A parse tree of stanza from its bracketed text, such as `(NP (DT a) (NN cat))`."""
    pieces = iter(re.findall(r"[()]|[^\s()]+", text))

    def node(piece):
        if piece != "(":
            return types.SimpleNamespace(label=piece, children=[])
        label, children = next(pieces), []
        while (piece := next(pieces)) != ")":
            children.append(node(piece))
        return types.SimpleNamespace(label=label, children=children)

    return node(next(pieces))


def sentence(prompt, parse, start=0, split=()):
    """A parsed sentence; of a token in `split` the words have no places of their own."""
    words = []
    for text in re.findall(r"([^\s()]+)\)", parse):
        token = next((token for token in split if text in split[token]), text)
        begin = prompt.index(token, start)
        parent = types.SimpleNamespace(start_char=begin, end_char=begin + len(token))
        own = (None, None) if token in split else (parent.start_char, parent.end_char)
        words.append(types.SimpleNamespace(text=text, start_char=own[0], end_char=own[1], parent=parent))
        start = begin if token in split and text != split[token][-1] else parent.end_char
    return types.SimpleNamespace(words=words, constituency=tree(parse))


def parsed(*sentences):
    return constituents_of(lambda prompt: types.SimpleNamespace(sentences=sentences))


def test_constituents_are_the_phrases_of_the_released_code():
    golden = json.loads((pathlib.Path(__file__).parents[1] / "golden/structured.json").read_text())
    for case in golden["alignment_cases"]:
        phrases = parsed(sentence(case["preprocessed"], case["parse"]))(case["preprocessed"])
        assert all(case["preprocessed"][phrase.start : phrase.end] == phrase.text for phrase in phrases)
        # There the words are joined with blanks, and the prompt comes once more where it then looks different.
        expected = [text.replace(" ,", ",").replace(" 's", "'s") for text in case["noun_phrases"]]
        assert [phrase.text for phrase in phrases] == [text for text in expected if text != case["preprocessed"]]


def test_constituents_of_several_sentences_and_of_words_in_one_token():
    prompt = "A  red car. The dog's tail isn't a tail."
    first = "(ROOT (NP (NP (DT A) (JJ red) (NN car)) (. .)))"
    subject = "(NP (NP (DT The) (NN dog) (POS 's)) (NN tail))"
    second = f"(ROOT (S {subject} (VP (VBZ is) (RB n't) (NP (NP (DT a) (NN tail)))) (. .)))"
    split = {"dog's": ["dog", "'s"], "isn't": ["is", "n't"]}
    phrases = parsed(sentence(prompt, first), sentence(prompt, second, 11, split))(prompt)
    texts = ["A  red car.", "A  red car", "The dog's tail", "The dog's", "a tail"]
    assert phrases == [Phrase(text, prompt.index(text), prompt.index(text) + len(text)) for text in texts]
    assert [phrase.text for phrase in parsed(sentence(prompt[:11], first))(prompt[:11])] == []
    assert parsed()("") == []


@pytest.mark.parametrize(
    ("phrases", "error", "message"),
    [
        (["a dog"], ValueError, r"phrases must be in the prompt 'a cat', got 'a dog': check its spelling"),
        (["a cat", "a cat"], ValueError, "got 'a cat' more often than it occurs"),
        (["at"], ValueError, "phrases must be in the prompt 'a cat', got 'at'"),
        ([" "], ValueError, "phrases must be in the prompt 'a cat', got ' '"),
        ([(0, 6)], ValueError, r"phrases must be within the 5 characters of the prompt, got \(0, 6\)"),
        ([(3, 3)], ValueError, r"within the 5 characters of the prompt, got \(3, 3\)"),
        ([3], TypeError, r"phrases must hold texts, \(start, end\) offsets or Phrases, got 3"),
        ("a cat", TypeError, r"phrases must be None, a function or a list of phrases, got 'a cat'"),
    ],
)
def test_mistakes(phrases, error, message):
    with pytest.raises(error, match=message):
        find_phrases("a cat", phrases)


def test_other_mistakes():
    with pytest.raises(TypeError, match="noun_phrases: prompt must be a string, got NoneType"):
        noun_phrases(None)
    with pytest.raises(TypeError, match="noun_chunks_of: parser must be a loaded spaCy pipeline, got str"):
        noun_chunks_of("en_core_web_sm")
    with pytest.raises(TypeError, match="constituents_of: parser must be a loaded stanza pipeline, got str"):
        constituents_of("en")
    unparsed = types.SimpleNamespace(words=[], constituency=None)
    with pytest.raises(ValueError, match=r'parser must parse constituents, got a sentence .*="tokenize,pos,const'):
        parsed(unparsed)("a red cat")
