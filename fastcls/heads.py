"""[CLS] rows to logits."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from fastcls_kernels import pooler_classifier


class ClassificationHead(nn.Module):
    """BERT's pooler (a dense layer and tanh) and the classifier on top of it."""

    pooler_weight: Tensor
    pooler_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, weight)

    def forward(self, cls_states: Tensor) -> Tensor:
        """(num_sequences, hidden_size) to (num_sequences, num_labels)."""
        return pooler_classifier(
            cls_states, self.pooler_weight, self.pooler_bias, self.classifier_weight, self.classifier_bias
        )
