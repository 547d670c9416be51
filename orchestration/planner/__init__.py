"""What fits where, before a GPU is spent: `plan.plan` answers, `remedies` says what to change, `show` prints it.

Nothing is imported here: `machines` is read on every node of a cluster, which need not pay for torch.
"""
