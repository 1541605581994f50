"""The namespace of this package's operators in ``torch.ops``.

A copy for the Hugging Face hub has another one, which ``kernels/assemble_hub.py`` writes here: two copies can then be
loaded in one process.
"""

NAMESPACE = "fastcls_kernels"


def add_op_namespace_prefix(name: str) -> str:
    """The name by which ``torch.library`` knows this package's operator ``name``."""
    return f"{NAMESPACE}::{name}"
