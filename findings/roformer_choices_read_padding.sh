#!/usr/bin/env bash
# A question with three choices for RoFormerForMultipleChoice: padded to their longest, as its tokenizer pads, and to
# four columns more.
#
# Expected: the same scores, since the attention mask leaves padding out; BERT's, ELECTRA's and RoBERTa's classes for
# multiple choice read a choice's first token.
# Seen (transformers 5.23.0; 5.24.0 does the same): the class reads the last *column*, which is padding in every choice
# but the longest, and then in all: config.summary_type, which RoFormerConfig does not have, is "last" where it is
# missing. Padding by four columns more moves the scores of all three choices, by 0.3 to 0.5 here. A config that is given
# summary_type="first" reads the first token, and its scores stay.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy

cat > "$folder/choices.py" <<'PY'
import torch
import transformers
from transformers import RoFormerConfig, RoFormerForMultipleChoice

torch.set_grad_enabled(False)
print("transformers", transformers.__version__)


def scores(model, columns):
    lengths = torch.tensor([4, 6, 9])
    torch.manual_seed(1)
    ids = torch.randint(5, 100, (3, 9))
    mask = (torch.arange(columns) < lengths[:, None]).long()
    ids = torch.nn.functional.pad(ids, (0, columns - 9)) * mask
    return model(input_ids=ids[None], attention_mask=mask[None]).logits[0]


def moved(**options):
    torch.manual_seed(0)
    config = RoFormerConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, initializer_range=0.4, **options,
    )
    model = RoFormerForMultipleChoice(config).eval()
    short, wide = scores(model, 9), scores(model, 13)
    print(options or "as it is built", "- 9 columns:", [round(each, 3) for each in short.tolist()],
          "13 columns:", [round(each, 3) for each in wide.tolist()])
    return short, wide


short, wide = moved()
first_short, first_wide = moved(summary_type="first")
assert float((short - wide).abs().max()) > 0.1, "no longer so"
assert float((first_short - first_wide).abs().max()) < 1e-5, "the first token's scores moved, too"
PY
"$folder/venv/bin/python" -W ignore "$folder/choices.py"
