"""Token ids are those of a tokenizer's own call, also of long texts that are not read to their end."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import BertTokenizerLegacy, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from fastcls import prefixes
from fastcls.prefixes import ends_at_words
from fastcls.tokenizing import Cut, Ids, encode, is_plain

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<mask>"]
CORPUS = [
    "the quick brown fox jumps over the lazy dog, and they're not amused by 12 345 foxes!",
    "a film that isn't as good as its maker's earlier ones; \u00fcber caf\u00e9 na\u00efve",
    "\u041f\u0440\u0438 \u043c\u0438\u0440",
    "\u4e2d\u6587 \u6587\u672c \u03bf\u03b4\u03bf\u03c2 \u039f\u0394\u039f\u03a3  two  spaces\nlines\ttabs",
    "runs  of    many        spaces                fox",
] * 4
# Among them what normalizers delete, compose, or make white space of, and what is white space to some.
WORDS = [
    *("the", "fox", "isn't", "amused", "12345", "foxes!", "a", "b", "x", "'", "'s", "``", "''", "_", "-", "..."),
    *("\u00e9", "e\u0301", "\u0301", "\u039f\u0394\u039f\u03a3", "\u4e2d\u6587", "\u4e2d", "\u041f\u0440\u0438"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469", "\u00b4", "\u00a8", "\u037a", "\ufe70", "\ufdfa", "\u0600"),
    *("\u200b", "\u200e", "\ufeff", "\x00", "\x01", "\x7f", "\u00ad", "\u2581", "\u0130", "\ufb01", "\u00b2"),
    *("<mask>", "<s>", "w" * 120, "\x1c", "\u0085", "\u2028", "\u00a0", "\u3000"),
]
GAPS = ["", " ", " ", " ", "  ", "   ", "\n", "\n\n", " \n ", "\t", "\r\n", "\u00a0", "\u2028", "\u3000", " " * 9]
PIECES = st.tuples(st.sampled_from(WORDS) | st.text(max_size=3), st.sampled_from(GAPS)).map("".join)
# Half a character is no text.
TEXTS = st.lists(PIECES, max_size=24).map("".join).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text))


def template(tokenizer: Tokenizer) -> Any:
    return processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )


def built(model: str, normalizer: Any, pre_tokenizer: Any, **options: Any) -> Tokenizer:
    """A tokenizer that learnt a few words."""
    kinds: dict[str, Callable[[], tuple[Any, Any]]] = {
        "wordpiece": lambda: (
            models.WordPiece(unk_token="<unk>", **options),
            trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False),
        ),
        "bpe": lambda: (
            models.BPE(unk_token="<unk>", **options),
            trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
        ),
        "bytes": lambda: (
            models.BPE(**options),
            trainers.BpeTrainer(
                vocab_size=400,
                special_tokens=SPECIAL,
                show_progress=False,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            ),
        ),
        "unigram": lambda: (
            models.Unigram(),
            trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False),
        ),
        "words": lambda: (
            models.WordLevel(unk_token="<unk>"),
            trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False),
        ),
    }
    learnt, trainer = kinds[model]()
    tokenizer = Tokenizer(learnt)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = template(tokenizer)
    return tokenizer


def added(tokenizer: Tokenizer, *tokens: AddedToken) -> Tokenizer:
    tokenizer.add_tokens(list(tokens))
    return tokenizer


def wrapped(tokenizer: Tokenizer, kind: Any = PreTrainedTokenizerFast, **options: Any) -> PreTrainedTokenizerFast:
    names = {
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "cls_token": "<s>",
        "sep_token": "</s>",
        "mask_token": "<mask>",
    }
    names["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # type: ignore[assignment]
    made: PreTrainedTokenizerFast = kind(tokenizer_object=tokenizer, **names, **options)
    return made


N, P = normalizers, pre_tokenizers
# Read as far as their first tokens reach: name -> a tokenizer.
EXACT: dict[str, Callable[[], Tokenizer]] = {
    "bert": lambda: built("wordpiece", N.BertNormalizer(), P.BertPreTokenizer()),
    "bert cased": lambda: built("wordpiece", N.BertNormalizer(lowercase=False), P.BertPreTokenizer()),
    "bert short words": lambda: built(
        "wordpiece", N.BertNormalizer(clean_text=False), P.BertPreTokenizer(), max_input_chars_per_word=6
    ),
    "roberta": lambda: built("bytes", None, P.ByteLevel(add_prefix_space=False)),
    "roberta with a space": lambda: built("bytes", None, P.ByteLevel(add_prefix_space=True)),
    "modernbert": lambda: built("bytes", N.NFC(), P.ByteLevel(add_prefix_space=False)),
    "bytes without accents": lambda: built(
        "bytes", N.Sequence([N.NFKD(), N.StripAccents(), N.Lowercase()]), P.ByteLevel(add_prefix_space=False)
    ),
    "bytes by bert": lambda: built("bytes", N.BertNormalizer(), P.ByteLevel(add_prefix_space=False)),
    "bytes by nmt": lambda: built("bytes", N.Sequence([N.Nmt(), N.NFKC(), N.Strip()]), P.ByteLevel()),
    "digits": lambda: built("bytes", None, P.Sequence([P.Digits(individual_digits=True), P.ByteLevel()])),
    "falcon": lambda: built("bytes", None, P.Sequence([P.Punctuation("contiguous"), P.ByteLevel(), P.Digits()])),
    "xlm-roberta": lambda: built(
        "unigram", N.Sequence([N.Nmt(), N.NFKC()]), P.Sequence([P.WhitespaceSplit(), P.Metaspace()])
    ),
    "metaspace": lambda: built(
        "unigram", N.Sequence([N.Nmt(), N.NFKC(), N.Replace(Regex(" {2,}"), " ")]), P.Metaspace()
    ),
    "metaspace first": lambda: built("unigram", N.Strip(), P.Metaspace(prepend_scheme="first")),
    "big bird": lambda: built("bpe", N.Replace(Regex(" {2,}"), "\u2581"), P.Metaspace(prepend_scheme="never")),
    "rembert": lambda: built(
        "unigram",
        N.Sequence(
            [N.Replace("``", '"'), N.Replace("''", '"'), N.Replace(Regex(" {2,}"), " "), N.NFKD(), N.StripAccents()]
        ),
        P.Metaspace(),
    ),
    "deberta-v2": lambda: built(
        "unigram",
        N.Sequence(
            [N.Lowercase(), N.Replace(Regex(r"\s{2,}|[\n\r\t]"), " "), N.NFC(), N.Strip(left=False, right=True)]
        ),
        P.Sequence([P.Punctuation(behavior="isolated"), P.Metaspace()]),
    ),
    "scripts": lambda: built(
        "unigram", N.Prepend("\u2581"), P.Sequence([P.UnicodeScripts(), P.WhitespaceSplit(), P.Metaspace()])
    ),
    "words": lambda: built("words", N.Sequence([N.NFD(), N.Lowercase()]), P.Whitespace()),
    "one space": lambda: built(
        "bpe", N.Replace(Regex(r"\s+"), " "), P.Sequence([P.WhitespaceSplit(), P.Punctuation()])
    ),
    "added": lambda: added(
        built("wordpiece", N.BertNormalizer(), P.BertPreTokenizer()),
        AddedToken("fox", lstrip=True),
        AddedToken("isn't", rstrip=True),
        AddedToken("x", single_word=True),
        AddedToken("THE", normalized=True),
        AddedToken("...", normalized=False, lstrip=True, rstrip=True),
    ),
    "added to bytes": lambda: added(
        built("bytes", N.NFKC(), P.ByteLevel()),
        AddedToken("fox", rstrip=True, lstrip=True),
        AddedToken("x", single_word=True),
        AddedToken("\u00e9", normalized=True),
    ),
}


@pytest.fixture(params=list(EXACT))
def exact(request: pytest.FixtureRequest, made: dict[str, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    name = str(request.param)
    if name not in made:
        made[name] = wrapped(EXACT[name]())
    return made[name]


@pytest.fixture(scope="module")
def made() -> dict[str, PreTrainedTokenizerFast]:
    return {}


def by_call(tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, cut: Cut) -> Any:
    """Ids, types and whether it was cut, from a tokenizer's call."""
    given = (texts,) if pairs is None else (texts, pairs)
    whole = tokenizer(*given, verbose=False)["input_ids"]
    called = tokenizer(*given, **cut.options(), verbose=False)
    ids = called["input_ids"]
    types = called.get("token_type_ids") or [[0] * len(row) for row in ids]
    return ids, types, [len(row) < len(all_of_it) for row, all_of_it in zip(ids, whole, strict=True)]


