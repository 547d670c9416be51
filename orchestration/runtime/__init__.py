"""A role as a group of N ranks, on Ray or in one process.

dispatch.py   pieces of batches, and how they are spread over ranks
group.py      the contract: what a group and a runtime can do
local.py      one rank per role, in this process
cluster.py    ranks as Ray actors in a placement group
train.py      supervised stages, under Ray Train or in this process
"""
