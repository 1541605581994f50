"""The beginning of a long text, whose tokens are the first tokens of the whole text."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

# A token of English has 4 to 5 characters, so that one prefix is enough for most texts.
_CHARACTERS_A_TOKEN = 6

# Normalizers that look at a word and its white space, and no further. Their names are those of the library tokenizers.
_NORMALIZERS = frozenset(
    (
        "BertNormalizer",
        "Lowercase",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Strip",
        "StripAccents",
    )
)
# Replaced by white space: runs of it. A single space, where texts are ended, stays one.
_RUNS = ({"Regex": " {2,}"}, {"Regex": r"\s{2,}|[\n\r\t]"})
_SPACES = ({"Regex": " +"}, {"Regex": r"\s+"}, *_RUNS)
# Pre-tokenizers after which no token reaches from one word to the next, and those that only split further.
_SPLIT_AT_SPACES = frozenset(("BertPreTokenizer", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit"))
_SPLIT_WORDS = frozenset(("Digits", "Punctuation", "UnicodeScripts"))


def prefix(text: str, tokens: int) -> str:
    """The words of a text's beginning, probably of more than ``tokens`` tokens; a text that is not long, whole."""
    size = tokens * _CHARACTERS_A_TOKEN
    if len(text) <= 2 * size or not _is_unicode(text):
        return text
    # Before a space between characters that no normalizer deletes, joins to it or makes white space of: so it remains
    # one space, every word of the prefix is whole, and white space belongs to what follows.
    end = text.find(" ", size)
    while end > 0 and not (_stays(text[end - 1]) and _stays(text[end + 1 : end + 2])):
        end = text.find(" ", end + 1)
    return text if end < 0 else text[:end]


def _stays(character: str) -> bool:
    """Whether a character is still there, and is no white space, whatever a normalizer makes of it."""
    if character.isascii():
        return character.isprintable() and character not in ("", " ")
    return unicodedata.normalize("NFKD", character)[0].isalnum()


def _is_unicode(text: str) -> bool:
    """Whether tokenizers take a text: one with half a character must fail at any length."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def ends_at_words(tokenizer: Any) -> bool:
    """Whether the tokens of a text's first words do not depend on the words behind them.

    Args:
        tokenizer: a `tokenizers.Tokenizer`.
    """
    return (
        all(map(_normalizes_words, _parts(tokenizer.normalizer, "normalizers")))
        and _splits_at_spaces(_parts(tokenizer.pre_tokenizer, "pretokenizers"))
        # Dropout draws other tokens at each call.
        and not getattr(tokenizer.model, "dropout", None)
        and not any(_holds_space(tokenizer, token) for token in tokenizer.get_added_tokens_decoder().values())
    )


def _holds_space(tokenizer: Any, token: Any) -> bool:
    """Whether an added token may reach from one word to the next."""
    contents = [token.content]
    if token.normalized and tokenizer.normalizer is not None:
        contents.append(tokenizer.normalizer.normalize_str(token.content))
    return any(any(map(str.isspace, content)) for content in contents)


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """A component's description, or those of a sequence's members."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    members: list[dict[str, Any]] = state[name] if state["type"] == "Sequence" else [state]
    return members


def _normalizes_words(part: dict[str, Any]) -> bool:
    if part["type"] != "Replace":
        return part["type"] in _NORMALIZERS
    pattern, content = part["pattern"], part["content"]
    replaced = pattern.get("String", "")
    if pattern in _SPACES or replaced.isspace():
        # BigBird makes of a run of spaces the mark that its Metaspace makes of a space.
        return content == " " or (content == "\u2581" and pattern in _RUNS)
    return bool(replaced and content) and not any(map(str.isspace, replaced + content))


def _splits_at_spaces(parts: list[dict[str, Any]]) -> bool:
    def splits(part: dict[str, Any]) -> bool:
        return part["type"] in _SPLIT_AT_SPACES and part.get("use_regex", True) and part.get("split", True)

    return any(map(splits, parts)) and all(splits(part) or part["type"] in _SPLIT_WORDS for part in parts)
