#!/usr/bin/env bash
# A text of six tokens in a batch that is padded on the left, through flashdeberta's drop-in DeBERTa; its Triton kernels run
# in Triton's interpreter (no GPU is needed).
#
# Expected: the text's hidden states as it has them alone, and as transformers' own DeBERTa gives them for either side:
# attention_mask says which tokens are padding.
# Seen (flashdeberta 0.0.8, transformers 5.23.0, triton 3.7.1): right with padding on the right, wrong without a word with
# padding on the left. Below 1,024 columns its model takes from the mask of pairs how many tokens the batch's first column
# attends to, and computes with so many from the left: the first column is padding there, and the count is 0. From 1,024
# columns on it goes by the mask itself, and is right. So with padding_side="left" a text's answer is right or wrong by the
# length of the longest text in its batch.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip install --quiet --disable-pip-version-check"
$pip torch==2.13.0 transformers==5.23.0 numpy==2.4.6 einops==0.8.2
$pip --no-deps --force-reinstall triton==3.7.1
$pip --no-deps flashdeberta==0.0.8

cat > "$folder/sides.py" <<'PY'
import contextlib

import torch
import transformers
import triton
from flashdeberta import FlashDebertaV2Model
from transformers import DebertaV2Config, DebertaV2Model

# It asks for the tensors' GPU around each launch, and the interpreter has none.
torch.cuda.device = lambda _index: contextlib.nullcontext()
torch.set_grad_enabled(False)
torch.manual_seed(0)
config = DebertaV2Config(
    vocab_size=99, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, type_vocab_size=0,
    max_position_embeddings=64, relative_attention=True, position_buckets=8, norm_rel_ebd="layer_norm",
    share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, initializer_range=0.3,
)
theirs = DebertaV2Model(config).eval()
flash = FlashDebertaV2Model(config).eval()
print(flash.load_state_dict(theirs.state_dict()), transformers.__version__, triton.__version__)
# The classifier would read the first column, which is padding on the left: the text's second token is compared.
text = [1, 20, 31, 42, 53, 2]


def row(model, left, right):
    ids = torch.tensor([[0] * left + text + [0] * right])
    found = model(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
    return found[0, left + 1]


alone = row(theirs, 0, 0)
sides = {
    "alone": (0, 0), "padded on the right": (0, 4), "padded on the left": (4, 0), "so up to 1,024": (1018, 0),
}
differences = {}
for name, model in (("transformers", theirs), ("flashdeberta", flash)):
    for side, (left, right) in sides.items():
        differences[name, side] = float((row(model, left, right) - alone).abs().max())
        print(f"{name}, {side}: off by {differences[name, side]:.1e} of {float(alone.abs().max()):.1f}")
wrong = differences.pop(("flashdeberta", "padded on the left"))
assert max(differences.values()) < 1e-4
assert wrong > 0.1, "no longer so"
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/sides.py"
