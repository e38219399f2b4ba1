"""Noun phrases of a prompt, by closed word classes: no model, no download.

English nouns are an open class, the words around them are not: a word that is no determiner, preposition, pronoun, verb
or adverb of the lists below is taken for a noun. Prompts are short and plain, and that suffices for them; for harder
text give phrases yourself, or a parser (`noun_chunks_of`, `constituents_of`).

    noun phrase = (determiner | number | adverb | adjective | possessive | noun)* noun
                | (determiner | number) adjective+        "a square", "an orange"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Phrase:
    """A part of a prompt.

    Args:
        text: Its characters.
        start: Offset of the first one in the prompt.
        end: Offset behind the last one.
    """

    text: str
    start: int
    end: int


def noun_phrases(prompt: str) -> list[Phrase]:
    """The noun phrases of a prompt, flat, in their order.

    Two adjectives joined by "and" or a comma stay in one phrase: "a black and white cat".

    Args:
        prompt: English text of any length.

    Returns:
        Phrases, whose text is `prompt[start:end]`.

    Raises:
        TypeError: no string.

    Example:
        >>> [phrase.text for phrase in noun_phrases("A red car and a white sheep in front of the old barn.")]
        ['A red car', 'a white sheep', 'the old barn']
    """
    if not isinstance(prompt, str):
        raise TypeError(f"noun_phrases: prompt must be a string, got {type(prompt).__name__}")
    words = [Phrase(match[0], *match.span()) for match in _WORD.finditer(prompt)]
    tags = _tags(prompt, words)
    phrases: list[Phrase] = []
    current: list[int] = []

    def close() -> None:
        whole = _phrase([tags[place] for place in current])
        if whole:
            start, end = words[current[0]].start, words[current[whole - 1]].end
            phrases.append(Phrase(prompt[start:end], start, end))
        current.clear()

    for place, tag in enumerate(tags):
        between = prompt[words[place - 1].end : words[place].start] if place else ""
        joined = bool(current) and _joins_adjectives(tags, place, between)
        begins = tag in _BEGINNINGS and any(tags[i] == NOUN for i in current)
        if not joined and (between.strip() or begins or tag in (OTHER, AND)):
            close()
        if joined or tag not in (OTHER, AND):
            current.append(place)
    close()
    return phrases


def _phrase(tags: Sequence[int]) -> int:
    """How many of the words, from the first, are a noun phrase; 0 for none."""
    last = max((place for place, tag in enumerate(tags) if tag == NOUN), default=-1)
    if last < 0 and tags and tags[0] in (DETERMINER, NUMBER):
        last = max((place for place, tag in enumerate(tags) if tag == ADJECTIVE), default=-1)
    return last + 1


def concept_phrases(prompt: str) -> list[Phrase]:
    """The noun phrases of a prompt without leading determiners and numbers: what is to be seen.

    Args:
        prompt: English text.

    Raises:
        TypeError: no string.

    Example:
        >>> [phrase.text for phrase in concept_phrases("a red circle and two stars")]
        ['red circle', 'stars']
    """
    concepts = []
    for phrase in noun_phrases(prompt):
        start = phrase.start
        for word in _WORD.finditer(prompt, phrase.start, phrase.end):
            start = word.start()
            if word[0].lower() not in _DETERMINERS | _NUMBERS and not word[0].isdigit():
                break
        concepts.append(Phrase(prompt[start : phrase.end], start, phrase.end))
    return concepts


def noun_chunks_of(parser: Any) -> Callable[[str], list[Phrase]]:
    """Noun phrases by a spaCy pipeline, to be used wherever phrases may come from a function.

    Args:
        parser: A loaded pipeline with a parser, such as `spacy.load("en_core_web_sm")`.

    Returns:
        A function from a prompt to its phrases.

    Raises:
        TypeError: something that cannot be called.
    """
    if not callable(parser):
        raise TypeError(f"noun_chunks_of: parser must be a loaded spaCy pipeline, got {type(parser).__name__}")

    def chunks(prompt: str) -> list[Phrase]:
        return [Phrase(chunk.text, chunk.start_char, chunk.end_char) for chunk in parser(prompt).noun_chunks]

    return chunks


def constituents_of(parser: Any) -> Callable[[str], list[Phrase]]:
    """Nested noun phrases by a stanza pipeline, to be used wherever phrases may come from a function.

    Args:
        parser: A loaded pipeline, such as `stanza.Pipeline("en", processors="tokenize,pos,constituency")`.

    Returns:
        A function from a prompt to its noun phrases of more than one word, each before the ones within it. The prompt
        as a whole is none of them.

    Raises:
        TypeError: something that cannot be called.
        ValueError: when the function is called, a pipeline that parses no constituents.

    Source: arXiv 2212.05032, section 3; its released code takes the phrases of the first sentence only.
    """
    if not callable(parser):
        raise TypeError(f"constituents_of: parser must be a loaded stanza pipeline, got {type(parser).__name__}")

    def constituents(prompt: str) -> list[Phrase]:
        places: dict[tuple[int, int], None] = {}  # each once: a phrase may be all that another one holds
        for sentence in parser(prompt).sentences:
            if sentence.constituency is None:
                raise ValueError(
                    "constituents_of: parser must parse constituents, got a sentence without them: load it with "
                    'processors="tokenize,pos,constituency"'
                )
            for label, first, end in _subtrees(sentence.constituency):
                if label == "NP" and end - first > 1:
                    places[_characters(sentence.words[first], sentence.words[end - 1])] = None
        phrases = [Phrase(prompt[start:end], start, end) for start, end in places]
        return [phrase for phrase in phrases if _bare(phrase.text) != _bare(prompt)]

    return constituents


def _subtrees(tree: Any, first: int = 0) -> Iterator[tuple[str, int, int]]:
    """Label, first leaf and the one behind the last of every subtree, each before its parts."""
    yield tree.label, first, first + _leaves(tree)
    for child in tree.children:
        yield from _subtrees(child, first)
        first += _leaves(child)


def _leaves(tree: Any) -> int:
    return sum(_leaves(child) for child in tree.children) or 1


def _characters(first: Any, last: Any) -> tuple[int, int]:
    """Offsets of words; a word that is one of several in a token, as "do" of "don't", may know only the token's."""
    start, end = first.start_char, last.end_char
    return first.parent.start_char if start is None else start, last.parent.end_char if end is None else end


