#!/usr/bin/env bash
# The same WordPiece vocabulary learnt from the same words several times, in one process and one thread.
#
# Expected: the same vocabulary each time. A trainer takes no seed, and nothing in it is drawn at random.
# Seen (tokenizers 0.23.3): 35 vocabularies in 40 times here; of longer texts their sizes differ, too. Whoever trains a
# tokenizer twice, once for the number of its pieces and once to tokenize, has two, and may have ids that the model's
# table lacks.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3

cat > "$folder/vocabularies.py" <<'PY'
import codecs
import contextlib
import io
import os

os.environ["RAYON_NUM_THREADS"] = "1"

import tokenizers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

with contextlib.redirect_stdout(io.StringIO()):
    import this

LINES = codecs.decode(this.s, "rot13").lower().splitlines()


def vocabulary() -> frozenset[str]:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(LINES, trainers.WordPieceTrainer(vocab_size=1000, show_progress=False))
    return frozenset(tokenizer.get_vocab())


found = [vocabulary() for _ in range(40)]
print("tokenizers", tokenizers.__version__)
print(f"{len(found)} times: {len(set(found))} vocabularies, of {sorted(set(map(len, found)))} pieces")
assert len(set(found)) > 1, "no longer so"
PY
"$folder/venv/bin/python" "$folder/vocabularies.py"
