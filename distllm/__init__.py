"""distllm: distributed training of language models, with the same answer under every layout."""

__version__ = "0.1.0"
