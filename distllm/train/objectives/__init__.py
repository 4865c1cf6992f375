"""Objectives: model outputs and a batch -> LossTerms, always sums, never means."""

from distllm.train.objectives.classify import classification, regression
from distllm.train.objectives.multi import multi_task
from distllm.train.objectives.tokens import causal_lm, masked_lm, seq2seq, sft

__all__ = ["causal_lm", "classification", "masked_lm", "multi_task", "regression", "seq2seq", "sft"]