def _bare(text: str) -> str:
    return text.strip().rstrip(".").rstrip()


def find_phrases(prompt: str, phrases: Any = None) -> list[Phrase]:
    """The phrases that a user means.

    Args:
        prompt: The prompt.
        phrases: None for `noun_phrases`; a function of the prompt; or a sequence of `Phrase`s, `(start, end)` offsets
            and texts. A text that occurs several times stands for its first place that no earlier one has taken.

    Raises:
        TypeError: none of these.
        ValueError: a text that is not in the prompt, offsets outside of it.
    """
    if phrases is None:
        return noun_phrases(prompt)
    if callable(phrases):
        phrases = phrases(prompt)
    if isinstance(phrases, str) or not isinstance(phrases, Sequence):
        raise TypeError(f"phrases must be None, a function or a list of phrases, got {phrases!r}: write [{phrases!r}]")
    found: list[Phrase] = []
    for phrase in phrases:
        found.append(_find(prompt, phrase, found))
    return found


def _find(prompt: str, phrase: Any, taken: Sequence[Phrase]) -> Phrase:
    if isinstance(phrase, str):
        return _find_text(prompt, phrase, taken)
    if isinstance(phrase, Phrase):
        start, end = phrase.start, phrase.end
    else:
        try:
            start, end = phrase
        except (TypeError, ValueError):
            raise TypeError(f"phrases must hold texts, (start, end) offsets or Phrases, got {phrase!r}") from None
    if not (isinstance(start, int) and isinstance(end, int) and 0 <= start < end <= len(prompt)):
        raise ValueError(f"phrases must be within the {len(prompt)} characters of the prompt, got {(start, end)}")
    return Phrase(prompt[start:end], start, end)


def _find_text(prompt: str, text: str, taken: Sequence[Phrase]) -> Phrase:
    """The first whole-word place, upper and lower case alike, that no earlier phrase has."""
    wanted = text.strip()
    places = (
        [m.span() for m in re.finditer(rf"(?<!\w){re.escape(wanted)}(?!\w)", prompt, re.IGNORECASE)] if wanted else []
    )
    free = [place for place in places if all(place != (other.start, other.end) for other in taken)]
    if not free:
        given = f"{text!r} more often than it occurs" if places else repr(text)
        raise ValueError(f"phrases must be in the prompt {prompt!r}, got {given}: check its spelling")
    return Phrase(prompt[free[0][0] : free[0][1]], *free[0])


NOUN, ADJECTIVE, DETERMINER, NUMBER, ADVERB, POSSESSIVE, AND, OTHER = range(8)
_BEGINNINGS = (DETERMINER, NUMBER, ADJECTIVE, ADVERB)  # what comes before a noun begins another phrase after one

