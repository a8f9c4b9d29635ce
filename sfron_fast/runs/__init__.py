"""SFR-on itself, in one call: ``unlearn``, from mask to verdict.

recipe.py             every setting; the paper's and the authors' own
unlearn.py            the public call, and the order of things in it
run.py, step_losses   one forget or retain step, and the state it needs
defaults.py           what is done where nobody says how
budget.py             what forgetting may cost; the learning rates follow what is spent
known.py, outcome     what the model knew before and knows after, warnings of what did not happen
guard.py, best        evaluations along the run, and the state that is kept
folder.py, shards, state   checkpoints

The methods that SFR-on is compared with are in ``sfron_fast.methods``.
"""
