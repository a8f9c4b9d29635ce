"""What a report says of its numbers: each metric spelled out, and what none of them shows."""

REFERENCE = (
    "Reference: models trained anew without the forget set (row Retrain). FA, RA, TA and MIA are"
    " good when close to it, neither high nor low; the signed gap is in parentheses."
)
NO_REFERENCE = (
    "Reference: none, so no number here says how close a model is to one that never saw the forget"
    " set."
)
EXPLAINED = {
    "FA": (
        "FA, forget accuracy: share of the samples to be forgotten that the model gets right, by"
        " the labels it was trained on."
    ),
    "RA": "RA, retain accuracy: the same of the training samples that stay.",
    "TA": "TA, test accuracy: the same of samples that no model was trained on.",
    "MIA": (
        "MIA, membership inference attack: share of the samples to be forgotten that the attack"
        " takes for training data. Logistic regression with balanced classes on the prediction"
        " entropy, fitted to retain against test samples without a held-out split. A weak attack:"
        " passing it does not bound what a stronger one finds."
    ),
    "MIA_m": "MIA_m: the same attack on the modified entropy, which knows the label.",
    "D_KL_forget": (
        "D_KL: mean Kullback-Leibler divergence from the reference's to the model's prediction on"
        " each set, in nats; 0 where both say the same."
    ),
    "Avg.D": "Avg.D, average distance: mean absolute gap to the reference over FA, RA, TA and MIA.",
    "RTE": (
        "RTE, run-time efficiency: wall time as the caller measured it, to include Fisher"
        " estimation and exclude validation."
    ),
}
GUARANTEE = "Approximate unlearning is not a deletion guarantee."