_WORD = re.compile(r"\w+(?:[-'’]\w+)*['’]?")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_DETERMINERS = _words(
    "a an the this that these those some any each every no both all another other several many few more most "
    "various my your his her its our their"
)
_NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve dozen hundred thousand")
_COLORS = _words(
    "red orange yellow green blue purple violet pink brown black white gray grey golden silver beige cyan magenta "
    "teal turquoise maroon navy tan crimson scarlet indigo lavender olive ivory"
)
_ADJECTIVES = _COLORS | _words(
    "light dark bright pale deep small large big little tiny huge giant tall short long wide narrow thin thick "
    "fat round square flat old young new ancient modern vintage antique fresh clean dirty empty full open closed "
    "hot cold warm cool wet dry soft hard shiny wooden striped spotted furry fluffy hairy beautiful pretty cute "
    "ugly happy sad angry colorful colourful nice great good bad high low heavy busy crowded sunny cloudy rainy "
    "snowy foggy sandy grassy rocky snow-covered black-and-white multicolored multi-colored different same single "
    "double lone real fake asian american european japanese chinese"
)
_AUXILIARIES = _words(
    "do does did can could will would shall should may might must don't doesn't didn't can't couldn't won't wouldn't"
)
_VERBS = _AUXILIARIES | _words(
    "is are was were be been being am has have had isn't aren't wasn't weren't it's there's that's sit sits sat "
    "stand stands stood lie lies lay lays hold holds held ride rides rode walk walks run runs ran fly flies flew "
    "eat eats ate play plays wear wears wore look looks watch watches stay stays hang hangs hung rest rests lean "
    "leans jump jumps swim swims carry carries show shows contain contains feature features include includes face "
    "faces fill fills cover covers surround surrounds seen shown made worn built grown drawn taken given driven "
    "hidden broken lit set"
)
_PREPOSITIONS = _words(
    "of in on at by with without from to into onto over under above below beneath behind beside besides between "
    "among near next against along across around through during before after about as like inside outside off up "
    "down out toward towards upon via within amid amidst atop past per than"
)
_OTHERS = _words(
    "but or nor so yet if while when where who whom whose which what how why because although though it he she "
    "they them him i you we us me there here something someone nothing everyone everything itself themselves "
    "himself herself not just also please"
)
_CLOSED = _VERBS | _PREPOSITIONS | _OTHERS | {""}  # what no noun phrase holds; "" is the end of the prompt
_NOUNS_TOO = _words("square orange light silver olive round")  # adjectives that are nouns as well
_ADVERBS = _words("very quite really too rather extremely almost nearly")
_RELATIONS = _words("front top side middle center centre left right bottom back edge end next")
_NOUNS_IN_LY = _words("fly butterfly dragonfly family lily belly jelly assembly ally bully holly italy doily gully")
_NOUNS_IN_ING = _words("building ceiling painting drawing clothing lighting railing morning evening wedding")


def _tags(prompt: str, words: Sequence[Phrase]) -> list[int]:
    texts = [word.text.lower().replace("’", "'") for word in words]
    tags: list[int] = []
    for place, text in enumerate(texts):
        end = words[place].end
        following = texts[place + 1] if place + 1 < len(words) else ""
        if following and prompt[end : words[place + 1].start].strip():
            following = ","  # any punctuation
        before = tags[-1] if tags else OTHER
        helped = place > 0 and texts[place - 1] in _AUXILIARIES
        tags.append(OTHER if helped else _tag(text, following, before))
    return tags


def _tag(text: str, following: str, before: int) -> int:
    if text == "and":
        return AND
    if text in _RELATIONS and following in ("of", "to"):
        return OTHER
    if text in _NOUNS_TOO and (following in _CLOSED or (following in ("and", ",") and before == ADJECTIVE)):
        return NOUN
    for tag, members in (
        (DETERMINER, _DETERMINERS), (NUMBER, _NUMBERS), (ADJECTIVE, _ADJECTIVES), (ADVERB, _ADVERBS),
        (OTHER, _CLOSED),
    ):  # fmt: skip
        if text in members:
            return tag
    if text.isdigit():
        return NUMBER
    if text.endswith(("'s", "s'")):
        return POSSESSIVE
    if text.endswith("ly") and len(text) > 4 and text not in _NOUNS_IN_LY:
        return ADVERB
    if text.endswith("ing") and len(text) > 5 and text not in _NOUNS_IN_ING:
        return ADJECTIVE if before in (DETERMINER, ADJECTIVE, ADVERB) else OTHER
    if text.endswith("ed") and len(text) > 4:
        return OTHER if before == NOUN else ADJECTIVE
    return NOUN


def _joins_adjectives(tags: Sequence[int], place: int, between: str) -> bool:
    """Whether a comma before a word, or the word "and" itself, only joins two adjectives of one noun."""
    first, second = place - 1, place
    if tags[place] == AND:
        second = place + 1
    elif place and tags[first] == AND:  # "black, white and brown": the comma stands before; "and" is judged by itself
        return not between.strip() and _joins_adjectives(tags, first, "")
    elif between.strip() != ",":
        return False
    if first < 0 or second >= len(tags) or tags[first] != ADJECTIVE or tags[second] != ADJECTIVE:
        return False
    rest = next((tag for tag in tags[second:] if tag not in (ADJECTIVE, ADVERB, AND)), OTHER)
    return rest == NOUN