def lists(rows: Iterable[Ids]) -> list[list[int]]:
    return [row.tolist() for row in rows]


def as_by_call(tokenizer: PreTrainedTokenizerBase, texts: list[str], pairs: list[str] | None, cut: Cut) -> None:
    found = encode(tokenizer, texts, pairs, cut)
    ids, types, was_cut = by_call(tokenizer, texts, pairs, cut)
    assert lists(found.ids) == ids
    assert lists(found.types) == types
    assert found.cut == was_cut
    assert found.further == []


def pairs_as_by_call(tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]], cut: Cut) -> None:
    firsts, seconds = [first for first, _ in pairs], [second for _, second in pairs]
    try:
        by_call(tokenizer, firsts, seconds, cut)
    except Exception as error:
        # The other text leaves no room for the one that may be cut.
        with pytest.raises(type(error), match="too short"):
            encode(tokenizer, firsts, seconds, cut)
    else:
        as_by_call(tokenizer, firsts, seconds, cut)


@pytest.fixture
def read_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes so short that some hold too few tokens."""
    monkeypatch.setattr(prefixes, "_CHARACTERS_A_TOKEN", 1)


@pytest.mark.usefixtures("read_little")
def test_long_texts_give_what_they_give_when_read_to_the_end(exact: PreTrainedTokenizerFast) -> None:
    assert ends_at_words(exact.backend_tokenizer)

    @settings(max_examples=60)
    @given(st.lists(TEXTS, min_size=1, max_size=3), st.integers(2, 9))
    def check(texts: list[str], length: int) -> None:
        as_by_call(exact, texts, None, Cut("longest_first", length))

    check()


@pytest.mark.full
@pytest.mark.usefixtures("read_little")
def test_so_do_pairs(exact: PreTrainedTokenizerFast) -> None:
    strategies = st.sampled_from(["longest_first", "only_first", "only_second"])

    @settings(max_examples=20)
    @given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=3), st.integers(5, 16), strategies)
    def check(pairs: list[tuple[str, str]], length: int, strategy: str) -> None:
        pairs_as_by_call(exact, pairs, Cut(strategy, length))

    check()


@pytest.mark.usefixtures("read_little")
@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second"])
@pytest.mark.parametrize("length", [12, 13])
def test_so_do_pairs_whose_other_text_is_cut_too(
    strategy: str, length: int, made: dict[str, PreTrainedTokenizerFast]
) -> None:
    tokenizer = made.setdefault("words", wrapped(EXACT["words"]()))
    # The beginning of the long text has fewer tokens than the other text.
    long, other = "brown " * 50, "a " * 8
    for pair in ((long, other), (other, long), (long, long), (other, other)):
        pairs_as_by_call(tokenizer, [pair], Cut(strategy, length))


@pytest.mark.usefixtures("read_little")
def test_so_they_do_under_every_option(exact: PreTrainedTokenizerFast) -> None:
    exact.split_special_tokens = True
    try:
        text = "<mask> fox isn't <s> x THE ... amused" * 3
        as_by_call(exact, [text, "", " ", text * 9], None, Cut("only_first", 12))
    finally:
        exact.split_special_tokens = False
    exact.truncation_side = "left"
    try:
        as_by_call(exact, [text * 9], None, Cut("longest_first", 12))
    finally:
        exact.truncation_side = "right"


def test_a_text_is_read_as_far_as_its_tokens_reach(made: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = made.setdefault("bert", wrapped(EXACT["bert"]()))
    text = "the quick fox " * 100 + "word " * 100_000
    found = encode(tokenizer, [text], None, Cut("longest_first", 64))
    assert lists(found.ids) == lists(encode(tokenizer, [text[:1400]], None, Cut("longest_first", 64)).ids)
    assert found.cut == [True]
    assert len(prefixes.prefix(text, 64)) < 64 * 7


class Watched:
    """A tokenizer in Rust, and how many characters it was given."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.characters = backend, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def encode_batch_fast(self, given: list[Any], **options: Any) -> Any:
        self.characters += sum(len(text) for each in given for text in ([each] if isinstance(each, str) else each))
        return self.backend.encode_batch_fast(given, **options)


