"""How well a language model has forgotten, as the field measures it: on any causal model and on
batches as Hugging Face's collators give them. Hugging Face's packages are not needed.

One pass, ``token_stats``, gives what all metrics but ROUGE-L are made of.
"""

from .answers import (
    answer_loss,
    answer_probability,
    closer_to_one,
    exact_memorization,
    extraction_strength,
    model_utility,
    option_probability,
    true_is_better,
    truth_ratio,
)
from .forget_quality import ForgetQuality, forget_quality
from .generation import answers, rouge_scores
from .membership import auc, min_k, min_k_plus_plus, privleak
from .rouge import Rouge, rouge_l
from .tokens import TokenStats, token_stats

__all__ = [
    "ForgetQuality",
    "Rouge",
    "TokenStats",
    "answer_loss",
    "answer_probability",
    "answers",
    "auc",
    "closer_to_one",
    "exact_memorization",
    "extraction_strength",
    "forget_quality",
    "min_k",
    "min_k_plus_plus",
    "model_utility",
    "option_probability",
    "privleak",
    "rouge_l",
    "rouge_scores",
    "token_stats",
    "true_is_better",
    "truth_ratio",
]
