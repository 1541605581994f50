"""Where each family drops out when it is trained, and at which rate: what its config says of every place."""

from __future__ import annotations

from typing import Any

from ..engine.spec import HeadSpec, Task
from ..engine.training import DropoutRates

# Their classifier drops out what it reads and, once more, what its last product reads.
_TWICE = frozenset(
    {
        *("roberta", "xlm-roberta", "camembert", "data2vec-text", "electra", "mpnet", "jina_embeddings_v3", "esm"),
        *("esmc", "roberta-prelayernorm", "xlm-roberta-xl", "roformer", "xmod"),
    }
)
# Their head of choices has the rate of hidden rows, whatever the classifier's is.
_HIDDEN_CHOICES = frozenset(
    {
        *("roberta", "xlm-roberta", "camembert", "data2vec-text", "mpnet", "megatron-bert", "roberta-prelayernorm"),
        *("xlm-roberta-xl", "xmod"),
    }
)
_PER_TEXT: tuple[Task, ...] = ("sequence classification", "multiple choice")


def dropout_rates(config: Any, head: HeadSpec) -> DropoutRates:
    """The rates of a model, as its config gives them."""
    kind = config.model_type
    if kind == "distilbert":
        rates = DropoutRates(embeddings=config.dropout, attention=config.attention_dropout, output=config.dropout)
        by_task = {"token classification": config.dropout, "question answering": config.qa_dropout}
        per_text = config.seq_classif_dropout if head.task in _PER_TEXT else 0.0
        return rates._replace(head_out=by_task.get(head.task, per_text))
    if kind in ("modernbert", "ultrabert", "eurobert", "esmc"):
        return _without_hidden(config, head)
    hidden = config.hidden_dropout_prob
    rates = DropoutRates(
        embeddings=hidden, attention=config.attention_probs_dropout_prob, attended=hidden, output=hidden
    )
    if kind in ("albert", "xlm-roberta-xl"):
        rates = rates._replace(output=0.0)
    elif kind == "esm":
        rates = rates._replace(embeddings=0.0)
    elif kind == "gte":
        rates = rates._replace(inner=hidden)
    elif kind == "xmod":
        rates = rates._replace(adapter=hidden)
    elif kind in ("deberta", "deberta-v2"):
        rates = rates._replace(positions=hidden, convolution=hidden)
    return _with_head(rates, config, head)


def _without_hidden(config: Any, head: HeadSpec) -> DropoutRates:
    """Encoders that are pre-trained without dropout, and have an option for each place."""
    kind, classifier = config.model_type, getattr(config, "classifier_dropout", 0.0)
    rates = DropoutRates(attention=config.attention_dropout)
    if kind == "modernbert":
        rates = rates._replace(
            embeddings=config.embedding_dropout, attended=config.attention_dropout, inner=config.mlp_dropout
        )
    if kind == "eurobert" or head.task in ("encoder", "masked language modelling"):
        return rates
    if head.task == "question answering" and kind != "modernbert":
        return rates
    rates = rates._replace(head_out=classifier)
    return rates._replace(head_in=classifier) if kind in _TWICE and head.task == "sequence classification" else rates


def _with_head(rates: DropoutRates, config: Any, head: HeadSpec) -> DropoutRates:
    kind, hidden, task = config.model_type, config.hidden_dropout_prob, head.task
    if kind in ("albert", "rembert"):
        classifier = config.classifier_dropout_prob
    else:
        classifier = getattr(config, "classifier_dropout", None)
        classifier = hidden if classifier is None else classifier
    if kind in ("deberta", "deberta-v2") and task in _PER_TEXT:
        own = getattr(config, "cls_dropout", None)
        return rates._replace(head_in=config.pooler_dropout, head_out=hidden if own is None else own)
    if task == "token classification":
        return rates._replace(head_out=classifier)
    if task == "multiple choice":
        if kind == "electra":
            return rates._replace(head_out=config.summary_last_dropout)
        if kind == "roformer":
            return rates
        return rates._replace(head_out=hidden if kind in _HIDDEN_CHOICES else classifier)
    if task == "sequence classification":
        return rates._replace(head_in=classifier if kind in _TWICE else 0.0, head_out=classifier)
    return rates