@pytest.mark.parametrize(
    ("strategy", "long"), [("longest_first", 0), ("longest_first", 1), ("only_first", 0), ("only_second", 1)]
)
def test_of_a_pair_the_long_text_is_read_so(
    strategy: str, long: int, made: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = made.setdefault("bert", wrapped(EXACT["bert"]()))
    watched = Watched(tokenizer.backend_tokenizer)
    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", property(lambda _: watched))
    pair = ["the quick fox", "word " * 100_000][:: 1 if long else -1]
    as_by_call(tokenizer, [pair[0]], [pair[1]], Cut(strategy, 64))
    assert watched.characters < 64 * 14


def test_half_a_character_is_refused_wherever_it_stands(made: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = made.setdefault("bert", wrapped(EXACT["bert"]()))
    with pytest.raises(TypeError):
        encode(tokenizer, ["the fox " * 1000 + "\ud800"], None, Cut("longest_first", 16))


METASPACE = P.Metaspace(split=False)
# Not read by their beginning: a tokenizer, and a text whose beginning would give other tokens where one was found.
REFUSED: dict[str, tuple[Callable[[], Tokenizer], str | None]] = {
    "dropout": (lambda: built("bytes", None, P.ByteLevel(), dropout=0.5), None),
    "no pre-tokenizer": (lambda: built("unigram", None, None), None),
    "metaspace without split": (lambda: built("unigram", None, METASPACE), None),
    "bytes without regex": (lambda: built("bytes", None, P.ByteLevel(use_regex=False)), None),
    "split": (lambda: built("bytes", None, P.Sequence([P.Split(Regex(r"\w+ \w+"), "isolated"), P.ByteLevel()])), None),
    "lengths": (lambda: built("words", None, P.Sequence([P.FixedLength(5), P.WhitespaceSplit()])), None),
    "only digits": (lambda: built("unigram", None, P.Digits()), None),
    "spaces deleted": (lambda: built("bpe", N.Replace(" ", ""), P.WhitespaceSplit()), None),
    "runs deleted": (lambda: built("bpe", N.Replace(Regex(r"\s+"), ""), P.WhitespaceSplit()), None),
    "spaces marked": (lambda: built("bpe", N.Replace(" ", "\u2581"), P.WhitespaceSplit()), None),
    "over a space": (lambda: built("words", N.Replace("a b c", "fox"), P.WhitespaceSplit()), "x a b c c c"),
    "letters deleted": (lambda: built("bpe", N.Replace("x", ""), P.WhitespaceSplit()), None),
    "letters to spaces": (lambda: built("bpe", N.Replace("x", " "), P.WhitespaceSplit()), None),
    "any regex": (lambda: built("words", N.Replace(Regex("a.b.c"), "fox"), P.WhitespaceSplit()), "x a b c c c"),
    "unknown normalizer": (lambda: built("bpe", N.ByteLevel(), P.WhitespaceSplit()), None),
    "added with a space": (
        lambda: added(built("words", None, P.WhitespaceSplit()), AddedToken("a b c", normalized=False)),
        "x a b c c c",
    ),
    "added, normalized to a space": (
        lambda: added(
            built("words", N.Sequence([N.NFKD(), N.StripAccents()]), P.WhitespaceSplit()),
            AddedToken("a\u00b4b\u00b4c", normalized=True),
        ),
        "x a b c c c",
    ),
}


@pytest.mark.usefixtures("read_little")
@pytest.mark.parametrize("name", list(REFUSED))
def test_others_are_read_to_the_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, text = REFUSED[name]
    tokenizer = wrapped(build())
    assert not ends_at_words(tokenizer.backend_tokenizer)
    if text is None:
        return
    cut = Cut("longest_first", 4)
    as_by_call(tokenizer, [text], None, cut)
    # And the beginning alone would not do.
    monkeypatch.setattr("fastcls.tokenizing.ends_at_words", lambda _: True)
    with pytest.raises(AssertionError):
        as_by_call(tokenizer, [text], None, cut)


class Overriding(PreTrainedTokenizerFast):
    """Says something of its own before each text."""

    def _encode_plus(self, text: Any, *arguments: Any, **options: Any) -> Any:
        return super()._encode_plus([f"fox {each}" for each in text], *arguments, **options)


def slow_tokenizer(folder: Any) -> PreTrainedTokenizerBase:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, "fox", "the", "##s", *".,!'"]
    path = folder / "vocab.txt"
    path.write_text("\n".join(words), encoding="utf-8")
    made: PreTrainedTokenizerBase = BertTokenizerLegacy(str(path))
    return made


TEXTS_TO_COMPARE = ["the fox", "", "fox " * 30, "foxs, the isn't <mask> \u4e2d\u6587 \u00e9", " ", "b " * 7]


@pytest.mark.parametrize("strategy", ["longest_first", "only_first", "only_second", False])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "words", "overriding", "slow"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_singles_and_pairs_are_those_of_a_call(
    kind: str, strategy: Any, side: str, made: dict[str, Any], tmp_path: Any
) -> None:
    if kind not in made:
        of_kind = {"slow": lambda: slow_tokenizer(tmp_path), "overriding": lambda: wrapped(EXACT["bert"](), Overriding)}
        made[kind] = of_kind[kind]() if kind in of_kind else wrapped(EXACT[kind]())
    tokenizer = made[kind]
    assert is_plain(tokenizer) is (kind not in ("slow", "overriding"))
    tokenizer.truncation_side = side
    try:
        for length in (8, 20, None):
            cut = Cut(strategy, length)
            if strategy != "only_second":
                as_by_call(tokenizer, TEXTS_TO_COMPARE, None, cut)
            firsts = ["fox", "the", "a"] if strategy == "only_second" else ["fox " * 40, "the fox " * 40, "a fox " * 9]
            seconds = ["b"] * 3 if strategy == "only_first" else ["the", "", "b " * 50]
            as_by_call(tokenizer, firsts, seconds, cut)
    finally:
        tokenizer.truncation_side = "right"


def test_types_are_zero_where_a_tokenizer_gives_none() -> None:
    tokenizer = wrapped(EXACT["bert"]())
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    as_by_call(tokenizer, ["fox"], ["the"], Cut(False, None))
    assert lists(encode(tokenizer, ["fox"], ["the"], Cut(False, None)).types) == [[0] * 5]
    (further,) = encode(tokenizer, ["fox"], ["the " * 40], Cut("only_second", 12), overlap=3).further
    assert further
    assert not any(any(types) for _, types in further)
    tokenizer.model_input_names = ["input_ids", "token_type_ids"]
    assert lists(encode(tokenizer, ["fox"], ["the"], Cut(False, None)).types) == [[0, 0, 0, 1, 1]]


@pytest.mark.parametrize("pairs", [None, ["the " * 40, "b"]])
def test_windows_are_those_of_a_call(pairs: list[str] | None, made: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = made.setdefault("bert", wrapped(EXACT["bert"]()))
    texts = ["fox the " * 20, "a"] if pairs is None else ["fox", "a"]
    cut = Cut("longest_first" if pairs is None else "only_second", 12)
    found = encode(tokenizer, texts, pairs, cut, overlap=3)
    given = (texts,) if pairs is None else (texts, pairs)
    called = tokenizer(*given, **cut.options(), stride=3, return_overflowing_tokens=True)
    rows = [[(ids, types), *more] for ids, types, more in zip(found.ids, found.types, found.further, strict=True)]
    assert [len(row) for row in rows] == [called["overflow_to_sample_mapping"].count(index) for index in (0, 1)]
    assert lists(ids for row in rows for ids, _ in row) == called["input_ids"]
    assert lists(types for row in rows for _, types in row) == called["token_type_ids"]
    assert found.cut == [True, False]


def test_nothing_is_nothing(made: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = made.setdefault("bert", wrapped(EXACT["bert"]()))
    assert encode(tokenizer, [], None, Cut("longest_first", 8)) == ([], [], [], [])


@pytest.mark.full
def test_no_text_ends_where_white_space_may_grow(exact: PreTrainedTokenizerFast) -> None:
    # Accents are deleted; the spaces between them are one run then, whose tokens depend on where it ends.
    for gap in (" ", " \u0301", "\u0301 ", " \u00b4", "\u200e "):
        for length in range(3, 8):
            texts = ["x" + gap * count + " b" * 20 for count in range(1, 24)]
            as_by_call(exact, texts, None, Cut("longest_first", length))
