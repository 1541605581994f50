#!/usr/bin/env bash
# A protein in a batch of ESM-2, whose padding holds <mask> tokens instead of <pad>: the attention mask is 0 there. Batches
# that are filled up for a fixed shape, or whose text was cut by the mask alone, look so.
#
# Expected: the same logits, since the attention mask leaves these tokens out.
# Seen (transformers 5.23.0; 5.24.0 does the same): with token_dropout, which ESM-2's checkpoints have, embeddings are
# scaled by 0.88 / (1 - masks / length), in inference too; *masks* counts the whole row of ids, *length* the attention mask
# alone. Three <mask> tokens behind a protein of eight scale all its embeddings by 1.6, and its logits move; <pad> or a
# residue in their place moves none. As many masks as residues divide by zero: the logits are NaN.
set -eu

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.23.0 numpy

cat > "$folder/proteins.py" <<'PY'
import torch
import transformers
from transformers import EsmConfig, EsmForSequenceClassification

torch.set_grad_enabled(False)
torch.manual_seed(0)
PAD, MASK, RESIDUE = 1, 32, 9
config = EsmConfig(
    vocab_size=33, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=3,
    pad_token_id=PAD, mask_token_id=MASK, token_dropout=True, position_embedding_type="rotary", initializer_range=0.4,
    max_position_embeddings=64, emb_layer_norm_before=False,
)
model = EsmForSequenceClassification(config).eval()
protein = [0, 5, 8, 12, 17, 6, 20, 2]
print("transformers", transformers.__version__)


def logits(behind, count):
    ids = torch.tensor([protein + [behind] * count])
    mask = torch.tensor([[1] * len(protein) + [0] * count])
    return model(input_ids=ids, attention_mask=mask).logits[0]


plain = logits(PAD, 3)
for name, behind, count in (("<pad>", PAD, 3), ("a residue", RESIDUE, 3), ("<mask>", MASK, 3), ("<mask>", MASK, 8)):
    found = logits(behind, count)
    print(f"{count} times {name} behind the protein:", [round(each, 3) for each in found.tolist()])
assert torch.allclose(logits(RESIDUE, 3), plain, atol=1e-5), "padding moves the logits whatever it is"
assert float((logits(MASK, 3) - plain).abs().max()) > 0.01, "no longer so"
assert bool(logits(MASK, 8).isnan().all()), "no longer NaN"
PY
"$folder/venv/bin/python" -W ignore "$folder/proteins.py"
